"""The training log: what a run reports while it goes, and what is kept of it."""

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from edgekd.progress import Advance

Log = Sequence[dict[str, Any]]


class Report(TrainerCallback):  # type: ignore[misc]
    """Reports step, loss, divergence and rate, once per log, and notes the time of each step."""

    def __init__(self, advance: Advance) -> None:
        """Report to ``advance``."""
        self._advance = advance
        self._start_s = 0.0
        self._tokens = 0.0
        self._note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._start_s = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Report one log entry."""
        if not logs:
            return
        elapsed_s = time.monotonic() - self._start_s
        if "eval_kl_nats" in logs:
            self._note = f"  held-out kl {logs['eval_kl_nats']:.4f}"
        if "loss" in logs:
            state.log_history[-1]["elapsed_s"] = elapsed_s
            self._tokens += logs["tokens"]
            self._advance(
                state.global_step,
                f"loss {logs['loss']:.4f}  divergence {logs['divergence_nats']:.4f}  "
                f"{self._tokens / elapsed_s:.0f} tokens/s{self._note}",
            )


def write_log(path: Path, log: Log) -> None:
    """Write the entries of training and evaluation as JSON lines."""
    kept = [entry for entry in log if "loss" in entry or "eval_perplexity" in entry]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), "utf-8")


def last_figures(log: Log, key: str) -> dict[str, Any]:
    """Return the last entry that has ``key``; an empty one where there is none."""
    return next((entry for entry in reversed(log) if key in entry), {})


def fastest_step_s(log: Log) -> float | None:
    """Return the shortest time between two steps of one run; None where there was one step."""
    ends_s = [entry["elapsed_s"] for entry in log if "elapsed_s" in entry]
    gaps_s = [after - before for before, after in pairwise(ends_s) if after > before]
    return min(gaps_s, default=None)

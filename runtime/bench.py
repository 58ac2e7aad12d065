"""Speed, latency, memory and energy of models, each measured in a fresh process of its own.

A process that has held one model keeps its peak memory and its warm libraries, so a second
model measured in it would look different from the first. The measuring itself is in
bench_worker; here it is started and its answer read.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import PurePath
from typing import Any

from edgekd.devices.reading import Reading
from edgekd.errors import EngineError, RecipeError
from edgekd.progress import Progress, Silence
from edgekd.runtime.stats import Summary

SCHEMA_VERSION = 1
DECODE_DEFINITION = "decode steps after the first token / their total time"
_WORKER = "edgekd.runtime.bench_worker"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is run: the same for every model that is to be compared."""

    prompt_tokens: int = 512
    decode_tokens: int = 128
    """Steps after the first token, which comes out of the prefill."""
    repetitions: int = 5
    """Measured ones; a warm-up comes before them."""
    n_threads: int | None = None
    """None: all processors that the process may use."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            RecipeError: some are out of range; all of them are named.
        """
        faults = [
            f"{name} is {value!r}, a whole number from 1 on is needed"
            for name, value in asdict(self).items()
            if not (name == "n_threads" and value is None)
            and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
        ]
        if faults:
            raise RecipeError("; ".join(faults))

    @property
    def context_tokens(self) -> int:
        """Return the tokens that the KV cache must hold."""
        return self.prompt_tokens + self.decode_tokens


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured for one model, and on which machine."""

    model: str
    engine: str
    kind: str
    settings: dict[str, Any]
    n_threads: int
    file_bytes: int
    load_s: float
    """Until the model is ready, the import of the engine included; files may be in the cache."""
    prefill_tokens_per_s: Summary
    decode_tokens_per_s: Summary
    decode_definition: str = DECODE_DEFINITION
    ttft_s: Summary
    """Time to first token: prefill of the prompt and the choice of the next token."""
    ms_per_token: dict[str, float]
    """p50, p95 and p99 over every gap between two tokens, in all repetitions."""
    peak_rss_bytes: int
    """Of the whole process, interpreter and engine included."""
    energy_per_token: Reading
    """Package energy of the decode steps, idle draw included."""
    prompt_ids_sha256: str
    """Of the prompt's ids as a JSON list: equal where the models got the same tokens."""
    machine: dict[str, Any]
    tools: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def bench_models(
    models: Sequence[str], settings: BenchSettings, progress: Progress | None = None
) -> list[BenchResult]:
    """Return the measurements of ``models``, one after the other.

    Raises:
        EngineError: a model cannot be run; the reason is the one of its process.
    """
    results = []
    with (progress or Silence()).track("speed", len(models)) as advance:
        for number, model in enumerate(models, 1):
            results.append(_bench_model(model, settings))
            advance(number, PurePath(model).name)
    return results


def result_from_dict(document: dict[str, Any]) -> BenchResult:
    """Return the result that ``BenchResult.as_dict`` made ``document`` of."""
    known = {field.name: field.type for field in fields(BenchResult)}
    values = {name: value for name, value in document.items() if name in known}
    for name, kind in known.items():
        if kind is Summary:
            values[name] = Summary(**{**values[name], "samples": tuple(values[name]["samples"])})
        elif kind is Reading:
            values[name] = Reading(**values[name])
    return BenchResult(**values)


def describe_end(child: subprocess.CompletedProcess[str]) -> str:
    """Return how ``child`` ended without an answer: its exit code or the signal that killed it."""
    last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if child.returncode >= 0:
        return f"its process ended with exit code {child.returncode}: {last}"
    number = -child.returncode
    known = {entry.value: entry.name for entry in signal.Signals}
    hint = "; the system may have run out of memory" if known.get(number) == "SIGKILL" else ""
    return f"its process was killed by {known.get(number, f'signal {number}')}{hint}: {last}"


def _bench_model(model: str, settings: BenchSettings) -> BenchResult:
    # -P: a statistics.py in the current folder must not replace the one of the library.
    child = subprocess.run(
        [sys.executable, "-P", "-m", _WORKER],
        input=json.dumps({"model": model, "settings": asdict(settings)}),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    reply = _last_json(child.stdout)
    if "result" in reply:
        return result_from_dict(reply["result"])
    reason = reply.get("error") or describe_end(child)
    raise EngineError(reason if model in reason else f"{model}: {reason}")


def _last_json(text: str) -> dict[str, Any]:
    """Return the JSON object on the last line; native libraries may print before it."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}

"""The process that measures one model: one JSON command a line on stdin, one JSON reply each.

Started by edgekd.runtime.bench_process, which lets several of them take turns.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any

from edgekd.devices.memory import current_memory, peak_rss_bytes
from edgekd.devices.reading import Reading
from edgekd.errors import EdgekdError, EngineError
from edgekd.runtime.bench_runs import Runner
from edgekd.runtime.bench_settings import BenchSettings, Scenario, settings_from_dict
from edgekd.runtime.bench_start import mapped_bytes, start_model
from edgekd.runtime.engine import Engine
from edgekd.runtime.loading import LoadedModel, default_threads
from edgekd.runtime.tokenizer import Tokenizer

PARAGRAPH = (
    "A lighthouse keeper climbs the same stairs every evening. He trims the lamp, winds the "
    "clockwork that turns the lens, and writes the weather into a book that nobody reads. "
    "Ships pass far out; to them he is a flash of light every ten seconds, and that is enough "
    "to tell one dark coast from another. In winter the supply boat may not land for weeks, so "
    "he counts candles, flour and coal, and plans each day as carefully as a voyage. "
)
_PADDING = re.compile(rb"\[PAD\d+\]|<\|?unused\d+\|?>")


class Worker:
    """One model and what was asked of it so far."""

    loaded: LoadedModel
    runner: Runner

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what ``command`` says and return the reply."""
        what = command.pop("do")
        reply: dict[str, Any] = getattr(self, f"do_{what}")(**command)
        return reply

    def do_load(
        self,
        *,
        model: str,
        settings: dict[str, Any],
        cold: bool,
        spawned_s: float,
        extra_work: float = 0.0,
    ) -> dict[str, Any]:
        """Load the model; ``extra_work`` is the share of tokens that it computes a second time."""
        wanted = settings_from_dict(settings)
        n_threads = wanted.n_threads or default_threads()
        self.loaded, start = start_model(
            model,
            wanted.context_tokens,
            n_threads,
            cold=cold,
            spawned_s=spawned_s,
            provider=wanted.provider,
            require_npu=wanted.require_npu,
        )
        _check_context(self.loaded, wanted)
        ids = text_ids(self.loaded.tokenizer, wanted.text_tokens + 1)
        engine = self.loaded.engine
        self.runner = Runner(_Slowed(engine, extra_work) if extra_work else engine, ids)
        return {
            "path": str(self.loaded.path),
            "kind": str(self.loaded.kind),
            "engine": engine.name,
            "provider": asdict(use) if (use := self.loaded.provider_use) else None,
            "n_threads": n_threads,
            "start": asdict(start),
            "prompt_ids": ids[: wanted.text_tokens],
        }

    def do_warm_up(self, *, scenario: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run a scenario until it is steady."""
        return asdict(self.runner.warm_up(Scenario(**scenario), limit_s))

    def do_run(self, *, scenario: dict[str, Any]) -> dict[str, Any]:
        """Run a scenario once."""
        return asdict(self.runner.run(Scenario(**scenario)))

    def do_soak(self, *, scenario: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Run a scenario until the machine is as warm as it gets."""
        return self.runner.soak(Scenario(**scenario), limit_s)

    def do_memory(self) -> dict[str, Any]:
        """Return the memory of this process."""
        peak = Reading.measured(peak_rss_bytes(), "bytes", "peak resident size of the process")
        found = {"peak_rss_bytes": peak, **current_memory()}
        found["mapped_weights_bytes"] = mapped_bytes(self.loaded.path)
        return {name: asdict(reading) for name, reading in found.items()}

    def do_vocabulary(self) -> dict[str, Any]:
        """Return a hash of the vocabulary."""
        return {"sha256": vocabulary_sha256(self.loaded)}

    # What quality needs is imported by the processes that measure it; none of them loads for speed.

    def do_check_quality(self, *, models: list[str], options: dict[str, Any]) -> dict[str, Any]:
        """Check what can be known before anything runs."""
        from edgekd.runtime import bench_quality_steps as steps

        steps.check(models, options)
        return {"checked": len(models)}

    def do_record_teacher(self, *, options: dict[str, Any], folder: str) -> dict[str, Any]:
        """Run the teacher and leave in ``folder`` what it said."""
        from edgekd.runtime import bench_quality_steps as steps

        steps.record(options, folder)
        return {"folder": folder}

    def do_quality(
        self, *, model: str, options: dict[str, Any], recorded: str | None
    ) -> dict[str, Any]:
        """Return the quality of a model."""
        from edgekd.runtime import bench_quality_steps as steps

        return steps.measure(model, options, recorded)


def main() -> int:
    """Answer commands until stdin ends; return the exit code."""
    replies = _take_stdout()
    worker = Worker()
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except EdgekdError as error:
            reply = {"error": str(error)}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    return 0


def text_ids(tokenizer: Tokenizer, n_tokens: int) -> list[int]:
    """Return the first ``n_tokens`` ids of ``PARAGRAPH``, repeated as often as needed."""
    text = PARAGRAPH
    while len(ids := tokenizer.encode(text)) < n_tokens:
        text *= 2
    return ids[:n_tokens]


def vocabulary_sha256(loaded: LoadedModel) -> str:
    """Return a hash of the bytes of every id; rows that only pad the table count for nothing."""
    pieces = []
    for token_id in range(loaded.engine.vocab_size):
        piece = loaded.tokenizer.raw_token_bytes(token_id)
        pieces.append(b"" if _PADDING.fullmatch(piece) else piece)
    while pieces and not pieces[-1]:
        pieces.pop()
    return hashlib.sha256(b"".join(b"%d:%s" % (len(p), p) for p in pieces)).hexdigest()


class _Slowed:
    """An engine that works longer than it needs: what the power of a comparison is tried on."""

    def __init__(self, engine: Engine, extra_work: float) -> None:
        self._engine = engine
        self._extra_work = extra_work
        self._owed_tokens = 0.0
        self.name, self.vocab_size = engine.name, engine.vocab_size
        self.context_tokens = engine.context_tokens

    @property
    def position(self) -> int:
        return self._engine.position

    def forward(self, ids: Sequence[int], *, every_logit: bool = False) -> Any:
        # Passes of its own and no waiting: threads that idle in between cost more than the wait.
        self._owed_tokens += self._extra_work * len(ids)
        start = self._engine.position
        while self._owed_tokens >= 1:
            again = ids[: int(self._owed_tokens)]
            self._engine.forward(again)
            self._engine.rewind(start)
            self._owed_tokens -= len(again)
        return self._engine.forward(ids, every_logit=every_logit)

    def rewind(self, position: int = 0) -> None:
        self._engine.rewind(position)

    def close(self) -> None:
        self._engine.close()


def _check_context(loaded: LoadedModel, settings: BenchSettings) -> None:
    room = loaded.engine.context_tokens
    if room < settings.context_tokens:
        raise EngineError(
            f"{settings.context_tokens} tokens of prompt, decode and depth do not fit into the "
            f"context of {room}; ask for fewer"
        )


def _take_stdout() -> IO[str]:
    """Return standard output for the replies; what libraries print goes to standard error."""
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


if __name__ == "__main__":
    sys.exit(main())

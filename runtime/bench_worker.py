"""The process that measures one model: settings as JSON on stdin, one JSON line on stdout.

Every engine gets the same text, cut to the same number of tokens, and continues it greedily
past any end token, so that all do the same number of steps. Started by edgekd.runtime.bench.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgekd.devices.detect import detect
from edgekd.devices.energy import EnergyMeter
from edgekd.devices.memory import peak_rss_bytes
from edgekd.devices.reading import Reading
from edgekd.errors import EdgekdError, EngineError
from edgekd.files import size_of
from edgekd.manifest import tool_versions
from edgekd.runtime.bench import BenchResult, BenchSettings
from edgekd.runtime.engine import Engine
from edgekd.runtime.loading import LoadedModel, default_threads, open_model
from edgekd.runtime.stats import percentile, summarise
from edgekd.runtime.tokenizer import Tokenizer

PARAGRAPH = (
    "A lighthouse keeper climbs the same stairs every evening. He trims the lamp, winds the "
    "clockwork that turns the lens, and writes the weather into a book that nobody reads. "
    "Ships pass far out; to them he is a flash of light every ten seconds, and that is enough "
    "to tell one dark coast from another. In winter the supply boat may not land for weeks, so "
    "he counts candles, flour and coal, and plans each day as carefully as a voyage. "
)


@dataclass(frozen=True)
class Repetition:
    """The times of one prompt and its continuation."""

    prefill_s: float
    ttft_s: float
    gaps_s: list[float]


def main() -> int:
    """Measure what stdin asks for, print the result and return the exit code."""
    request = json.load(sys.stdin)
    try:
        result = measure(request["model"], BenchSettings(**request["settings"]))
    except EdgekdError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print("\n" + json.dumps({"result": result.as_dict()}), flush=True)
    return 0


def measure(model: str, settings: BenchSettings) -> BenchResult:
    """Return the measurements of ``model`` in this process, which should be a fresh one.

    Raises:
        EdgekdError: the model cannot be loaded or run, or its context is too small.
    """
    n_threads = settings.n_threads or default_threads()
    start_s = time.perf_counter()
    loaded = open_model(model, context_tokens=settings.context_tokens, n_threads=n_threads)
    load_s = time.perf_counter() - start_s
    _check_context(loaded, settings)
    ids = prompt_ids(loaded.tokenizer, settings.prompt_tokens)
    meter = EnergyMeter()
    _run_once(loaded.engine, ids, settings.decode_tokens, EnergyMeter())  # warm-up
    repetitions = [
        _run_once(loaded.engine, ids, settings.decode_tokens, meter)
        for _ in range(settings.repetitions)
    ]
    peak_bytes = peak_rss_bytes()
    loaded.engine.close()
    return BenchResult(
        model=str(loaded.path),
        engine=loaded.engine.name,
        kind=str(loaded.kind),
        settings=asdict(settings),
        n_threads=n_threads,
        file_bytes=size_of(loaded.path),
        load_s=load_s,
        **_speeds(repetitions, len(ids)),
        peak_rss_bytes=peak_bytes,
        energy_per_token=_per_token(meter, settings.repetitions * settings.decode_tokens),
        prompt_ids_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        machine=detect().as_dict(),
        tools=tool_versions(),
    )


def prompt_ids(tokenizer: Tokenizer, n_tokens: int) -> list[int]:
    """Return the first ``n_tokens`` ids of ``PARAGRAPH``, repeated as often as needed."""
    text = PARAGRAPH
    while len(ids := tokenizer.encode(text)) < n_tokens:
        text *= 2
    return ids[:n_tokens]


def _check_context(loaded: LoadedModel, settings: BenchSettings) -> None:
    room = loaded.engine.context_tokens
    if room < settings.context_tokens:
        raise EngineError(
            f"{settings.prompt_tokens} prompt and {settings.decode_tokens} decoded tokens do not "
            f"fit into the context of {room}; ask for fewer"
        )


def _run_once(engine: Engine, ids: Sequence[int], n_steps: int, meter: EnergyMeter) -> Repetition:
    """Prefill ``ids`` and decode ``n_steps`` greedy tokens after the first."""
    clock = time.perf_counter
    engine.rewind()
    start_s = clock()
    logits_V = engine.forward(ids)
    prefill_s = clock() - start_s
    token_id = int(logits_V.argmax())
    ttft_s = clock() - start_s
    gaps_s = []
    meter.start()
    before_s = clock()
    for _ in range(n_steps):
        token_id = int(engine.forward([token_id]).argmax())
        now_s = clock()
        gaps_s.append(now_s - before_s)
        before_s = now_s
    meter.stop()
    return Repetition(prefill_s, ttft_s, gaps_s)


def _speeds(repetitions: Sequence[Repetition], n_prompt: int) -> dict[str, Any]:
    gaps_ms = [gap_s * 1e3 for repetition in repetitions for gap_s in repetition.gaps_s]
    return {
        "prefill_tokens_per_s": summarise([n_prompt / r.prefill_s for r in repetitions]),
        "decode_tokens_per_s": summarise([len(r.gaps_s) / sum(r.gaps_s) for r in repetitions]),
        "ttft_s": summarise([r.ttft_s for r in repetitions]),
        "ms_per_token": {f"p{p}": percentile(gaps_ms, p) for p in (50, 95, 99)},
    }


def _per_token(meter: EnergyMeter, n_tokens: int) -> Reading:
    reading = meter.joules()
    value = None if reading.value is None else reading.value / n_tokens
    return replace(reading, value=value, unit="J/token")


if __name__ == "__main__":
    sys.exit(main())

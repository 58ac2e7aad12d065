"""The timed runs of one engine: prefill, decode, warm-up until steady, and the long soak.

Every engine gets the ids of the same text and continues it greedily past any end token, so that
all do the same number of steps.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from edgekd.devices.energy import EnergyMeter
from edgekd.errors import EngineError
from edgekd.runtime.bench_settings import Scenario
from edgekd.runtime.conditions import take_snapshot
from edgekd.runtime.engine import Engine

_STEADY_RUNS = 3
_STEADY_SPREAD = 0.05
"""Warm is an engine whose last runs lie within 5 % of each other."""
_MAX_WARM_UPS = 12
_SOAK_WINDOW_S = 5.0
_SOAK_WINDOWS = 4  # compared with as many before them
_SOAK_CHANGE = 0.01
_SOAK_CHANGE_C = 1.0


@dataclass(frozen=True)
class Sample:
    """The times of one run of one scenario."""

    seconds: float
    """Prefill: of the forward passes. Decode: of all steps."""
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    joules: float | None = None


@dataclass(frozen=True)
class WarmUp:
    """How a scenario became steady."""

    seconds: list[float]
    is_steady: bool


class Runner:
    """One engine and the text that it reads, its cached beginning kept between runs."""

    def __init__(self, engine: Engine, text_ids: Sequence[int]) -> None:
        """Run ``engine`` on ``text_ids``."""
        self._engine = engine
        self._ids = text_ids
        self._n_text = 0
        """Tokens of the text at the start of the cache."""

    def run(self, scenario: Scenario) -> Sample:
        """Return the times of one run of ``scenario``."""
        self._go_to(scenario.n_depth)
        if scenario.kind == "prefill":
            return self._prefill(scenario)
        return self._decode(scenario)

    def warm_up(self, scenario: Scenario, limit_s: float) -> WarmUp:
        """Run ``scenario`` until its times are steady, at most ``limit_s`` or a dozen times."""
        start_s = time.monotonic()
        seconds: list[float] = []
        while not is_steady(seconds):
            if len(seconds) >= _MAX_WARM_UPS or (
                seconds and time.monotonic() - start_s + seconds[-1] > limit_s
            ):
                return WarmUp(seconds, False)
            seconds.append(self.run(scenario).seconds)
        return WarmUp(seconds, True)

    def soak(self, scenario: Scenario, limit_s: float) -> dict[str, Any]:
        """Decode until speed and temperature are steady; return every window's rate."""
        start_s = time.monotonic()
        rates: list[float] = []
        temperatures: list[float | None] = []
        while not (steady := is_soaked(rates, temperatures)):
            if time.monotonic() - start_s >= limit_s:
                break
            rates.append(self._window(scenario))
            temperatures.append(take_snapshot().temperature_c)
        tail = rates[-_SOAK_WINDOWS:]
        return {
            "steady": steady,
            "seconds": time.monotonic() - start_s,
            "window_s": _SOAK_WINDOW_S,
            "tokens_per_s": rates,
            "temperature_c": temperatures,
            "first_tokens_per_s": rates[0] if rates else None,
            "steady_tokens_per_s": fmean(tail) if steady else None,
        }

    def _window(self, scenario: Scenario) -> float:
        n_tokens, seconds = 0, 0.0
        while seconds < _SOAK_WINDOW_S:
            seconds += self.run(scenario).seconds
            n_tokens += scenario.n_tokens
        return n_tokens / seconds

    def _prefill(self, scenario: Scenario) -> Sample:
        ids = self._ids[scenario.n_depth : scenario.n_depth + scenario.n_tokens]
        meter = EnergyMeter().start()
        start_s = time.perf_counter()
        logits_V = self._engine.forward(ids)
        prefill_s = time.perf_counter() - start_s
        logits_V.argmax()
        ttft_s = time.perf_counter() - start_s
        joules = meter.stop().value
        self._n_text = scenario.n_depth + scenario.n_tokens
        return Sample(prefill_s, ttft_s=ttft_s, joules=joules)

    def _decode(self, scenario: Scenario) -> Sample:
        engine, clock = self._engine, time.perf_counter
        self._n_text = scenario.n_depth
        token_id = self._ids[scenario.n_depth]
        times_s = [0.0] * (scenario.n_tokens + 1)
        meter = EnergyMeter().start()
        times_s[0] = clock()
        for step in range(scenario.n_tokens):
            token_id = int(engine.forward([token_id]).argmax())
            times_s[step + 1] = clock()
        joules = meter.stop().value
        gaps_s = [after - before for before, after in zip(times_s, times_s[1:], strict=False)]
        return Sample(times_s[-1] - times_s[0], gaps_s=gaps_s, joules=joules)

    def _go_to(self, depth: int) -> None:
        """Leave the first ``depth`` tokens of the text in the cache, and nothing else."""
        kept = min(depth, self._n_text)
        try:
            self._engine.rewind(kept)
        except EngineError:  # some models cannot drop a part of their memory
            self._engine.rewind(kept := 0)
        if kept < depth:
            self._engine.forward(self._ids[kept:depth])
        self._n_text = depth


def is_steady(seconds: Sequence[float]) -> bool:
    """Return whether the last runs took the same time, within 5 % of each other."""
    if len(seconds) < _STEADY_RUNS:
        return False
    tail = seconds[-_STEADY_RUNS:]
    return (max(tail) - min(tail)) / median(tail) <= _STEADY_SPREAD


def is_soaked(rates: Sequence[float], temperatures: Sequence[float | None]) -> bool:
    """Return whether the last windows are as fast and as warm as those before them."""
    if len(rates) < 2 * _SOAK_WINDOWS:
        return False
    late, early = rates[-_SOAK_WINDOWS:], rates[-2 * _SOAK_WINDOWS : -_SOAK_WINDOWS]
    if abs(fmean(late) / fmean(early) - 1) > _SOAK_CHANGE:
        return False
    known = [t for t in temperatures[-2 * _SOAK_WINDOWS :] if t is not None]
    if len(known) < 2 * _SOAK_WINDOWS:
        return True
    change = fmean(known[_SOAK_WINDOWS:]) - fmean(known[:_SOAK_WINDOWS])
    return abs(change) <= _SOAK_CHANGE_C

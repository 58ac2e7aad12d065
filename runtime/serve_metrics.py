"""What the server counts, in Prometheus' text format: our names, and llama-server's beside them.

Counted here from the events of every request, so that no total goes back when an engine process
is replaced.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.messages import Event, Failed, Finished, GenerationRequest, Started, Token

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ITL_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass
class Histogram:
    """How many values lie up to each bound."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        """Begin with no values."""
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count ``value``."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, help_text: str) -> Iterator[str]:
        """Yield the histogram as Prometheus reads it: each bucket holds those before it."""
        yield from _head(name, help_text, "histogram")
        n_so_far = 0
        for bound, n_values in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            n_so_far += n_values
            yield f'{name}_bucket{{le="{bound}"}} {n_so_far}'
        yield f"{name}_sum {self.total:.9g}"
        yield f"{name}_count {n_so_far}"


class Metrics:
    """The totals of one server; written from the engine's reader thread only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin at zero."""
        self._clock = clock
        self.outcomes: Counter[str] = Counter()
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.prompt_s = self.decode_s = 0.0
        self.longest_text = 0
        self.ttft = Histogram(_TTFT_BOUNDS_S)
        self.itl = Histogram(_ITL_BOUNDS_S)

    def follow(self, request: GenerationRequest) -> Callable[[Event], None]:
        """Return a function that counts the events of ``request``, which begins now."""
        begun_s = self._clock()
        last_s: float | None = None

        def note(event: Event) -> None:
            nonlocal last_s
            if isinstance(event, Token):
                now_s = self._clock()
                (self.ttft if last_s is None else self.itl).add(
                    now_s - (begun_s if last_s is None else last_s)
                )
                last_s = now_s
            self._count(event)

        return note

    def _count(self, event: Event) -> None:
        if isinstance(event, Started):
            self.cached_tokens += event.n_cached
            self.prompt_tokens += event.n_prompt - event.n_cached
        elif isinstance(event, Token):
            self.generated_tokens += 1
        elif isinstance(event, Finished):
            self.outcomes[event.stop_kind] += 1
            self.prompt_s += event.prompt_s
            self.decode_s += event.decode_s
            self.longest_text = max(self.longest_text, event.n_prompt + event.n_generated)
        elif isinstance(event, Failed):
            self.outcomes[event.code] += 1

    def render(self, engine: EngineProcess) -> str:
        """Return everything as text, the state of ``engine`` included."""
        lines = [*self._ours(engine), *self._llamacpp(engine)]
        return "\n".join(lines) + "\n"

    def _ours(self, engine: EngineProcess) -> Iterator[str]:
        yield from _head("edgekd_requests_total", "Requests that ended, by how.", "counter")
        for outcome, n_requests in sorted(self.outcomes.items()):
            yield f'edgekd_requests_total{{outcome="{outcome}"}} {n_requests}'
        yield from _head("edgekd_ready", "1 while the engine takes requests.", "gauge")
        yield f"edgekd_ready {int(engine.state == 'ready')}"
        yield from _one(
            "edgekd_engine_restarts_total", "Engine processes replaced.", engine.restarts, "counter"
        )
        for name, help_text, value in (
            ("edgekd_prompt_tokens_total", "Prompt tokens computed.", self.prompt_tokens),
            ("edgekd_cached_tokens_total", "Prompt tokens found in a cache.", self.cached_tokens),
            ("edgekd_generated_tokens_total", "Tokens generated.", self.generated_tokens),
        ):
            yield from _one(name, help_text, value, "counter")
        n_waiting, n_running, n_held, n_cells = _load_of(engine)
        for name, help_text, level in (
            ("edgekd_requests_waiting", "Requests in the queue.", n_waiting),
            ("edgekd_requests_running", "Requests in a slot.", n_running),
            ("edgekd_kv_tokens", "Tokens in the KV caches.", n_held),
            ("edgekd_kv_capacity_tokens", "Tokens that the KV caches can hold.", n_cells),
        ):
            yield from _one(name, help_text, level, "gauge")
        if (resident_bytes := engine.resident_bytes) is not None:
            help_text = "Resident memory of the engine process, the mapped model included."
            yield from _one("edgekd_engine_resident_bytes", help_text, resident_bytes, "gauge")
        yield from self.ttft.lines(
            "edgekd_time_to_first_token_seconds", "From the request to its first token."
        )
        yield from self.itl.lines("edgekd_inter_token_seconds", "From one token to the next.")

    def _llamacpp(self, engine: EngineProcess) -> Iterator[str]:
        """Yield llama-server's names, for dashboards that were made for it."""
        n_waiting, n_running, n_held, n_cells = _load_of(engine)
        counters = engine.snapshot.counters if engine.snapshot else None
        n_steps = counters.steps if counters else 0
        made = counters.generated_tokens if counters else 0
        for name, help_text, value, kind in (
            ("prompt_tokens_total", "Prompt tokens computed.", self.prompt_tokens, "counter"),
            ("prompt_seconds_total", "Seconds on prompts.", self.prompt_s, "counter"),
            ("tokens_predicted_total", "Tokens generated.", self.generated_tokens, "counter"),
            ("tokens_predicted_seconds_total", "Seconds on texts.", self.decode_s, "counter"),
            ("n_decode_total", "Steps of the engine.", n_steps, "counter"),
            ("n_tokens_max", "Longest text so far.", self.longest_text, "counter"),
            ("n_busy_slots_per_decode", "Texts in a step.", _rate(made, n_steps), "gauge"),
            (
                "prompt_tokens_seconds",
                "Prompt tokens per second.",
                _rate(self.prompt_tokens, self.prompt_s),
                "gauge",
            ),
            (
                "predicted_tokens_seconds",
                "Generated tokens per second.",
                _rate(self.generated_tokens, self.decode_s),
                "gauge",
            ),
            ("kv_cache_usage_ratio", "Share of the KV caches.", _rate(n_held, n_cells), "gauge"),
            ("kv_cache_tokens", "Tokens in the KV caches.", n_held, "gauge"),
            ("requests_processing", "Requests in a slot.", n_running, "gauge"),
            ("requests_deferred", "Requests in the queue.", n_waiting, "gauge"),
        ):
            yield from _one(f"llamacpp:{name}", help_text, value, kind)


def _load_of(engine: EngineProcess) -> tuple[int, int, int, int]:
    """Return requests waiting and running, tokens held and the room for them."""
    snapshot, info = engine.snapshot, engine.info
    if info is None:
        return 0, 0, 0, 0
    n_running = min(engine.n_requests, info.n_slots)
    n_waiting = engine.n_requests - n_running
    n_held = sum(snapshot.slot_tokens) if snapshot else 0
    return n_waiting, n_running, n_held, info.n_slots * info.context_tokens


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0


def _one(name: str, help_text: str, value: float, kind: str) -> Iterator[str]:
    yield from _head(name, help_text, kind)
    yield f"{name} {value:.9g}" if isinstance(value, float) else f"{name} {value}"


def _head(name: str, help_text: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} {kind}"

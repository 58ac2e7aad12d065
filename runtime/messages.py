"""What is asked of a scheduler and what it answers, and both as JSON for a pipe.

Plain values only, so that nothing from the other side of a pipe can run code here.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from edgekd.errors import RecipeError
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.sampling import SamplingParams

Scored = tuple[int, float | None, tuple[tuple[int, float], ...]]
"""A token, its log-probability and the likeliest alternatives with theirs."""
StopKind = Literal["eos", "word", "limit"]
"""An end token, a stop string, or a limit: tokens, time or context (llama-server's names)."""
FailureCode = Literal[
    "cancelled",
    "deadline",
    "engine_died",
    "engine_error",
    "invalid_request",
    "queue_full",
]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One text to be generated."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    grammar: Grammar | None = None
    deadline_s: float | None = None
    """Seconds from now until the request fails, waiting included."""
    slot: int | None = None
    """The slot it must run in; None for any."""
    reuse_prefix: bool = True
    prompt_logprobs: int | None = None
    """Report every prompt token's log-probability and so many alternatives."""
    report_progress: bool = False
    """Report how much of the prompt is read after each part of it."""


@dataclass(frozen=True)
class Started:
    """A request left the queue."""

    id: str
    slot: int
    n_prompt: int
    n_cached: int
    """Prompt tokens that need not be computed again."""
    waited_s: float


@dataclass(frozen=True)
class PromptRead:
    """A part of the prompt was computed."""

    id: str
    n_computed: int
    """Prompt tokens in the cache by now, those included that were there before."""
    elapsed_s: float
    """Seconds from the start."""


@dataclass(frozen=True)
class PromptScored:
    """The log-probabilities of a part of the prompt; its first token has none."""

    id: str
    tokens: tuple[Scored, ...]


@dataclass(frozen=True)
class Token:
    """A token was chosen; its text may be held back until it is certain."""

    id: str
    token_id: int
    text: str
    elapsed_s: float
    """Seconds from the start of the request to this token."""
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def scored(self) -> Scored:
        """The token with its probabilities, as those of a prompt come."""
        return self.token_id, self.logprob, self.alternatives


@dataclass(frozen=True)
class Finished:
    """A text is complete."""

    id: str
    stop_kind: StopKind
    text: str
    """What was held back until now."""
    stop_string: str | None
    n_prompt: int
    n_cached: int
    n_generated: int
    """Tokens chosen, the end token included."""
    prompt_s: float
    """Seconds from the start to the first token."""
    decode_s: float
    """Seconds from the first token to the last."""


@dataclass(frozen=True)
class Failed:
    """A request ends without a complete text."""

    id: str
    code: FailureCode
    message: str


Event = Started | PromptRead | PromptScored | Token | Finished | Failed
_EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (Started, PromptRead, PromptScored, Token, Finished, Failed)
}


def request_to_json(request: GenerationRequest) -> dict[str, Any]:
    """Return ``request`` as plain values."""
    return asdict(request)


def request_from_json(found: dict[str, Any]) -> GenerationRequest:
    """Return the request that ``request_to_json`` made plain.

    Raises:
        RecipeError: something is missing, unknown or out of range.
    """
    try:
        params = SamplingParams(**_with_tuples(found["params"]))
        grammar = found.get("grammar")
        rest = {**found, "params": params, "prompt_ids": tuple(found["prompt_ids"])}
        rest["grammar"] = None if grammar is None else Grammar(**grammar)
        return GenerationRequest(**rest)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"this is no request: {error}") from error


def events_to_json(events: Sequence[Event]) -> list[list[Any]]:
    """Return each event as its name and its values in order; shorter than with their names."""
    return [
        [type(event).__name__, *(getattr(event, field.name) for field in fields(event))]
        for event in events
    ]


def events_from_json(found: list[list[Any]]) -> list[Event]:
    """Return the events that ``events_to_json`` made plain."""
    return [_EVENTS[name](*map(_tupled, values)) for name, *values in found]


def to_line(message: dict[str, Any]) -> bytes:
    """Return ``message`` as one line of JSON, in ASCII."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _tupled(value) for name, value in values.items()}


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value

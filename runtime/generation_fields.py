"""The fields that every body has which asks for text: those of llama-server's README.

OpenAI's bodies take them beside their own, as llama-server's do. What edgekd does not have is
accepted at the values that switch it off. Imports pydantic, so only the server imports this.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.runtime.asked import MAX_BIASES, AskedBody, Json, Stops, TokenId
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.sampling import (
    MAX_BIAS,
    MAX_PENALTY,
    MAX_PROBS,
    MAX_REPEAT_PENALTY,
    MAX_SAMPLERS,
    MAX_SEED,
    MAX_TEMPERATURE,
    SAMPLERS,
    SamplingParams,
)

MAX_CHOICES = 16
MAX_PROMPTS = 64

IDLE: dict[str, Any] = {
    "adaptive_decay": 0.9,
    "dry_allowed_length": 2,
    "dry_base": 1.75,
    "dry_penalty_last_n": 64,
    "dry_sequence_breakers": ["\n", ":", '"', "*"],
    "dynatemp_exponent": 1.0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "n_discard": 0,  # the context is never shifted, so nothing is kept or dropped
    "n_keep": 0,
    "speculative.n_max": 0,
    "speculative.n_min": 0,
    "speculative.p_min": 0.0,
    "xtc_threshold": 0.1,
}
"""Settings of what is off, as ``generation_settings`` shows them; any value changes nothing."""
SWITCHES: dict[str, tuple[Any, ...]] = {
    "adaptive_target": (-1.0,),
    "backend_sampling": (False,),
    "dry_multiplier": (0.0,),
    "dynatemp_range": (0.0,),
    "lora": ([],),
    "mirostat": (0,),
    "n_indent": (0,),
    "post_sampling_probs": (False,),
    "reasoning_format": ("none",),
    "top_n_sigma": (-1.0, 0.0),
    "xtc_probability": (0.0,),
}
"""What switches on something that edgekd does not have, and the values that leave it off."""
OFF_SAMPLERS = frozenset({"adaptive_p", "dry", "top_n_sigma", "xtc"})
"""Samplers that their settings switch off, so that naming them asks for nothing."""
SAMPLER_LETTERS = {
    "a": "adaptive_p",
    "d": "dry",
    "e": "penalties",
    "k": "top_k",
    "m": "min_p",
    "p": "top_p",
    "s": "top_n_sigma",
    "t": "temperature",
    "x": "xtc",
    "y": "typ_p",
}

Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)] | Literal[False]
Limit = Annotated[int, Field(ge=-1, le=MAX_SEED)]
Penalty = Annotated[float, Field(ge=-MAX_PENALTY, le=MAX_PENALTY)]


class GenerationFields(AskedBody):
    """What asks for text; the defaults are llama-server's."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {*IDLE, "n_cache_reuse", "sse_ping_interval", "user"}
    )
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = SWITCHES
    model: str | None = None
    stream: bool = False
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    n_cmpl: int | None = Field(None, ge=1, le=MAX_CHOICES)
    n_predict: Limit | None = None
    max_completion_tokens: Limit | None = None
    max_tokens: Limit | None = None
    t_max_predict_ms: int = Field(0, ge=-1, le=MAX_SEED)
    temperature: float = Field(0.8, ge=0, le=MAX_TEMPERATURE)
    top_k: int = Field(40, ge=-1, le=MAX_SEED)
    top_p: float = Field(0.95, ge=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    typical_p: float = Field(1.0, ge=0, le=1)
    min_keep: int = Field(0, ge=0, le=MAX_SEED)
    repeat_penalty: float = Field(1.0, ge=0.01, le=MAX_REPEAT_PENALTY)
    repeat_last_n: int = Field(64, ge=-1, le=MAX_SEED)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Bias] | list[tuple[TokenId | str, Bias]] = Field(
        [], max_length=MAX_BIASES
    )
    samplers: list[str] | str | None = Field(None, max_length=MAX_SAMPLERS)
    seed: int = Field(-1, ge=-1, le=MAX_SEED)
    stop: Stops = []
    ignore_eos: bool = False
    n_probs: int = Field(0, ge=0, le=MAX_PROBS)
    grammar: str | None = None
    json_schema: Json | None = None
    id_slot: int = Field(-1, ge=-1, le=2**31)
    cache_prompt: bool = True
    timings_per_token: bool = False
    return_progress: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_tuples(cls, found: Any) -> Any:
        """Let pairs be tuples, which JSON does not have and strict types ask for."""
        if isinstance(found, dict) and isinstance(found.get("logit_bias"), list):
            pairs = [
                tuple(each) if isinstance(each, list) else each for each in found["logit_bias"]
            ]
            return found | {"logit_bias": pairs}
        return found

    @model_validator(mode="after")
    def _one_form(self) -> "GenerationFields":
        if len(self.forms()) > 1:
            raise ValueError(
                "grammar, json_schema and response_format cannot be had together; choose one"
            )
        return self

    def n_texts(self) -> int:
        """Return how many texts are wanted of each prompt."""
        return self.n if self.n_cmpl is None else self.n_cmpl

    def limit(self) -> int:
        """Return how many tokens are wanted, -1 for as many as fit."""
        given = (self.n_predict, self.max_completion_tokens, self.max_tokens)
        return next((each for each in given if each is not None), -1)

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end a text."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(each for each in found if each)

    def chain(self) -> tuple[str, ...]:
        """Return the samplers that act, in their order; those that are off may be named too."""
        if self.samplers is None:
            return SAMPLERS
        named = [SAMPLER_LETTERS.get(each, each) for each in self.samplers]
        return tuple(each for each in named if each not in OFF_SAMPLERS)

    def n_alternatives(self) -> int | None:
        """Return how many rivals of each token to report; None for no probabilities at all."""
        return self.n_probs or None

    def is_after_sampling(self) -> bool:
        """Return whether those probabilities are the ones behind the samplers."""
        return False

    def forms(self) -> list[Grammar]:
        """Return every form that the text must have; one at most is allowed."""
        found = [Grammar("gbnf", self.grammar)] if self.grammar else []
        if self.json_schema is not None:
            found.append(Grammar("json_schema", json.dumps(self.json_schema)))
        return found

    def form(self) -> Grammar | None:
        """Return the form that the text must have."""
        return next(iter(self.forms()), None)

    def sampling(
        self, room: int, bias: tuple[tuple[int, float], ...] = (), index: int = 0
    ) -> SamplingParams:
        """Return the settings of the text with ``index``; each draws with a seed of its own."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            min_keep=self.min_keep,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            samplers=self.chain(),
            seed=None if self.seed < 0 else (self.seed + index) % (MAX_SEED + 1),
            stop=self.stops(),
            max_tokens=room if self.limit() < 0 else max(self.limit(), 1),
            max_predict_ms=self.t_max_predict_ms if self.t_max_predict_ms > 0 else None,
            ignore_eos=self.ignore_eos,
            logprobs=self.n_alternatives(),
            post_sampling_probs=self.is_after_sampling(),
        )

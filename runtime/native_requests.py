"""The bodies of llama-server's own routes; names and defaults are those of its README.

Samplers that edgekd does not have are accepted at the values that switch them off.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from edgekd.runtime.asked import MAX_BIASES, MAX_STOPS, AskedBody, Count, Json, StopString, TokenId
from edgekd.runtime.grammar import Grammar
from edgekd.runtime.openai_requests import MAX_CHOICES, MAX_PROMPTS, Penalty
from edgekd.runtime.sampling import (
    MAX_BIAS,
    MAX_LOGPROBS,
    MAX_REPEAT_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    SamplingParams,
)

Pieces = Annotated[list[TokenId | str], Field(min_length=1)]
"""Token ids and texts, one behind the other."""


class PromptObject(AskedBody):
    """A prompt as an object; pictures and sound are not supported."""

    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {"multimodal_data": ([],)}
    prompt_string: str


Prompt = str | PromptObject | Pieces
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)] | Literal[False]


class NativeRequest(AskedBody):
    """Body of /completion."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "n_cache_reuse",
            "n_discard",  # the context is never shifted, so nothing is kept or dropped
            "n_keep",
            "return_progress",
            "sse_ping_interval",
            "user",
            # Settings of samplers that are off:
            "dry_allowed_length",
            "dry_base",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
            "dynatemp_exponent",
            "mirostat_eta",
            "mirostat_tau",
            "xtc_threshold",
        }
    )
    without_effect: ClassVar[dict[str, tuple[Any, ...]]] = {
        "dry_multiplier": (0,),
        "dynatemp_range": (0,),
        "lora": ([],),
        "min_keep": (0,),
        "mirostat": (0,),
        "n_indent": (0,),
        "post_sampling_probs": (False,),
        "t_max_predict_ms": (0,),
        "xtc_probability": (0,),
    }
    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS)]
    model: str | None = None
    stream: bool = False
    n_predict: int = Field(-1, ge=-1, le=MAX_SEED)
    max_tokens: int | None = Field(None, ge=-1, le=MAX_SEED)
    n_cmpl: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float = Field(0.8, ge=0, le=MAX_TEMPERATURE)
    top_k: int = Field(40, ge=-1, le=MAX_SEED)
    top_p: float = Field(0.95, ge=0, le=1)
    min_p: float = Field(0.05, ge=0, le=1)
    typical_p: float = Field(1.0, ge=0, le=1)
    repeat_penalty: float = Field(1.0, ge=0.01, le=MAX_REPEAT_PENALTY)
    repeat_last_n: int = Field(64, ge=-1, le=MAX_SEED)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: int = Field(-1, ge=-1, le=MAX_SEED)
    stop: list[StopString] | str = Field([], max_length=128)
    ignore_eos: bool = False
    logit_bias: dict[str, Bias] | list[tuple[TokenId | str, Bias]] = Field(
        [], max_length=MAX_BIASES
    )
    n_probs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    grammar: str | None = None
    json_schema: Json | None = None
    id_slot: int = Field(-1, ge=-1, le=2**31)
    cache_prompt: bool = True
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: list[str] = Field([], max_length=64)
    samplers: list[str] | str | None = Field(None, max_length=64)

    @model_validator(mode="before")
    @classmethod
    def _as_lists(cls, found: Any) -> Any:
        """Let pairs be tuples, which JSON does not have and strict types ask for."""
        if isinstance(found, dict) and isinstance(found.get("logit_bias"), list):
            pairs = [
                tuple(each) if isinstance(each, list) else each for each in found["logit_bias"]
            ]
            return found | {"logit_bias": pairs}
        return found

    @model_validator(mode="after")
    def _fits_together(self) -> "NativeRequest":
        if self.grammar and self.json_schema is not None:
            raise ValueError("grammar and json_schema cannot be had together; choose one")
        if len(self.stops()) > MAX_STOPS:
            raise ValueError(f"stop has over {MAX_STOPS} strings; give fewer")
        if self.samplers is not None and list(self.samplers) != SAMPLERS:
            raise ValueError(f"samplers is fixed to {SAMPLERS}; leave it out")
        return self

    def stops(self) -> tuple[str, ...]:
        """Return the strings that end a text."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(each for each in found if each)

    def limit(self) -> int:
        """Return how many tokens are wanted, -1 for as many as fit."""
        return self.n_predict if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[Prompt]:
        """Return each prompt; a list that holds a number is one of pieces."""
        if not isinstance(self.prompt, list):
            return [self.prompt]
        if any(isinstance(each, int) for each in self.prompt):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def is_list(self) -> bool:
        """Whether the answer is an array."""
        return self.n_cmpl > 1 or (isinstance(self.prompt, list) and len(self.prompts()) > 1)

    def form(self) -> Grammar | None:
        """Return the form that the text must have."""
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema))
        return Grammar("gbnf", self.grammar) if self.grammar else None

    def sampling(
        self, room: int, bias: tuple[tuple[int, float], ...], index: int
    ) -> SamplingParams:
        """Return the settings of the completion with ``index``."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            seed=None if self.seed < 0 else (self.seed + index) % (MAX_SEED + 1),
            stop=self.stops(),
            max_tokens=room if self.limit() < 0 else max(self.limit(), 1),
            ignore_eos=self.ignore_eos,
            logprobs=self.n_probs or None,
        )


SAMPLERS = ["penalties", "top_k", "typ_p", "top_p", "min_p", "temperature"]


class TokenizeRequest(AskedBody):
    """Body of /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(AskedBody):
    """Body of /detokenize."""

    tokens: list[Count]

"""How the next token is chosen from the logits: greedy, or drawn with a seed of one's own.

The chain and its order are llama.cpp's defaults: logit bias, grammar, penalties, top-k, typical,
top-p, min-p, temperature. So top-p sees the distribution before the temperature, unlike in
transformers. Another order can be asked for, of some of them too; bias and grammar always come
first. Log-probabilities are those of the model, before the chain, unless asked otherwise.

Example: ``Sampler(SamplingParams(temperature=0.8, top_k=40, seed=1), prompt_ids).pick(logits_V)``
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.candidates import (
    Candidates,
    at_least,
    likeliest,
    most_typical,
    nucleus,
    tempered,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.runtime.engine import Logits

# V vocabulary, P distinct tokens in the penalties' window

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1
MAX_PENALTY = 2.0  # OpenAI's bounds are -2 and 2
MAX_BIAS = 100.0  # OpenAI's: 100 forces a token, -100 bans it
MAX_LOGPROBS = 20  # OpenAI's
MAX_PROBS = 100  # of llama-server's n_probs, which has no bound there; some 5 KB for each token
MAX_REPEAT_PENALTY = 10.0
SAMPLERS = ("penalties", "top_k", "typ_p", "top_p", "min_p", "temperature")
"""The chain, in llama.cpp's names and order."""
MAX_SAMPLERS = 32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a reply is drawn and where it ends."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Only the so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Only tokens at least so likely, as a share of the likeliest one."""
    typical_p: float = 1.0
    """Only the tokens nearest to the expected surprise that together have this probability."""
    min_keep: int = 0
    """So many tokens at least are left by each of top-p, min-p and typical."""
    repeat_penalty: float = 1.0
    """Divides positive logits and multiplies negative ones of tokens in the window."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for each time it stands in the window."""
    presence_penalty: float = 0.0
    """Taken off a token's logit if it stands in the window."""
    repeat_last_n: int = 64
    """The penalties' window in tokens, the prompt included; -1 for everything, 0 for nothing."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit."""
    seed: int | None = None
    max_tokens: int = 256
    max_predict_ms: int | None = None
    """The text ends when it takes longer from its first token on and holds a line break."""
    stop: tuple[str, ...] = ()
    """Strings that end the text, and are no part of it."""
    ignore_eos: bool = False
    """Never end with an end-of-text token."""
    samplers: tuple[str, ...] = SAMPLERS
    """What narrows the choice, in this order; what is not named is off."""
    logprobs: int | None = None
    """How many alternatives to report beside the chosen token; None reports nothing."""
    post_sampling_probs: bool = False
    """Report what they were drawn with, behind the chain: nothing but the candidates it left."""

    @property
    def has_penalty(self) -> bool:
        """Whether repetition costs anything."""
        has_any = self.repeat_penalty != 1 or self.frequency_penalty or self.presence_penalty
        return bool(has_any) and "penalties" in self.samplers

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            RecipeError: some are out of range; all of them are named.
        """
        if faults := list(_faults(self)):
            raise RecipeError("these sampling settings are out of range: " + "; ".join(faults))


@dataclass(frozen=True)
class Choice:
    """A chosen token; the rest only where log-probabilities were asked for."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of the probability that the model gave the token."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, likeliest first."""


class Sampler:
    """Draws tokens with random numbers that depend on nothing but the seed."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Begin the random numbers of ``params.seed``; the penalties remember ``prompt_ids``.

        ``stop_ids`` are the tokens that ``ignore_eos`` rules out.
        """
        import numpy as np

        self._params = params
        self._rng = np.random.default_rng(params.seed)
        limit = None if params.repeat_last_n < 0 else params.repeat_last_n
        self._window = deque(prompt_ids, maxlen=limit)
        self._banned_ids = sorted(stop_ids) if params.ignore_eos else []
        summed: dict[int, float] = {}
        for token_id, bias in params.logit_bias:
            summed[token_id] = summed.get(token_id, 0.0) + bias
        self._bias_ids = np.array(list(summed), np.int64)
        self._biases = np.array(list(summed.values()), np.float32)

    def pick(self, logits_V: "Logits", allowed_V: "NDArray[np.bool_] | None" = None) -> int:
        """Return the id of the next token; see ``choose``."""
        return self.choose(logits_V, allowed_V).token_id

    def choose(self, logits_V: "Logits", allowed_V: "NDArray[np.bool_] | None" = None) -> Choice:
        """Return the next token, one of ``allowed_V`` where a grammar gives them.

        Raises:
            EngineError: the logits hold NaN or infinity, so the model is broken; or no token
                is allowed.
        """
        _check_finite(logits_V)
        scores_V = self._biased(logits_V, allowed_V)
        left, index = self._draw(scores_V)
        token_id = left.id_at(index)
        self._window.append(token_id)
        if self._params.logprobs is None:
            return Choice(token_id)
        if self._params.post_sampling_probs:
            return _among(left, index, self._params.logprobs)
        return with_logprobs(logits_V, token_id, self._params.logprobs)

    def _biased(
        self, logits_V: "Logits", allowed_V: "NDArray[np.bool_] | None"
    ) -> "NDArray[np.float32]":
        """Return the logits after bias, grammar and penalties; ``logits_V`` stays as it is."""
        import numpy as np

        params = self._params
        scores_V = np.array(logits_V, np.float32)
        if len(self._bias_ids):
            scores_V[self._bias_ids] += self._biases
        if self._banned_ids:
            scores_V[self._banned_ids] = -np.inf
        if allowed_V is not None:
            scores_V[~allowed_V] = -np.inf
        if self._window and params.has_penalty:
            self._penalize(scores_V)
        return scores_V

    def _penalize(self, scores_V: "NDArray[np.float32]") -> None:
        """Apply the penalties in place (llama_sampler_penalties_apply of llama.cpp)."""
        import numpy as np

        params = self._params
        ids_P, counts_P = np.unique(np.fromiter(self._window, np.int64), return_counts=True)
        before_P = scores_V[ids_P]
        scaled_P = np.where(
            before_P <= 0, before_P * params.repeat_penalty, before_P / params.repeat_penalty
        )
        taken_P = counts_P * params.frequency_penalty + params.presence_penalty
        scores_V[ids_P] = scaled_P - taken_P

    def _draw(self, scores_V: "NDArray[np.float32]") -> tuple[Candidates, int]:
        """Return the candidates that the chain left, and which of them was drawn."""
        import numpy as np

        best = int(scores_V.argmax())
        if scores_V[best] == -np.inf:
            raise EngineError("no token is allowed here: grammar and logit_bias exclude them all")
        if self._params.temperature == 0 and "temperature" in self._params.samplers:
            return Candidates.of(scores_V).keep(np.array([best])), 0
        found = self._narrow(Candidates.of(scores_V))
        scores_K = found.scores_K.astype(np.float64)
        sums_K = np.cumsum(np.exp(scores_K - scores_K.max()))
        drawn = np.searchsorted(sums_K, self._rng.random() * sums_K[-1], side="right")
        return found, int(drawn)

    def _narrow(self, found: Candidates) -> Candidates:
        """Return the candidates that the chain leaves."""
        for name in self._params.samplers:
            if name in _STEPS:
                found = _STEPS[name](found, self._params)
        return found


_STEPS: dict[str, Callable[[Candidates, SamplingParams], Candidates]] = {
    "top_k": lambda found, params: likeliest(found, params.top_k),
    "typ_p": lambda found, params: most_typical(found, params.typical_p, params.min_keep),
    "top_p": lambda found, params: nucleus(found, params.top_p, params.min_keep),
    "min_p": lambda found, params: at_least(found, params.min_p, params.min_keep),
    "temperature": lambda found, params: tempered(found, params.temperature),
}
"""The samplers that work on candidates; penalties need the whole vocabulary, and come before."""


def with_logprobs(logits_V: "Logits", token_id: int, n_alternatives: int) -> Choice:
    """Return ``token_id`` with its log-probability and those of the likeliest tokens."""
    return _among(Candidates.of(logits_V), token_id, n_alternatives)


def _among(found: Candidates, index: int, n_alternatives: int) -> Choice:
    """Return the candidate at ``index``, with log-probabilities among the candidates."""
    import numpy as np

    scores_K = found.scores_K
    highest = scores_K.max()
    log_sum = float(highest) + math.log(np.exp(scores_K - highest).sum(dtype=np.float64))
    pairs = likeliest(found, n_alternatives).pairs() if n_alternatives else []
    return Choice(
        found.id_at(index),
        float(scores_K[index]) - log_sum,
        tuple((each, score - log_sum) for each, score in pairs),
    )


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Return only if every token that ``params`` names is one of ``vocab_size``.

    Raises:
        RecipeError: one is not.
    """
    for token_id, _ in params.logit_bias:
        if token_id >= vocab_size:
            raise RecipeError(
                f"logit_bias names token {token_id}, this model's go from 0 to {vocab_size - 1}"
            )


def _check_finite(logits_V: "Logits") -> None:
    highest = float(logits_V[logits_V.argmax()])  # argmax finds a NaN before any number
    if not math.isfinite(highest):
        raise EngineError(
            f"the model's logits hold {highest}, finite numbers are needed; "
            "its weights are broken, export it again"
        )


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repeat_penalty": (0.01, MAX_REPEAT_PENALTY),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY),
}
_COUNTS: dict[str, tuple[int, int, str]] = {
    "top_k": (0, MAX_SEED, "whole numbers from 0 (off)"),
    "min_keep": (0, MAX_SEED, "whole numbers from 0 (off)"),
    "repeat_last_n": (-1, MAX_SEED, "whole numbers from -1 (everything)"),
    "max_tokens": (1, MAX_SEED, "whole numbers from 1"),
    "max_predict_ms": (1, MAX_SEED, "whole numbers from 1"),
    "seed": (0, MAX_SEED, f"whole numbers from 0 to {MAX_SEED}"),
    "logprobs": (0, MAX_PROBS, f"whole numbers from 0 to {MAX_PROBS}"),
}


def _faults(params: SamplingParams) -> Iterator[str]:
    """Yield what is wrong with ``params``, one line a setting."""
    for name, (low, high) in _RANGES.items():
        value = getattr(params, name)
        if not _is_number(value, low, high):
            yield f"{name} is {value!r}, {low:g} to {high:g} are allowed"
    for name, (lowest, highest, allowed) in _COUNTS.items():
        value = getattr(params, name)
        is_unset = value is None and name in ("seed", "logprobs", "max_predict_ms")
        if not is_unset and not _is_count(value, lowest, highest):
            yield f"{name} is {value!r}, {allowed} are allowed"
    for token_id, bias in params.logit_bias:
        if not _is_count(token_id, 0, 2**31) or not _is_number(bias, -MAX_BIAS, MAX_BIAS):
            yield (
                f"logit_bias has {token_id!r}: {bias!r}, token ids and "
                f"{-MAX_BIAS:g} to {MAX_BIAS:g} are allowed"
            )
    yield from _faulty_samplers(params)
    if "" in params.stop:
        yield "stop holds an empty string, which would end every text; leave it out"


def _faulty_samplers(params: SamplingParams) -> Iterator[str]:
    names = params.samplers
    if unknown := sorted(set(names) - set(SAMPLERS)):
        yield f"samplers names {', '.join(unknown)[:100]}, allowed are {', '.join(SAMPLERS)}"
    if len(names) > MAX_SAMPLERS:
        yield f"samplers has {len(names)} names, {MAX_SAMPLERS} are allowed"
    if params.has_penalty and "penalties" in names[1:]:
        yield "samplers has penalties behind others, they are allowed once and first"


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _is_count(value: Any, low: int, high: int) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and low <= value <= high

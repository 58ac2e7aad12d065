"""How the next token is chosen from the logits: greedy, or drawn with a seed of one's own.

The order is that of transformers: temperature, then top-k, then top-p.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekd.errors import EngineError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.runtime.engine import Logits

# V vocabulary, K the candidates left of it

MAX_TEMPERATURE = 2.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a reply is drawn and where it ends."""

    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Only the so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end the text, and are no part of it."""

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            RecipeError: some are out of range; all of them are named.
        """
        if faults := list(_faults(self)):
            raise RecipeError("these sampling settings are out of range: " + "; ".join(faults))


class Sampler:
    """Draws tokens with random numbers that depend on nothing but the seed."""

    def __init__(self, params: SamplingParams) -> None:
        """Begin the sequence of random numbers that ``params.seed`` stands for."""
        import numpy as np

        self._params = params
        self._rng = np.random.default_rng(params.seed)

    def pick(self, logits_V: "Logits") -> int:
        """Return the id of the next token.

        Raises:
            EngineError: the logits hold NaN or infinity, so the model is broken.
        """
        import numpy as np

        scores_V = np.asarray(logits_V, np.float64)
        likeliest = int(np.argmax(scores_V))  # argmax finds a NaN before any number
        if not np.isfinite(scores_V[likeliest]):
            raise EngineError(
                f"the model's logits hold {scores_V[likeliest]}, finite numbers are needed; "
                "its weights are broken, export it again"
            )
        if self._params.temperature == 0:
            return likeliest
        ids_K, weights_K = self._candidates(scores_V - scores_V[likeliest])
        sums_K = np.cumsum(weights_K)
        drawn = np.searchsorted(sums_K, self._rng.random() * sums_K[-1], side="right")
        return int(ids_K[drawn])

    def _candidates(
        self, scores_V: "NDArray[np.float64]"
    ) -> tuple["NDArray[np.intp]", "NDArray[np.float64]"]:
        """Return ids and unnormalized probabilities of the tokens that may be drawn."""
        import numpy as np

        ids_K = np.arange(len(scores_V))
        if 0 < self._params.top_k < len(scores_V):
            ids_K = np.argpartition(-scores_V, self._params.top_k - 1)[: self._params.top_k]
        with np.errstate(over="ignore"):  # a tiny temperature sends scores to -inf: weight 0
            weights_K = np.exp(scores_V[ids_K] / self._params.temperature)
        if self._params.top_p < 1:
            order_K = np.argsort(-weights_K, kind="stable")
            ids_K, weights_K = ids_K[order_K], weights_K[order_K]
            before_K = np.cumsum(weights_K) - weights_K
            n_kept = int(np.sum(before_K < self._params.top_p * weights_K.sum()))
            ids_K, weights_K = ids_K[: max(1, n_kept)], weights_K[: max(1, n_kept)]
        return ids_K, weights_K


def _faults(params: SamplingParams) -> Iterator[str]:
    """Yield what is wrong with ``params``, one line a setting."""
    if not _is_number(params.temperature, 0, MAX_TEMPERATURE):
        yield f"temperature is {params.temperature!r}, 0 to {MAX_TEMPERATURE:g} are allowed"
    if not _is_count(params.top_k, 0):
        yield f"top_k is {params.top_k!r}, whole numbers from 0 (off) are allowed"
    if not _is_number(params.top_p, 0, 1):
        yield f"top_p is {params.top_p!r}, 0 to 1 are allowed"
    if params.seed is not None and not _is_count(params.seed, 0):
        yield f"seed is {params.seed!r}, whole numbers from 0 to {MAX_SEED} are allowed"
    if not _is_count(params.max_tokens, 1):
        yield f"max_tokens is {params.max_tokens!r}, whole numbers from 1 are allowed"
    if "" in params.stop:
        yield "stop holds an empty string, which would end every text; leave it out"


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and low <= value <= high


def _is_count(value: Any, low: int) -> bool:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and low <= value <= MAX_SEED

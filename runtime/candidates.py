"""Which tokens may be drawn: top-k, typical, top-p and min-p over a vocabulary, without sorting it.

Every filter keeps its candidates in the order of their ids: a draw then depends on the
probabilities alone, and two nearly equal ones that change places do not change it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# V vocabulary, K the candidates left of it

_FIRST_GUESS = 128  # a nucleus has seldom more tokens
_GROWTH = 8
_BLOCK = 64  # scores to a block when the highest are searched


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be drawn, and their logits."""

    ids_K: "NDArray[np.intp] | None"
    """None while it is the whole vocabulary, which needs no list."""
    scores_K: "NDArray[np.floating[Any]]"

    @classmethod
    def of(cls, scores_V: "NDArray[np.floating[Any]]") -> "Candidates":
        """Return the whole vocabulary."""
        return cls(None, scores_V)

    def id_at(self, index: int) -> int:
        """Return the token at ``index`` of the list."""
        return index if self.ids_K is None else int(self.ids_K[index])

    def pairs(self) -> list[tuple[int, float]]:
        """Return tokens and logits, highest first."""
        import numpy as np

        order = np.argsort(-self.scores_K, kind="stable")
        return [(self.id_at(int(i)), float(self.scores_K[i])) for i in order]

    def keep(self, chosen: "NDArray[Any]") -> "Candidates":
        """Return the candidates at the ascending indices ``chosen``."""
        ids_K = chosen if self.ids_K is None else self.ids_K[chosen]
        return Candidates(ids_K, self.scores_K[chosen])


def likeliest(found: Candidates, k: int) -> Candidates:
    """Return the ``k`` likeliest candidates; all of them where ``k`` is 0."""
    import numpy as np

    if not 0 < k < len(found.scores_K):
        return found
    near = _above_floor(found.scores_K, k)
    best = np.argpartition(-found.scores_K[near], k - 1)[:k] if len(near) > k else slice(None)
    return found.keep(np.sort(near[best]))


def nucleus(found: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Return the fewest likeliest candidates that together have probability ``p``.

    ``min_keep`` are left at least, here and below.
    Holtzman et al., 2020, https://arxiv.org/abs/1904.09751
    """
    if p >= 1:
        return found
    probabilities_K = _softmax(found.scores_K)
    return found.keep(_first_until(-probabilities_K, probabilities_K, p, min_keep))


def most_typical(found: Candidates, p: float, min_keep: int = 0) -> Candidates:
    """Return the candidates nearest to the expected surprise, together of probability ``p``.

    Meister et al., 2023, https://arxiv.org/abs/2202.00666
    """
    import numpy as np

    if p >= 1:
        return found
    probabilities_K = _softmax(found.scores_K)
    with np.errstate(divide="ignore"):
        surprises_K = -np.log(probabilities_K)
    possible = probabilities_K > 0
    entropy = float(np.sum(probabilities_K[possible] * surprises_K[possible]))
    return found.keep(_first_until(np.abs(surprises_K - entropy), probabilities_K, p, min_keep))


def at_least(found: Candidates, min_p: float, min_keep: int = 0) -> Candidates:
    """Return the candidates that are ``min_p`` times as likely as the likeliest, or more."""
    import numpy as np

    if min_p <= 0:
        return found
    lowest = float(found.scores_K.max()) + float(np.log(min_p))
    likely = np.flatnonzero(found.scores_K >= lowest)
    return found.keep(likely) if len(likely) >= min_keep else likeliest(found, min_keep)


def tempered(found: Candidates, temperature: float) -> Candidates:
    """Return the candidates with their probabilities flattened, or sharpened below 1."""
    import numpy as np

    scores_K = found.scores_K.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature sends scores to -inf: weight 0
        return Candidates(found.ids_K, (scores_K - scores_K.max()) / temperature)


def _above_floor(scores_K: "NDArray[np.floating[Any]]", k: int) -> "NDArray[np.intp]":
    """Return ascending indices of at least ``k`` candidates, the ``k`` likeliest among them.

    The k-th highest of the maxima of k or more blocks is no higher than the k-th highest score:
    one pass for the maxima and one for a comparison replace a partition of the vocabulary.
    """
    import numpy as np

    n_blocks = len(scores_K) // _BLOCK
    if n_blocks < k:
        return np.arange(len(scores_K))
    # A block is a column: numpy compares whole rows at once.
    maxima = scores_K[: n_blocks * _BLOCK].reshape(_BLOCK, n_blocks).max(axis=0)
    floor = np.partition(maxima, n_blocks - k)[n_blocks - k]
    return np.flatnonzero(scores_K >= floor)


def _first_until(
    keys_K: "NDArray[np.float64]", weights_K: "NDArray[np.float64]", p: float, least: int
) -> "NDArray[np.intp]":
    """Return ascending indices of the fewest smallest keys, ``least``, whose weights reach ``p``.

    Guesses how many that are and partitions, which takes a tenth of the time of a sort.
    """
    import numpy as np

    n_guess = max(_FIRST_GUESS, least)
    while n_guess < len(keys_K):
        chosen = np.argpartition(keys_K, n_guess)[:n_guess]
        if weights_K[chosen].sum() >= p:
            return _cut(keys_K, weights_K, chosen, p, least)
        n_guess *= _GROWTH
    return _cut(keys_K, weights_K, np.arange(len(keys_K)), p, least)


def _cut(
    keys_K: "NDArray[np.float64]",
    weights_K: "NDArray[np.float64]",
    chosen: "NDArray[np.intp]",
    p: float,
    least: int,
) -> "NDArray[np.intp]":
    import numpy as np

    ordered = chosen[np.argsort(keys_K[chosen], kind="stable")]
    before = np.cumsum(weights_K[ordered]) - weights_K[ordered]
    n_kept = max(1, least, int(np.sum(before < p)))
    return np.sort(ordered[:n_kept])


def _softmax(scores_K: "NDArray[np.floating[Any]]") -> "NDArray[np.float64]":
    import numpy as np

    weights_K = np.exp(scores_K - scores_K.max())
    probabilities_K: NDArray[np.float64] = weights_K / weights_K.sum(dtype=np.float64)
    return probabilities_K

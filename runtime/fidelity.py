"""How faithfully one engine reproduces another's next-token distributions, on the same ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from edgekd.runtime.engine import Engine

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgekd.runtime.engine import Logits

# T tokens, V vocabulary


@dataclass(frozen=True)
class Fidelity:
    """The distance of a candidate from its reference, averaged over positions."""

    kl_nats: float
    """KL(reference || candidate)."""
    top1_agreement: float
    """Share of positions at which both find the same token likeliest."""
    n_positions: int
    perplexity_ratio: float | None = None
    """The candidate's over the reference's, on the texts themselves; None without texts."""


@dataclass(frozen=True)
class GreedyAgreement:
    """How a candidate's greedy texts look to its reference."""

    n_tokens: int
    n_equal: int
    """Tokens that the reference would have chosen as well, after the same text."""
    worst_gap_nats: float
    """By how much the reference preferred its own choice, at worst: small for a near tie."""


class Distances(NamedTuple):
    """How far a candidate is from its reference at each position."""

    kl_T: "NDArray[np.float64]"
    """KL(reference || candidate) in nats."""
    is_same_T: "NDArray[np.bool_]"
    """Whether both find the same token likeliest."""


def distances(
    reference_TV: "NDArray[np.float64]", candidate_TV: "NDArray[np.float64]"
) -> Distances:
    """Return the distances of two models that share their vocabulary, from log-probabilities."""
    is_same_T = reference_TV.argmax(-1) == candidate_TV.argmax(-1)
    return Distances(kl_per_token(reference_TV, candidate_TV), is_same_T)


def compare_engines(
    reference: Engine, candidate: Engine, sequences: Sequence[Sequence[int]]
) -> Fidelity:
    """Return how far ``candidate`` is from ``reference`` over all positions of ``sequences``."""
    import numpy as np

    found, lost_nats = [], []
    for ids in sequences:
        reference_TV = log_softmax(_fresh_logits(reference, ids))
        candidate_TV = log_softmax(_fresh_logits(candidate, ids))
        found.append(distances(reference_TV, candidate_TV))
        next_S = np.asarray(ids[1:], np.int64)
        lost_nats.append(pick(reference_TV[:-1], next_S) - pick(candidate_TV[:-1], next_S))
    kl_T, is_same_T = map(np.concatenate, zip(*found, strict=True))
    lost_S = np.concatenate(lost_nats)
    ratio = float(np.exp(lost_S.mean())) if len(lost_S) else None
    return Fidelity(float(kl_T.mean()), float(is_same_T.mean()), len(kl_T), ratio)


def compare_greedy(
    reference: Engine, candidate: Engine, prompts: Sequence[Sequence[int]], n_tokens: int
) -> GreedyAgreement:
    """Let ``candidate`` continue each prompt greedily and have ``reference`` judge every choice.

    Texts themselves part at the first near tie, however good the candidate; the choices do not.
    """
    n_equal, worst_gap_nats = 0, 0.0
    for prompt in prompts:
        chosen = _greedy(candidate, prompt, n_tokens)
        ids = [*prompt, *chosen[:-1]]
        log_p_TV = log_softmax(_fresh_logits(reference, ids))[len(prompt) - 1 :]
        for log_p_V, token_id in zip(log_p_TV, chosen, strict=True):
            gap_nats = float(log_p_V.max() - log_p_V[token_id])
            n_equal += gap_nats == 0
            worst_gap_nats = max(worst_gap_nats, gap_nats)
    return GreedyAgreement(len(prompts) * n_tokens, n_equal, worst_gap_nats)


def log_softmax(logits_TV: "NDArray[np.floating[Any]]") -> "NDArray[np.float64]":
    """Return log-probabilities in float64, so that a KL of 1e-10 is still a number."""
    import numpy as np

    shifted_TV = logits_TV.astype(np.float64)
    shifted_TV -= shifted_TV.max(-1, keepdims=True)
    shifted_TV -= np.log(np.exp(shifted_TV).sum(-1, keepdims=True))
    return shifted_TV


def kl_per_token(
    reference_TV: "NDArray[np.float64]", candidate_TV: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """Return KL(reference || candidate) in nats at each position [T], from log-probabilities."""
    import numpy as np

    kl_T: NDArray[np.float64] = (np.exp(reference_TV) * (reference_TV - candidate_TV)).sum(-1)
    return kl_T


def pick(log_p_SV: "NDArray[np.float64]", ids_S: "NDArray[np.int64]") -> "NDArray[np.float64]":
    """Return at each position the log-probability of one token [S]."""
    import numpy as np

    picked_S: NDArray[np.float64] = np.take_along_axis(log_p_SV, ids_S[:, None], 1)[:, 0]
    return picked_S


def _fresh_logits(engine: Engine, ids: Sequence[int]) -> "Logits":
    engine.rewind()
    return engine.forward(ids, every_logit=True)


def _greedy(engine: Engine, prompt: Sequence[int], n_tokens: int) -> list[int]:
    engine.rewind()
    chosen = [int(engine.forward(prompt).argmax())]
    while len(chosen) < n_tokens:
        chosen.append(int(engine.forward([chosen[-1]]).argmax()))
    return chosen

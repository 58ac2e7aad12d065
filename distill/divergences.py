"""How far the student's distribution q is from the teacher's p, and the way downhill.

Every divergence returns its value for each token and its gradient with respect to the student's
tempered logits, from log-probabilities. Most follow from the derivative d with respect to q alone,
through the softmax: g = q (d - sum(q d)).

    forward_kl       KL(p || q)                          Hinton et al. 2015
    reverse_kl       KL(q || p)                          Gu et al. 2024 (MiniLLM)
    jsd              b KL(p || m) + (1-b) KL(q || m),    m = b p + (1-b) q (GKD)
    total_variation  sum |p - q| / 2                     Wen et al. 2023
    skew_kl          KL(p || a p + (1-a) q)              Ko et al. 2024 (DistiLLM)
    skew_reverse_kl  KL(q || a p + (1-a) q)              the same
"""

from collections.abc import Callable
from math import log, log1p

import torch

from edgekd.distill.recipe import DivergenceName

# C tokens of one chunk, V common vocabulary

_Divergence = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def forward_kl(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || q) [C] and its gradient [C, V]; covers all that the teacher does."""
    p_CV = log_p_CV.exp()
    return (p_CV * (log_p_CV - log_q_CV)).sum(-1), log_q_CV.exp() - p_CV


def reverse_kl(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(q || p) [C] and its gradient [C, V]; keeps to what the teacher does most."""
    q_CV, difference_CV = log_q_CV.exp(), log_q_CV - log_p_CV
    value_C = (q_CV * difference_CV).sum(-1)
    return value_C, q_CV * (difference_CV - value_C[:, None])


def jsd(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the generalized Jensen-Shannon divergence [C] with b = ``mix`` and its gradient."""
    q_CV, p_CV = log_q_CV.exp(), log_p_CV.exp()
    log_m_CV = _log_mixture(log_p_CV, log_q_CV, mix)
    student_CV = log_q_CV - log_m_CV
    student_C = (q_CV * student_CV).sum(-1)
    teacher_C = (p_CV * (log_p_CV - log_m_CV)).sum(-1)
    grad_CV = (1 - mix) * q_CV * (student_CV - student_C[:, None])
    return mix * teacher_C + (1 - mix) * student_C, grad_CV


def total_variation(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the L1 distance [C] and its gradient [C, V]; bounded by 1."""
    q_CV = log_q_CV.exp()
    difference_CV = q_CV - log_p_CV.exp()
    return difference_CV.abs().sum(-1) / 2, _through_softmax(q_CV, difference_CV.sign() / 2)


def skew_kl(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(p || a p + (1-a) q) [C] with a = ``mix`` and its gradient [C, V]."""
    log_m_CV = _log_mixture(log_p_CV, log_q_CV, mix)
    value_C = (log_p_CV.exp() * (log_p_CV - log_m_CV)).sum(-1)
    slope_CV = -(1 - mix) * (log_p_CV - log_m_CV).exp()
    return value_C, _through_softmax(log_q_CV.exp(), slope_CV)


def skew_reverse_kl(
    log_q_CV: torch.Tensor, log_p_CV: torch.Tensor, mix: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(q || a p + (1-a) q) [C] with a = ``mix`` and its gradient [C, V]."""
    difference_CV = log_q_CV - _log_mixture(log_p_CV, log_q_CV, mix)
    q_CV = log_q_CV.exp()
    value_C = (q_CV * difference_CV).sum(-1)
    slope_CV = difference_CV - (1 - mix) * difference_CV.exp()
    return value_C, _through_softmax(q_CV, slope_CV)


DIVERGENCES: dict[DivergenceName, _Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
}
USES_MIX: frozenset[DivergenceName] = frozenset({"jsd", "skew_kl", "skew_reverse_kl"})


def _log_mixture(log_p_CV: torch.Tensor, log_q_CV: torch.Tensor, share: float) -> torch.Tensor:
    """Return log(share p + (1 - share) q)."""
    return torch.logaddexp(log_p_CV + log(share), log_q_CV + log1p(-share))


def _through_softmax(q_CV: torch.Tensor, slope_CV: torch.Tensor) -> torch.Tensor:
    return q_CV * (slope_CV - (q_CV * slope_CV).sum(-1, keepdim=True))

"""The distillation loss, without ever holding [tokens, vocabulary] for either model.

Tokens go through both heads in chunks; each chunk's logits live in a few reused buffers, and
the gradients are computed in the forward pass, where the logits still exist:

    L_n = (1 - a) T^2 KL(p_n || q_n) + a CE(q1_n, label_n),   p = softmax(t / T), q = softmax(s / T)
    dL/ds = (1 - a) T (q - p) + a (q1 - onehot)

Logits are float32 out of the matrix product: with bf16 logits the gradient of a small KL is
mostly rounding noise. T^2 keeps the gradient's size independent of T (Hinton et al. 2015); it
can be switched off, in value and gradient alike.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from edgekd.errors import RecipeError

# N tokens, C tokens of one chunk, H hidden of student or teacher, V common vocabulary

_CHUNK_BYTES = 48 << 20  # one [C, V] float32 buffer: large enough for full-speed products


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What the student is pulled towards."""

    temperature: float = 1.0
    """Softens both distributions; above 1 the teacher's small probabilities weigh more."""
    hard_label_weight: float = 0.0
    """Share of plain cross entropy: 0 is distillation alone, 1 is training without a teacher."""
    t_squared: bool = True
    """Multiply the divergence by T^2."""
    chunk_tokens: int | None = None
    """Tokens per chunk; chosen by the vocabulary's size when left out."""

    def __post_init__(self) -> None:
        """Check the ranges; all faults are reported together."""
        faults = []
        if not self.temperature > 0:
            faults.append(f"temperature {self.temperature} must be above 0")
        if not 0 <= self.hard_label_weight <= 1:
            faults.append(f"hard_label_weight {self.hard_label_weight} must lie in 0..1")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            faults.append(f"chunk_tokens {self.chunk_tokens} must be at least 1")
        if faults:
            raise RecipeError("; ".join(faults))


class LossParts(NamedTuple):
    """Sums over tokens, weighted; divide by the weight for means."""

    loss: torch.Tensor
    """The training loss; the only part with a gradient."""
    kl_nats: torch.Tensor
    """KL(teacher || student) at the given temperature; 0 where there is no teacher."""
    cross_entropy_nats: torch.Tensor
    """Cross entropy with the labels; 0 where they have no weight."""


def distillation_loss(
    student_hidden_NH: torch.Tensor,
    student_head_VH: torch.Tensor,
    teacher_hidden_NH: torch.Tensor | None,
    teacher_head_VH: torch.Tensor | None,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    options: LossOptions,
) -> LossParts:
    """Return the loss summed over N tokens, each times its weight.

    Hidden states come after the final norm [N, H]; heads are sliced to the common vocabulary
    [V, H]. Labels are the next tokens, int64 [N]. Gradients reach the student's hidden states
    and head only. Without a teacher, ``options.hard_label_weight`` must be 1.
    """
    if (teacher_hidden_NH is None or teacher_head_VH is None) and options.hard_label_weight < 1:
        raise RecipeError("without a teacher hard_label_weight must be 1")
    parts: tuple[torch.Tensor, ...] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH,
        student_head_VH,
        teacher_hidden_NH,
        teacher_head_VH,
        labels_N,
        weights_N,
        options,
    )
    return LossParts(*parts)


class _ChunkedLoss(torch.autograd.Function):
    """Computes value and gradients together; backward only scales what is ready."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_NH: torch.Tensor,
        student_head_VH: torch.Tensor,
        teacher_hidden_NH: torch.Tensor | None,
        teacher_head_VH: torch.Tensor | None,
        labels_N: torch.Tensor,
        weights_N: torch.Tensor,
        options: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(student_hidden_NH)
        head_VH = student_head_VH.to(dtype)
        teacher_VH = None if teacher_head_VH is None else teacher_head_VH.to(dtype)
        grad_hidden_NH = torch.empty_like(student_hidden_NH, dtype=dtype)
        grad_head_VH = torch.zeros_like(head_VH) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(2, dtype=torch.float64, device=head_VH.device)
        for rows in _chunks(len(labels_N), len(head_VH), options.chunk_tokens):
            hidden_CH = student_hidden_NH[rows].to(dtype)
            student_CV = hidden_CH @ head_VH.T
            teacher_CV = None
            if teacher_hidden_NH is not None and teacher_VH is not None:
                teacher_CV = teacher_hidden_NH[rows].to(dtype) @ teacher_VH.T
            grad_CV, chunk_sums = _chunk(
                student_CV, teacher_CV, labels_N[rows], weights_N[rows].to(dtype), options
            )
            sums += chunk_sums
            torch.mm(grad_CV, head_VH, out=grad_hidden_NH[rows])
            if grad_head_VH is not None:
                grad_head_VH.addmm_(grad_CV.T, hidden_CH)
        ctx.grads = grad_hidden_NH, grad_head_VH
        ctx.dtypes = student_hidden_NH.dtype, student_head_VH.dtype
        kl, cross_entropy = sums.to(dtype)
        loss = _kl_factor(options) * kl + options.hard_label_weight * cross_entropy
        ctx.mark_non_differentiable(kl, cross_entropy)
        return loss, kl, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_loss = grads[0]
        grad_hidden_NH, grad_head_VH = ctx.grads
        hidden_dtype, head_dtype = ctx.dtypes
        grad_hidden = (grad_hidden_NH * grad_loss).to(hidden_dtype)
        grad_head = None if grad_head_VH is None else grad_head_VH.mul_(grad_loss).to(head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None


def _chunk(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient [C, V] with respect to the student's logits, and [KL, CE] summed."""
    hard = options.hard_label_weight
    zero = torch.zeros((), dtype=torch.float64, device=student_CV.device)
    grad_CV: torch.Tensor | None = None
    kl = cross_entropy = zero
    if hard > 0:
        grad_CV, ce_C = _cross_entropy(student_CV, labels_C)
        cross_entropy = (ce_C * weights_C).sum(dtype=torch.float64)
        grad_CV.mul_(hard)
    if teacher_CV is not None and hard < 1:
        soft_CV, kl_C = _forward_kl(student_CV, teacher_CV, options.temperature)
        kl = (kl_C * weights_C).sum(dtype=torch.float64)
        soft_CV.mul_(_kl_factor(options) / options.temperature)
        grad_CV = soft_CV if grad_CV is None else grad_CV.add_(soft_CV)
    assert grad_CV is not None
    return grad_CV.mul_(weights_C[:, None]), torch.stack([kl, cross_entropy])


def _cross_entropy(
    student_CV: torch.Tensor, labels_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax - onehot [C, V] and the cross entropy [C]; leaves the logits alone."""
    probabilities_CV, lse_C = _softmax_and_lse(student_CV)
    index_C1 = labels_C[:, None]
    ce_C = lse_C - student_CV.gather(1, index_C1).squeeze(1)
    probabilities_CV.scatter_add_(1, index_C1, -torch.ones_like(index_C1, dtype=ce_C.dtype))
    return probabilities_CV, ce_C


def _forward_kl(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q - p [C, V] and KL(p || q) [C]; overwrites both logits."""
    if temperature != 1:
        student_CV.div_(temperature)
        teacher_CV.div_(temperature)
    q_CV, student_lse_C = _softmax_and_lse(student_CV)
    p_CV, teacher_lse_C = _softmax_and_lse(teacher_CV)
    difference_CV = teacher_CV.sub_(student_CV).mul_(p_CV)
    kl_C = difference_CV.sum(-1) - (teacher_lse_C - student_lse_C)
    return q_CV.sub_(p_CV), kl_C


def _softmax_and_lse(logits_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return softmax [C, V] and log-sum-exp [C] in one pass of exponentials.

    The likeliest token gives the second from the first: lse = logit - log(probability).
    torch.logsumexp would cost several times as much on a CPU.
    """
    probabilities_CV = logits_CV.softmax(-1)
    return probabilities_CV, logits_CV.amax(-1) - probabilities_CV.amax(-1).log()


def _kl_factor(options: LossOptions) -> float:
    scale = options.temperature**2 if options.t_squared else 1.0
    return (1 - options.hard_label_weight) * scale


def _compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return float32 for training; float64 stays, for checks against autograd."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _chunks(n_tokens: int, vocab_size: int, chunk_tokens: int | None) -> list[slice]:
    size = chunk_tokens or max(1, _CHUNK_BYTES // (4 * vocab_size))
    return [slice(start, start + size) for start in range(0, n_tokens, size)]

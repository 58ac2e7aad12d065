"""The distillation loss, without ever holding [tokens, vocabulary] for either model.

Tokens go through both heads in chunks, and the gradients are computed in the forward pass, where
the logits still exist:

    L_n = (1 - a) T^2 D(p_n, q_n) + a CE(q1_n, label_n),   p = softmax(t / T), q = softmax(s / T)
    dL/ds = (1 - a) T dD/d(s/T) + a (q1 - onehot)

D is one of edgekd.distill.divergences. T^2 keeps the gradient's size independent of T (Hinton et
al. 2015); it can be switched off, in value and gradient alike. Logits are float32 out of the
matrix product unless asked otherwise: with bf16 logits the gradient of a small KL is mostly
rounding noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from edgekd.distill.divergences import DIVERGENCES
from edgekd.distill.heads import Buffers, as_float, matmul_fp32
from edgekd.distill.loss_options import LossOptions
from edgekd.errors import RecipeError

# N tokens, C tokens of one chunk, H hidden of student or teacher, V common vocabulary, E entries

# Uncompiled, some ten temporaries of a chunk's logits come and go; small ones keep their pages.
_PLAIN_CHUNK_TOKENS = 128
_GPU_CHUNK_TOKENS = 1024
_SLAB_ROWS = 8192


class LossParts(NamedTuple):
    """Sums over tokens, weighted; divide by the weight for means."""

    loss: torch.Tensor
    """The training loss; the only part with a gradient."""
    divergence_nats: torch.Tensor
    """The divergence at the given temperature; 0 where there is no teacher."""
    cross_entropy_nats: torch.Tensor
    """Cross entropy with the labels; 0 where they have no weight."""


class Entries(NamedTuple):
    """What the gradient is at a few places of every row, where it is not what all others are.

    A place that is listed twice has the same value both times.
    """

    ids_CE: torch.Tensor
    grad_CE: torch.Tensor


class Measured(NamedTuple):
    """How far the student is from the teacher."""

    value_C: torch.Tensor
    """The divergence of each position."""
    grad_CV: torch.Tensor
    """With respect to logits / T."""
    entries: Entries | None = None
    """Replace what ``grad_CV`` says there."""


Measure = Callable[..., Measured]


class Target(Protocol):
    """Where the teacher's distribution comes from: its head, or a cache."""

    weights_N: torch.Tensor | None
    """Of each position, where they are not all 1."""
    measure: Measure
    """Takes the student's logits [C, V], what ``chunk`` returns, and the options. A module's
    function, so that it is compiled once."""

    def chunk(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return what is known of the teacher at ``rows``; products are made in ``dtype``."""

    def likeliest(self, rows: slice, options: LossOptions) -> torch.Tensor | None:
        """Return the teacher's first choice [C]; None where its token ids are not the student's."""


class OnlineTarget:
    """The teacher's own head on its hidden states [N, H]."""

    weights_N: torch.Tensor | None = None

    def __init__(self, hidden_NH: torch.Tensor, head_VH: torch.Tensor) -> None:
        """Follow a teacher whose head is sliced to the common vocabulary."""
        self.hidden_NH, self._head_VH = hidden_NH, head_VH
        self._cast_VH = head_VH
        self._buffers = Buffers()
        self.measure: Measure = measure_online

    def chunk(self, rows: slice, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Return the product [C, V] of hidden states and head."""
        if self._cast_VH.dtype != dtype:
            self._cast_VH = self._head_VH.to(dtype)
        return (self._buffers.product(self.hidden_NH[rows].to(dtype), self._cast_VH.T),)

    def likeliest(self, rows: slice, options: LossOptions) -> torch.Tensor:
        """Return the teacher's first choice [C]."""
        (product_CV,) = self.chunk(rows, _sum_dtype(self.hidden_NH))
        return (product_CV * options.teacher_shape.scale).argmax(-1)


def distillation_loss(
    student_hidden_NH: torch.Tensor,
    student_head_VH: torch.Tensor,
    target: Target | None,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    options: LossOptions,
) -> LossParts:
    """Return the loss summed over N tokens, each times its weight.

    Hidden states come after the final norm [N, H]; the head is sliced to the common vocabulary
    [V, H]. Labels are the next tokens, int64 [N]. Gradients reach the student's hidden states
    and head only. Without a target, ``options.hard_label_weight`` must be 1.
    """
    if target is None and options.hard_label_weight < 1:
        raise RecipeError("without a teacher hard_label_weight must be 1")
    task = _Task(target, labels_N, weights_N, options)
    parts: tuple[torch.Tensor, ...] = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_NH, student_head_VH, task
    )
    return LossParts(*parts)


@torch.no_grad()
def held_out_figures(
    student_hidden_NH: torch.Tensor,
    student_head_VH: torch.Tensor,
    target: Target | None,
    labels_N: torch.Tensor,
    options: LossOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return sums over N tokens: KL(p || q) at T = 1, cross entropy, equal first choices, N.

    Always the forward KL in float32, whatever is trained on, so that runs can be compared.
    Without a target, or with one of other tokens, KL and choices are NaN.
    """
    options = replace(options, divergence="forward_kl", temperature=1.0, head_precision="fp32")
    dtype = _sum_dtype(student_hidden_NH)
    head_VH = student_head_VH.to(dtype)
    sums = torch.zeros(3, dtype=torch.float64, device=head_VH.device)
    buffers = Buffers()
    for rows in _chunks(student_hidden_NH, options):
        product_CV = buffers.product(student_hidden_NH[rows].to(dtype), head_VH.T)
        student_CV = options.student_shape.shape(product_CV)
        sums[1] += F.cross_entropy(student_CV, labels_N[rows], reduction="sum")
        first_C = None if target is None else target.likeliest(rows, options)
        if target is None or first_C is None:
            sums[[0, 2]] = torch.nan
            continue
        sums[2] += (student_CV.argmax(-1) == first_C).sum()
        measured = target.measure(student_CV, *target.chunk(rows, dtype), options)
        sums[0] += measured.value_C.sum(dtype=torch.float64)
    n_positions = torch.tensor(len(labels_N), dtype=torch.float64, device=sums.device)
    return sums[0], sums[1], sums[2], n_positions


@dataclass(frozen=True)
class _Task:
    """What the loss needs and has no gradient for."""

    target: Target | None
    labels_N: torch.Tensor
    weights_N: torch.Tensor
    options: LossOptions

    def chunk(self, rows: slice, product_CV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Turn the product into its gradient, in place; return [divergence, CE] summed."""
        known: tuple[torch.Tensor, ...] = ()
        measure = None
        if self.target is not None and self.options.hard_label_weight < 1:
            known, measure = self.target.chunk(rows, dtype), self.target.measure
        labels_C, weights_C = self.labels_N[rows], self.weights_N[rows].to(_sum_dtype(product_CV))
        body = fused(_chunk_body, self.options.compiled)
        sums: torch.Tensor
        sums, entries = body(product_CV, labels_C, weights_C, known, measure, self.options)
        if entries is not None:  # outside of what is compiled, where it would copy the product
            rows_C1 = torch.arange(len(product_CV), device=product_CV.device)[:, None]
            product_CV[rows_C1, entries.ids_CE] = entries.grad_CE.to(product_CV.dtype)
        return sums


def _chunk_body(
    product_CV: torch.Tensor,
    labels_C: torch.Tensor,
    weights_C: torch.Tensor,
    known: tuple[torch.Tensor, ...],
    measure: Measure | None,
    options: LossOptions,
) -> tuple[torch.Tensor, Entries | None]:
    """Everything between the matrix products, so that a compiler can fuse it.

    Turns the product into its gradient, but for the entries that are returned with the sums.
    """
    student_CV = options.student_shape.shape(as_float(product_CV))
    zero = torch.zeros((), dtype=torch.float64, device=product_CV.device)
    sums = [zero, zero]
    grad_CV: torch.Tensor | float = 0.0
    entries = None
    if measure is not None:
        value_C, soft_CV, entries = measure(student_CV, *known, options)
        sums[0] = (value_C * weights_C).sum(dtype=torch.float64)
        scale_C1 = (weights_C * (options.soft_factor / options.temperature))[:, None]
        grad_CV = soft_CV * scale_C1
        entries = entries and Entries(entries.ids_CE, entries.grad_CE * scale_C1)
    if options.hard_label_weight > 0:
        value_C, hard_CV = _cross_entropy(student_CV, labels_C)
        sums[1] = (value_C * weights_C).sum(dtype=torch.float64)
        hard_CV = hard_CV * (weights_C * options.hard_label_weight)[:, None]
        grad_CV = grad_CV + hard_CV
        entries = entries and entries._replace(
            grad_CE=entries.grad_CE + hard_CV.gather(1, entries.ids_CE)
        )
    assert isinstance(grad_CV, torch.Tensor)
    if entries is not None:
        logits_CE = student_CV.gather(1, entries.ids_CE)
        grad_CE = options.student_shape.unshape(entries.grad_CE, logits_CE)
        entries = Entries(entries.ids_CE, grad_CE)
    product_CV.copy_(options.student_shape.unshape(grad_CV, student_CV))
    return torch.stack(sums), entries


def measure_online(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, options: LossOptions
) -> Measured:
    """Return the divergence [C] from the teacher's product, and its gradient [C, V]."""
    log_q_CV = _log_softmax(student_CV / options.temperature)
    teacher_CV = options.teacher_shape.shape(as_float(teacher_CV))
    log_p_CV = _log_softmax(teacher_CV / options.temperature)
    return Measured(*DIVERGENCES[options.divergence](log_q_CV, log_p_CV, options.mix))


def _log_softmax(logits_CV: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities; unlike torch's own, a compiler makes them anew at every use."""
    largest_C1 = logits_CV.amax(-1, keepdim=True)
    log_total_C1 = (logits_CV - largest_C1).exp().sum(-1, keepdim=True).log()
    return logits_CV - largest_C1 - log_total_C1


class _ChunkedLoss(torch.autograd.Function):
    """Computes value and gradients together; backward only scales what is ready."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden_NH: torch.Tensor, student_head_VH: torch.Tensor, task: _Task
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        options = task.options
        dtype = _sum_dtype(student_hidden_NH)
        product_dtype = _product_dtype(dtype, options)
        head_VH = student_head_VH.to(product_dtype)
        grad_hidden_NH = torch.empty_like(student_hidden_NH, dtype=dtype)
        grad_head_VH = None
        chunks = _chunks(student_hidden_NH, options)
        if ctx.needs_input_grad[1]:  # a frozen head needs none
            make = torch.empty_like if chunks else torch.zeros_like  # the first chunk fills it
            grad_head_VH = make(head_VH, dtype=dtype)
        sums = torch.zeros(2, dtype=torch.float64, device=head_VH.device)
        buffers = Buffers()
        for rows in chunks:
            hidden_CH = student_hidden_NH[rows].to(product_dtype)
            product_CV = buffers.product(hidden_CH, head_VH.T)
            sums += task.chunk(rows, product_CV, product_dtype)
            grad_CV = product_CV.to(product_dtype)  # float32 on CUDA, whatever went in
            grad_hidden_NH[rows] = matmul_fp32(grad_CV, head_VH)
            if grad_head_VH is not None:
                _add_product(grad_head_VH, grad_CV.T, hidden_CH, is_first=rows is chunks[0])
        ctx.grads = grad_hidden_NH, grad_head_VH
        ctx.dtypes = student_hidden_NH.dtype, student_head_VH.dtype
        divergence, cross_entropy = sums.to(dtype)
        loss = options.soft_factor * divergence + options.hard_label_weight * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_loss = grads[0]
        grad_hidden_NH, grad_head_VH = ctx.grads
        del ctx.grads  # what nobody else holds becomes the weight's gradient without a copy
        hidden_dtype, head_dtype = ctx.dtypes
        grad_hidden = (grad_hidden_NH * grad_loss).to(hidden_dtype)
        grad_head = None if grad_head_VH is None else grad_head_VH.mul_(grad_loss).to(head_dtype)
        return grad_hidden, grad_head, None


def _cross_entropy(
    student_CV: torch.Tensor, labels_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy [C] and softmax - onehot [C, V]."""
    log_q_CV = student_CV.log_softmax(-1)
    index_C1 = labels_C[:, None]
    grad_CV = log_q_CV.exp()
    grad_CV = grad_CV.scatter_add(1, index_C1, -torch.ones_like(index_C1, dtype=grad_CV.dtype))
    return -log_q_CV.gather(1, index_C1).squeeze(1), grad_CV


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def fused(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    """Return ``function``, compiled if asked for."""
    return _compile(function) if compiled else function


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return float32 for training; float64 stays, for checks against autograd."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _product_dtype(sum_dtype: torch.dtype, options: LossOptions) -> torch.dtype:
    return torch.bfloat16 if options.head_precision == "bf16" else sum_dtype


def _add_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, is_first: bool
) -> None:
    """Add ``left`` times ``right`` to ``total``, or put it there, in the precision of ``total``."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if is_first else 1)
        return
    for start in range(0, len(total), _SLAB_ROWS):  # the product in slabs: it is as large as a head
        slab = slice(start, start + _SLAB_ROWS)
        product = left[slab] @ right
        if is_first:
            total[slab] = product
        else:
            total[slab].add_(product)  # +=, on an index, would also copy the slab onto itself


def chunk_tokens_of(
    asked: int | None, *, compiled: bool, hidden_size: int, n_tokens: int, is_gpu: bool
) -> int:
    """Return how many of ``n_tokens`` tokens' logits exist at a time.

    On a CPU, few rows, and the products spend their time on bringing the head in; so a compiled
    chunk has about half as many rows as hidden states are wide: half the head's memory.
    """
    if asked:
        return asked
    if is_gpu:
        return _GPU_CHUNK_TOKENS
    wanted = max(_PLAIN_CHUNK_TOKENS, hidden_size // 2) if compiled else _PLAIN_CHUNK_TOKENS
    return max(1, math.ceil(n_tokens / max(1, round(n_tokens / wanted))))


def _chunks(hidden_NH: torch.Tensor, options: LossOptions) -> list[slice]:
    n_tokens, hidden_size = hidden_NH.shape
    size = chunk_tokens_of(
        options.chunk_tokens,
        compiled=options.compiled,
        hidden_size=hidden_size,
        n_tokens=n_tokens,
        is_gpu=hidden_NH.is_cuda,
    )
    return [slice(start, start + size) for start in range(0, n_tokens, size)]

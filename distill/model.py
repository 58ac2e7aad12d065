"""A student, the teacher it follows, and the loss between them, as one module.

The wrapped module's forward does everything, heads included, so that DDP and FSDP see every
weight that is used. Positions that are not learned never reach a head.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from edgekd.distill.int8_activations import round_activations
from edgekd.distill.learned_scales import LearnedScales
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.losses import (
    LossParts,
    OnlineTarget,
    Target,
    distillation_loss,
    held_out_figures,
)
from edgekd.distill.tied_embedding import is_tied, tied

# B rows, T tokens, N learned positions, H hidden, V common vocabulary

Batch = dict[str, torch.Tensor]


class Teacher(Protocol):
    """Where targets come from."""

    def target(self, batch: Batch, is_learned_BT: torch.Tensor) -> Target:
        """Return the teacher's distributions at the learned positions of ``batch``."""


class OnlineTeacher:
    """A frozen model that is run beside the student."""

    def __init__(self, model: Any, vocab_size: int, *, is_placed: bool = False) -> None:
        """Run ``model``; one that ``is_placed`` is quantized or offloaded and is not moved."""
        self.model = model.eval().requires_grad_(False)
        self._vocab_size = vocab_size
        self._is_placed = is_placed
        self._head_VH: torch.Tensor | None = None

    @torch.no_grad()
    def target(self, batch: Batch, is_learned_BT: torch.Tensor) -> Target:
        """Return the teacher's distributions at the learned positions of ``batch``."""
        hidden_BTH, head_VH = self.hidden_and_head(batch)
        return OnlineTarget(hidden_BTH[is_learned_BT], head_VH)

    @torch.no_grad()
    def hidden_and_head(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states [B, T, H] of ``batch`` and the head [V, H]."""
        device = batch["input_ids"].device
        if self._head_VH is None:
            if not self._is_placed:
                self.model.to(device)
            head = self.model.get_output_embeddings().weight[: self._vocab_size]
            self._head_VH = head.detach().to(device)
        hidden_BTH = self.model.get_decoder()(**backbone_inputs(batch)).last_hidden_state
        return hidden_BTH.to(device), self._head_VH


class HeldOut(NamedTuple):
    """Sums over the learned positions of a batch of held-out text."""

    kl_nats: torch.Tensor
    cross_entropy_nats: torch.Tensor
    n_same_top1: torch.Tensor
    n_positions: torch.Tensor


class HiddenMatching(nn.Module):
    """Pulls the student's last hidden states towards the teacher's, through a learned projection.

    For students carved out of their teacher (TinyBERT, Jiao et al. 2020). The projection is trained
    and thrown away.
    """

    def __init__(self, student_size: int, teacher_size: int, weight: float) -> None:
        """Add the squared distance, per channel and times ``weight``, to the loss."""
        super().__init__()
        self.projection = nn.Linear(student_size, teacher_size, bias=False)
        nn.init.eye_(self.projection.weight)
        self._weight = weight

    def forward(self, student_NH: torch.Tensor, teacher_NH: torch.Tensor) -> torch.Tensor:
        """Return the distance summed over N positions, relative to the teacher's own size."""
        teacher_NH = teacher_NH.float()
        difference_NH = self.projection(student_NH.float()) - teacher_NH
        scale = teacher_NH.square().mean().clamp(min=1e-6)
        distance: torch.Tensor = difference_NH.square().mean(-1).sum() / scale
        return self._weight * distance


class DistillModel(nn.Module):
    """The student as the only part that is trained and saved."""

    def __init__(
        self,
        student: Any,
        teacher: Teacher | None,
        vocab_size: int,
        options: LossOptions,
        dtype: torch.dtype,
        matching: HiddenMatching | None = None,
    ) -> None:
        """Train ``student``, whose backbone computes in ``dtype``, to follow ``teacher``."""
        super().__init__()
        self.matching = matching
        self.student = student
        self.options = options
        self._teacher = (teacher,)  # in a tuple: no submodule, so neither trained nor saved
        self._vocab_size = vocab_size
        self.dtype = dtype
        self.learned_scales: LearnedScales | None = None
        self.rounds_hidden = False
        """Whether the head sees int8 hidden states, as it does on the device."""

    def forward(self, is_held_out: bool = False, **batch: torch.Tensor) -> LossParts | HeldOut:
        """Return the summed loss over all learned positions of ``batch``, or its figures."""
        labels_BT = batch["shift_labels"]
        is_learned_BT = labels_BT != -100
        device = labels_BT.device.type
        hidden_BTH, head_VH = self._hidden_and_head(batch, device)
        student_NH, labels_N = hidden_BTH[is_learned_BT], labels_BT[is_learned_BT]
        teacher = self._teacher[0]
        target = None if teacher is None else teacher.target(batch, is_learned_BT)
        with torch.autocast(device, enabled=False):
            seen_NH = round_activations(student_NH) if self.rounds_hidden else student_NH
            if is_held_out:
                figures = held_out_figures(seen_NH, head_VH, target, labels_N, self.options)
                return HeldOut(*figures)
            weights_N = None if target is None else target.weights_N
            if weights_N is None:
                weights_N = torch.ones(len(labels_N), device=labels_N.device)
            parts = distillation_loss(seen_NH, head_VH, target, labels_N, weights_N, self.options)
            if self.matching is None or not isinstance(target, OnlineTarget):
                return parts
            return parts._replace(loss=parts.loss + self.matching(student_NH, target.hidden_NH))

    def _hidden_and_head(self, batch: Batch, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's hidden states [B, T, H] of ``batch``, and its head [V, H]."""
        head: AbstractContextManager[torch.Tensor] = nullcontext(
            self.student.get_output_embeddings().weight
        )
        if torch.is_grad_enabled() and is_tied(self.student):
            head = tied(self.student.get_input_embeddings(), batch["input_ids"])
        autocast = torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)
        with head as head_VH, autocast:
            decoder = self.student.get_decoder()
            hidden_BTH = decoder(**backbone_inputs(batch)).last_hidden_state
        if len(head_VH) > self._vocab_size:  # a slice's gradient is a copy of the whole head
            head_VH = head_VH[: self._vocab_size]
        return hidden_BTH, head_VH

    def learn_scales(self, scales: LearnedScales) -> None:
        """Train ``scales`` too. Their gradients are made after backward, out of DDP's sight."""
        self.learned_scales = scales
        names = [f"learned_scales.{name}" for name, _ in scales.named_parameters()]
        self._ddp_params_and_buffers_to_ignore = names

    def use_head_precision(self, precision: str) -> None:
        """Compute the products with the heads in ``precision`` from now on."""
        self.options = replace(self.options, head_precision=precision)  # type: ignore[arg-type]


def backbone_inputs(batch: Batch) -> dict[str, Any]:
    """Return what a decoder of transformers takes, for packed rows."""
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": document_mask(batch["segment_ids"]),
        "use_cache": False,
    }


def document_mask(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the bool attention mask [B, 1, T, T]: causal, and never across documents."""
    n_tokens = segment_ids_BT.shape[1]
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TT = torch.ones(
        n_tokens, n_tokens, dtype=torch.bool, device=segment_ids_BT.device
    ).tril()
    return (same_BTT & causal_TT)[:, None]

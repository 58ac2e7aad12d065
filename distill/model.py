"""A student, the teacher it follows, and the loss between them, as one module.

The wrapped module's forward does everything, heads included, so that DDP and FSDP see every
weight that is used. Positions that are not learned never reach a head.
"""

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from edgekd.distill.losses import (
    LossOptions,
    LossParts,
    OnlineTarget,
    Target,
    distillation_loss,
    held_out_figures,
)

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
        device = is_learned_BT.device
        if self._head_VH is None:
            if not self._is_placed:
                self.model.to(device)
            head = self.model.get_output_embeddings().weight[: self._vocab_size]
            self._head_VH = head.detach().to(device)
        hidden_BTH = self.model.get_decoder()(**backbone_inputs(batch)).last_hidden_state
        return OnlineTarget(hidden_BTH[is_learned_BT].to(device), self._head_VH)


class HeldOut(NamedTuple):
    """Sums over the learned positions of a batch of held-out text."""

    kl_nats: torch.Tensor
    cross_entropy_nats: torch.Tensor
    n_same_top1: torch.Tensor
    n_positions: torch.Tensor


class DistillModel(nn.Module):
    """The student as the only part that is trained and saved."""

    def __init__(
        self,
        student: Any,
        teacher: Teacher | None,
        vocab_size: int,
        options: LossOptions,
        dtype: torch.dtype,
    ) -> None:
        """Train ``student``, whose backbone computes in ``dtype``, to follow ``teacher``."""
        super().__init__()
        self.student = student
        self.options = options
        self._teacher = (teacher,)  # in a tuple: no submodule, so neither trained nor saved
        self._vocab_size = vocab_size
        self.dtype = dtype

    def forward(self, is_held_out: bool = False, **batch: torch.Tensor) -> LossParts | HeldOut:
        """Return the summed loss over all learned positions of ``batch``, or its figures."""
        labels_BT = batch["shift_labels"]
        is_learned_BT = labels_BT != -100
        device = labels_BT.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            hidden_BTH = self.student.get_decoder()(**backbone_inputs(batch)).last_hidden_state
        student_NH, labels_N = hidden_BTH[is_learned_BT], labels_BT[is_learned_BT]
        teacher = self._teacher[0]
        target = None if teacher is None else teacher.target(batch, is_learned_BT)
        head_VH = self.student.get_output_embeddings().weight[: self._vocab_size]
        with torch.autocast(device, enabled=False):
            if is_held_out:
                figures = held_out_figures(student_NH, head_VH, target, labels_N, self.options)
                return HeldOut(*figures)
            weights_N = torch.ones(len(labels_N), device=labels_N.device)
            return distillation_loss(student_NH, head_VH, target, labels_N, weights_N, self.options)

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


def compile_layers(model: Any) -> None:
    """Compile each decoder layer of ``model``: one compilation serves all of them.

    Recomputing a tenth of what a layer would keep for its backward costs next to no time and a
    third of its memory: benchmarks/results/distill_vs_trl.json.
    """
    torch._functorch.config.activation_memory_budget = 0.9
    for layer in model.get_decoder().layers:
        layer.compile()

"""The training loop: transformers' Trainer, with our model, loss and grid inside.

The wrapped module's forward does everything, heads included, so that DDP and FSDP see every
weight that is used.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback

from edgekd.distill.data import Row
from edgekd.distill.losses import LossOptions, LossParts, distillation_loss
from edgekd.export.blocks import GridName, fake_quantize

# B rows, T tokens, N learned positions, H hidden, V common vocabulary

_COMPLETE = "complete.json"


class DistillModel(nn.Module):
    """A student, the teacher it follows, and the loss between them."""

    def __init__(
        self,
        student: Any,
        teacher: Any | None,
        vocab_size: int,
        options: LossOptions,
        dtype: torch.dtype,
    ) -> None:
        """Hold ``student`` as the only trained part; ``dtype`` is that of its backbone's sums."""
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple: no submodule, so neither trained nor saved
        self._vocab_size = vocab_size
        self._options = options
        self._dtype = dtype
        head = None if teacher is None else teacher.get_output_embeddings().weight[:vocab_size]
        self._teacher_head_VH = None if head is None else head.detach().float()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        labels: torch.Tensor,
        shift_labels: torch.Tensor,
    ) -> LossParts:
        """Return the summed loss over all learned positions of the batch."""
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": document_mask(segment_ids),
            "use_cache": False,
        }
        is_learned_BT = shift_labels != -100
        device = input_ids.device.type
        with torch.autocast(device, self._dtype, enabled=self._dtype != torch.float32):
            student_NH = self.student.get_decoder()(**batch).last_hidden_state[is_learned_BT]
        teacher_NH = self._teacher_hidden(batch, is_learned_BT)
        head_VH = self.student.get_output_embeddings().weight[: self._vocab_size]
        with torch.autocast(device, enabled=False):
            return distillation_loss(
                student_NH,
                head_VH,
                teacher_NH,
                self._teacher_head_VH,
                shift_labels[is_learned_BT],
                torch.ones(len(student_NH), device=input_ids.device),
                self._options,
            )

    def _teacher_hidden(
        self, batch: dict[str, Any], is_learned_BT: torch.Tensor
    ) -> torch.Tensor | None:
        teacher = self._teacher[0]
        if teacher is None:
            return None
        with torch.no_grad():
            hidden: torch.Tensor = teacher.get_decoder()(**batch).last_hidden_state[is_learned_BT]
        return hidden


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trainer that logs the KL and saves the student as a plain checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Pass everything on to Trainer."""
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the window's token count
        self._sums = torch.zeros(3, dtype=torch.float64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss per learned token of the whole optimizer window."""
        parts: LossParts = model(**inputs)
        n_learned = (inputs["shift_labels"] != -100).sum()
        self._sums += (
            torch.stack([parts.kl_nats.detach(), parts.cross_entropy_nats.detach(), n_learned])
            .double()
            .cpu()
        )
        denominator = n_learned if num_items_in_batch is None else num_items_in_batch
        loss = parts.loss / denominator
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages what should be summed
        return (loss, parts) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add KL and cross entropy per token since the last log."""
        kl, cross_entropy, n_tokens = self._sums.tolist()
        if n_tokens and "loss" in logs:
            logs |= {"kl_nats": kl / n_tokens, "cross_entropy_nats": cross_entropy / n_tokens}
            logs["tokens"] = n_tokens
            self._sums.zero_()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.accelerator.unwrap_model(self.model).student.save_pretrained(
            output_dir or self.args.output_dir, max_shard_size="1000GB"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        student = self.accelerator.unwrap_model(model or self.model).student
        missing, unexpected = student.load_state_dict(weights, strict=False)
        tied = {"lm_head.weight"}
        assert not unexpected and set(missing) <= tied, (missing, unexpected)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (folder / _COMPLETE).write_text(json.dumps({"step": self.state.global_step}))


class GridCallback(TrainerCallback):  # type: ignore[misc]
    """Trains on the grid that ships: rounded weights in forward and backward, exact masters.

    The straight-through estimator in its plainest form: the gradient of the rounded weight is
    applied to the weight it was rounded from. Rounding happens once per optimizer step.
    """

    def __init__(self, student: Any, grids: dict[str, GridName]) -> None:
        """Round the parameters of ``student`` that ``grids`` names."""
        parameters = dict(student.named_parameters())
        self._parameters = [(parameters[name], grid) for name, grid in grids.items()]
        self._masters: list[torch.Tensor] = []

    @torch.no_grad()
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Put rounded weights in place."""
        self._masters = [parameter.clone() for parameter, _ in self._parameters]
        for parameter, grid in self._parameters:
            parameter.copy_(fake_quantize(parameter, grid))

    @torch.no_grad()
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Put the masters back, for the optimizer to move."""
        for (parameter, _), master in zip(self._parameters, self._masters, strict=True):
            parameter.copy_(master)
        self._masters = []


def document_mask(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the bool attention mask [B, 1, T, T]: causal, and never across documents."""
    n_tokens = segment_ids_BT.shape[1]
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TT = torch.ones(
        n_tokens, n_tokens, dtype=torch.bool, device=segment_ids_BT.device
    ).tril()
    return (same_BTT & causal_TT)[:, None]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return ``rows`` as the batch that :class:`DistillModel` takes."""
    labels = torch.tensor([row.labels for row in rows])
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "position_ids": torch.tensor([row.positions for row in rows]),
        "segment_ids": torch.tensor([row.segments for row in rows]),
        "labels": labels,  # Trainer looks for this name to count, and counts the next one
        "shift_labels": labels,
    }


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in ``folder`` that was written to its end."""
    complete = folder.glob(f"checkpoint-*/{_COMPLETE}")
    steps = {json.loads(path.read_text())["step"]: path.parent for path in complete}
    return steps[max(steps)] if steps else None

"""The training loop: transformers' Trainer, with our model, loss and grid inside."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from edgekd.distill.grid import GridCallback
from edgekd.distill.losses import LossParts
from edgekd.distill.model import HeldOut
from edgekd.distill.on_policy import StudentWriter, n_learned
from edgekd.distill.packing import Row

_COMPLETE = "complete.json"
_WEIGHTS = "trained.safetensors"
_PREFIX = "student."
_N_WRITTEN_ROWS = 4


class DistillTrainer(Trainer):  # type: ignore[misc]
    """Trainer that logs the divergence, measures held-out text and saves what is trained."""

    def __init__(self, *args: Any, writer: StudentWriter | None = None, **kwargs: Any) -> None:
        """Pass everything on to Trainer; with a ``writer`` the student writes some of the data."""
        super().__init__(*args, **kwargs)
        self.writer = writer
        self.grid: GridCallback | None = None
        """What rounds the student, also where it is measured or writes."""
        self.heads: HeadPrecisionCallback | None = None
        """What moves the heads to float32, where that is asked for."""
        self.model_accepts_loss_kwargs = True  # the loss is divided by the window's token count
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._n_written = 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss per learned token of the whole optimizer window, all ranks together."""
        parts: LossParts = model(**inputs)
        n_tokens = (inputs["shift_labels"] != -100).sum()
        sums = [parts.divergence_nats.detach(), parts.cross_entropy_nats.detach(), n_tokens]
        self._sums += torch.stack(sums).double().cpu()
        denominator = n_tokens if num_items_in_batch is None else num_items_in_batch
        loss = parts.loss / denominator
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            loss = loss * self.accelerator.num_processes  # DDP averages what should be summed
        return (loss, parts) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of one optimizer step, some written by the student, and their size."""
        batches, n_items = super().get_batch_samples(*args, **kwargs)
        if self.writer is None or not batches:
            return batches, n_items
        batches = [self._perhaps_written(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, self.args.device)

    def _perhaps_written(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert self.writer is not None
        is_due = self.writer.is_due()
        if is_due:
            student = self.accelerator.unwrap_model(self.model_wrapped).student
            with self._on_grid(), self._autocast():
                rows = self.writer.write(student, batch["row_numbers"].tolist())
            batch = collate(rows)
        n_tokens = n_learned(batch)
        self.writer.count(n_tokens, is_written=is_due)
        self._n_written += n_tokens if is_due else 0
        return batch

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add divergence and cross entropy per token since the last log, over all ranks."""
        if "loss" in logs:
            sums = torch.tensor([*self._sums, self._n_written], dtype=torch.float64)
            total = self.accelerator.reduce(sums.to(self.args.device), "sum")
            divergence, cross_entropy, n_tokens, n_written = total.tolist()
            self._sums.zero_()
            self._n_written = 0.0
            if n_tokens:
                logs["divergence_nats"] = divergence / n_tokens
                logs["cross_entropy_nats"] = cross_entropy / n_tokens
                logs["tokens"] = n_tokens
                if self.writer is not None:
                    logs["written_tokens"] = n_written
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return perplexity, KL to the teacher and top-1 agreement on the held-out rows."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with self._on_grid():
            for inputs in self.get_eval_dataloader(eval_dataset):
                figures: HeldOut = model(is_held_out=True, **self._prepare_inputs(inputs))
                total += torch.stack(list(figures)).double()
        model.train()
        kl, cross_entropy, n_same, n = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_perplexity": math.exp(cross_entropy / n)}
        if not math.isnan(kl):  # there is a teacher, and its tokens are the student's
            metrics[f"{metric_key_prefix}_kl_nats"] = kl / n
            metrics[f"{metric_key_prefix}_top1_agreement"] = n_same / n
        if self.writer is not None:
            metrics[f"{metric_key_prefix}_reverse_kl_nats"] = self._written_reverse_kl()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _written_reverse_kl(self) -> float:
        """Return KL(student || teacher) per token on what the student writes for held-out prompts.

        The same random numbers each time, and none of them taken from training.
        """
        assert self.writer is not None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        numbers = [row.number for row in self.eval_dataset][:_N_WRITTEN_ROWS]
        before = model.options
        with self._on_grid():
            with torch.random.fork_rng(), self._autocast():
                torch.manual_seed(self.args.seed)
                rows = self.writer.write(model.student, numbers)
            model.options = replace(
                before, divergence="reverse_kl", temperature=1.0, hard_label_weight=0.0
            )
            parts = model(**self._prepare_inputs(collate(rows)))
        model.options = before
        return float(parts.divergence_nats) / n_learned(collate(rows))

    def _on_grid(self) -> AbstractContextManager[None]:
        return self.grid.rounded() if self.grid else nullcontext()

    def _autocast(self) -> Any:
        dtype = self.accelerator.unwrap_model(self.model_wrapped).dtype
        return torch.autocast(self.args.device.type, dtype, enabled=dtype != torch.float32)

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that are trained, gathered from all ranks.

        Every rank must call it.
        """
        state = self.accelerator.get_state_dict(self.model_wrapped)
        wanted = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        return {
            name: weight.detach().cpu().contiguous()
            for name, weight in state.items()
            if name in wanted
        }

    def student_weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights of the student, under its own names; call it on every rank."""
        return {
            name.removeprefix(_PREFIX): weight
            for name, weight in self.trained_weights().items()
            if name.startswith(_PREFIX)
        }

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.trained_weights(), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained(self.model, folder)
        self._restore(json.loads((folder / _COMPLETE).read_text()))

    def _load_best_model(self) -> None:
        load_trained(self.model, Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        kept = self._kept()
        if self.args.should_save:
            (folder / _COMPLETE).write_text(json.dumps(kept))

    def _kept(self) -> dict[str, Any]:
        """Return what a resumed run must know and transformers does not save; call on every rank.

        It could restore the state of callbacks, but only of those that are made of plain values.
        """
        kept: dict[str, Any] = {"step": self.state.global_step}
        if self.heads is not None:
            kept["heads"] = self.heads.kept()
        if self.writer is not None:
            counts = torch.tensor([[self.writer.n_written, self.writer.n_learned]])
            kept["written_of_learned"] = self.accelerator.gather(
                counts.to(self.args.device)
            ).tolist()
        for stopping in self._early_stopping():
            kept["evaluations_without_gain"] = stopping.early_stopping_patience_counter
        return kept

    def _restore(self, kept: dict[str, Any]) -> None:
        """Go on from what :meth:`_kept` has returned, perhaps with other ranks."""
        if self.heads is not None and "heads" in kept:
            self.heads.restore(**kept["heads"])
        if self.writer is not None and (counts := kept.get("written_of_learned")):
            own = counts[self.args.process_index % len(counts)]
            self.writer.n_written, self.writer.n_learned = own
        for stopping in self._early_stopping():
            stopping.early_stopping_patience_counter = kept.get("evaluations_without_gain", 0)

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        callbacks = self.callback_handler.callbacks
        return [found for found in callbacks if isinstance(found, EarlyStoppingCallback)]


class HeadPrecisionCallback(TrainerCallback):  # type: ignore[misc]
    """Moves the heads from bf16 to float32 once the divergence is small, for good.

    Near convergence a bf16 logit's rounding drowns the gradient: benchmarks/head_precision.py.
    """

    def __init__(self, model: Any, threshold_nats: float) -> None:
        """Watch the logged divergence of ``model``, averaged over some twenty steps."""
        self._model = model
        self._threshold_nats = threshold_nats
        self._mean_nats: float | None = None
        self._has_switched = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Switch where the mean has fallen below the threshold."""
        if not logs or "divergence_nats" not in logs:
            return
        found = logs["divergence_nats"]
        before = found if self._mean_nats is None else self._mean_nats
        self._mean_nats = before + (found - before) / 20
        if self._mean_nats < self._threshold_nats:
            self._switch()

    def kept(self) -> dict[str, Any]:
        """Return what :meth:`restore` takes."""
        return {"mean_nats": self._mean_nats, "has_switched": self._has_switched}

    def restore(self, mean_nats: float | None, has_switched: bool) -> None:
        """Go on from a checkpoint."""
        self._mean_nats = mean_nats
        if has_switched:
            self._switch()

    def _switch(self) -> None:
        self._has_switched = True
        self._model.use_head_precision("fp32")


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Return ``rows`` as the batch that :class:`edgekd.distill.model.DistillModel` takes."""
    labels = torch.tensor([row.labels for row in rows])
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "position_ids": torch.tensor([row.positions for row in rows]),
        "segment_ids": torch.tensor([row.segments for row in rows]),
        "row_numbers": torch.tensor([row.number for row in rows]),
        "labels": labels,  # Trainer looks for this name to count, and counts the next one
        "shift_labels": labels,
    }


def load_trained(model: nn.Module, folder: Path) -> None:
    """Put the trained weights of the checkpoint in ``folder`` into ``model``."""
    weights = load_file(folder / _WEIGHTS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert weights.keys() == parameters.keys(), weights.keys() ^ parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in ``folder`` that was written to its end."""
    complete = folder.glob(f"checkpoint-*/{_COMPLETE}")
    steps = {json.loads(path.read_text())["step"]: path.parent for path in complete}
    return steps[max(steps)] if steps else None


@contextmanager
def dropping_incomplete_checkpoints(folder: Path) -> Iterator[None]:
    """Leave in ``folder`` only what can be resumed from when the block fails."""
    try:
        yield
    except BaseException:
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / _COMPLETE).is_file():
                shutil.rmtree(checkpoint, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # where nothing is left
        raise

"""``edgekd distill``: a student that follows its teacher's whole distribution.

Teacher and student run side by side; the result is a plain checkpoint with float32 masters, the
resolved recipe, the training log and a manifest.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from edgekd.distill.data import pack, read_documents
from edgekd.distill.losses import LossOptions
from edgekd.distill.prune import copy_tokenizer
from edgekd.distill.recipe import Job, Recipe, write_recipe
from edgekd.distill.trainer import (
    DistillModel,
    DistillTrainer,
    GridCallback,
    collate,
    last_complete_checkpoint,
)
from edgekd.distill.vocabulary import common_vocabulary, vocabulary_sha256
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.export_model import as_checkpoint
from edgekd.export.plan import make_plan
from edgekd.files import atomic_folder, disk_errors
from edgekd.manifest import NAME, Manifest, describe_files, write_manifest
from edgekd.progress import Advance, Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm


def distill(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    revision: str | None = None,
    student_revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the student of ``job`` to follow its teacher and write it to ``out``.

    Raises:
        ModelError: a model cannot be read.
        VocabularyError: the two do not share their tokens.
        DataError: the data is missing, empty or malformed.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    progress = progress or Silence()
    with (
        as_checkpoint(job.teacher, revision) as master,
        as_checkpoint(job.student, student_revision) as pupil,
    ):
        tokenizer = FileTokenizer(pupil.folder)
        vocab_size = common_vocabulary(tokenizer, FileTokenizer(master.folder))
        documents = read_documents(job.data, tokenizer, read_chat_template(pupil.folder))
        rows = pack(documents, job.recipe.row_tokens)
        progress.say(f"{len(documents)} documents, {len(rows)} rows of {job.recipe.row_tokens}")
        work = out.with_name(f".{out.name}.checkpoints")
        trainer = _make_trainer(pupil, master, vocab_size, rows, work, job.recipe)
        _train(trainer, _resume_point(work, resume, progress), out, work, progress)
        log = trainer.state.log_history
        with atomic_folder(out) as partial:
            trainer.model.student.save_pretrained(partial)
            copy_tokenizer(pupil.folder, partial)
            _write_log(partial / "training_log.jsonl", log)
            write_recipe(partial / "recipe.toml", job)
            write_manifest(partial / NAME, _manifest(partial, master, pupil, tokenizer, job.recipe))
        shutil.rmtree(work, ignore_errors=True)
    return {
        "path": str(out),
        "steps": trainer.state.global_step,
        "fastest_step_s": _fastest_step_s(log),
        "last": _last_figures(log),
    }


def backbone_dtype(precision: str) -> torch.dtype:
    """Return bfloat16 where it is asked for, or where the processor multiplies it natively."""
    if precision == "auto":
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        has_bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else native
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _make_trainer(
    pupil: Checkpoint,
    master: Checkpoint,
    vocab_size: int,
    rows: list[Any],
    work: Path,
    recipe: Recipe,
) -> DistillTrainer:
    torch.manual_seed(recipe.seed)
    dtype = backbone_dtype(recipe.precision)
    student = load_causal_lm(pupil.folder, torch.float32)
    teacher = None
    if recipe.hard_label_weight < 1:
        teacher = load_causal_lm(master.folder, dtype).eval().requires_grad_(False)
    options = LossOptions(
        temperature=recipe.temperature, hard_label_weight=recipe.hard_label_weight
    )
    model = DistillModel(student, teacher, vocab_size, options, dtype)
    callbacks: list[TrainerCallback] = []
    if recipe.grid != "none":
        callbacks.append(GridCallback(student, make_plan(pupil, recipe.grid).grids()))
    trainer = DistillTrainer(
        model=model,
        args=_training_arguments(work, recipe),
        train_dataset=rows,
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(work: Path, recipe: Recipe) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows_per_step,
        gradient_accumulation_steps=recipe.accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _train(
    trainer: DistillTrainer, resume_from: str | None, out: Path, work: Path, progress: Progress
) -> None:
    """Run the training loop; ``work`` holds its checkpoints."""
    with (
        disk_errors(out, work),
        progress.track("step", trainer.args.max_steps) as advance,
        _reporting(trainer, advance),
    ):
        trainer.train(resume_from_checkpoint=resume_from)


@contextmanager
def _reporting(trainer: DistillTrainer, advance: Advance) -> Iterator[None]:
    callback = _Report(advance)
    trainer.add_callback(callback)
    yield
    trainer.remove_callback(callback)


def _resume_point(work: Path, resume: bool, progress: Progress) -> str | None:
    found = last_complete_checkpoint(work) if resume else None
    if resume:
        progress.say(f"resuming from {found.name}" if found else "nothing to resume; starting anew")
    elif work.exists():
        shutil.rmtree(work)
    return str(found) if found else None


def _manifest(
    folder: Path, master: Checkpoint, pupil: Checkpoint, tokenizer: FileTokenizer, recipe: Recipe
) -> Manifest:
    sources = [
        {"role": role, "name": source.folder.name, "weights_sha256": source.weights_sha256()}
        for role, source in (("teacher", master), ("student", pupil))
    ]
    return Manifest(
        kind="checkpoint",
        files=describe_files(path for path in folder.iterdir() if path.is_file()),
        made_from=sources,
        recipe={
            "verb": "distill",
            **asdict(recipe),
            "vocabulary_sha256": vocabulary_sha256(tokenizer),
        },
        licence=read_licence(pupil.folder) or read_licence(master.folder),
    )


def _write_log(path: Path, log: list[dict[str, Any]]) -> None:
    lines = [json.dumps(entry) for entry in log if "loss" in entry]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _last_figures(log: list[dict[str, Any]]) -> dict[str, Any]:
    return next((entry for entry in reversed(log) if "loss" in entry), {})


def _fastest_step_s(log: list[dict[str, Any]]) -> float | None:
    """Return the shortest time between two steps of one run; None where there was one step."""
    ends_s = [entry["elapsed_s"] for entry in log if "elapsed_s" in entry]
    gaps_s = [after - before for before, after in pairwise(ends_s) if after > before]
    return min(gaps_s, default=None)


class _Report(TrainerCallback):  # type: ignore[misc]
    """Reports step, loss, KL and rate, once per log, and notes the time of each step."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._start_s = 0.0
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_s = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self._tokens += logs["tokens"]
        elapsed_s = time.monotonic() - self._start_s
        state.log_history[-1]["elapsed_s"] = elapsed_s
        self._advance(
            state.global_step,
            f"loss {logs['loss']:.4f}  kl {logs['kl_nats']:.4f}  "
            f"{self._tokens / elapsed_s:.0f} tokens/s",
        )

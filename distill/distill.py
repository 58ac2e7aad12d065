"""``edgekd distill``: a student that follows its teacher's whole distribution.

Teacher and student run side by side; the result is a plain checkpoint with float32 masters, the
resolved recipe, the training log and a manifest.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from edgekd.distill.data import pack, read_documents
from edgekd.distill.losses import LossOptions
from edgekd.distill.prune import copy_tokenizer
from edgekd.distill.trainer import (
    DistillModel,
    DistillTrainer,
    GridCallback,
    collate,
    last_complete_checkpoint,
)
from edgekd.distill.vocabulary import common_vocabulary, vocabulary_sha256
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.export_model import as_checkpoint
from edgekd.export.plan import make_plan
from edgekd.files import atomic_folder
from edgekd.manifest import NAME, Manifest, describe_files, write_manifest
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import load_causal_lm
from edgekd.units import format_duration


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every setting of a run."""

    max_steps: int = 100
    row_tokens: int = 512
    rows_per_step: int = 2
    """Rows in one forward pass."""
    accumulation_steps: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 5
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    grid: Literal["none", "q4_0"] = "none"
    """Train on the rounded weights that ``export --quant q4_0`` writes."""
    save_steps: int = 50
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the backbones; heads and loss are always float32."""

    def __post_init__(self) -> None:
        """Check the ranges; all faults are reported together."""
        counts = ("max_steps", "rows_per_step", "accumulation_steps", "save_steps")
        faults = [
            f"{name} {getattr(self, name)} is below 1" for name in counts if getattr(self, name) < 1
        ]
        if self.row_tokens < 2:
            faults.append(f"row_tokens {self.row_tokens} is below 2")
        if not self.learning_rate > 0:
            faults.append(f"learning_rate {self.learning_rate} must be above 0")
        for name, allowed in (("grid", ("none", "q4_0")), ("precision", ("auto", "bf16", "fp32"))):
            if getattr(self, name) not in allowed:
                faults.append(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if faults:
            raise RecipeError("; ".join(faults))


def distill(
    teacher: str,
    student: str,
    data: list[str],
    out: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    revision: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train ``student`` to follow ``teacher`` on ``data`` and write it to ``out``.

    Raises:
        ModelError: a model cannot be read.
        VocabularyError: the two do not share their tokens.
        DataError: the data is missing, empty or malformed.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    with as_checkpoint(teacher, revision) as master, as_checkpoint(student) as pupil:
        tokenizer = FileTokenizer(pupil.folder)
        vocab_size = common_vocabulary(tokenizer, FileTokenizer(master.folder))
        documents = read_documents(data, tokenizer, read_chat_template(pupil.folder))
        rows = pack(documents, recipe.row_tokens)
        say(f"{len(documents)} documents in {len(rows)} rows of {recipe.row_tokens} tokens")
        work = out.with_name(f".{out.name}.checkpoints")
        trainer = _make_trainer(pupil, master, vocab_size, rows, work, recipe, say)
        trainer.train(resume_from_checkpoint=_resume_point(work, resume, say))
        log = trainer.state.log_history
        with atomic_folder(out) as partial:
            trainer.model.student.save_pretrained(partial)
            copy_tokenizer(pupil.folder, partial)
            _write_log(partial / "training_log.jsonl", log)
            write_manifest(partial / NAME, _manifest(partial, master, pupil, tokenizer, recipe))
        shutil.rmtree(work, ignore_errors=True)
    return {"path": str(out), "steps": trainer.state.global_step, "last": _last_figures(log)}


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
    say: Callable[[str], None],
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
    callbacks: list[TrainerCallback] = [_Progress(say)]
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
        max_steps=recipe.max_steps,
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


def _resume_point(work: Path, resume: bool, say: Callable[[str], None]) -> str | None:
    found = last_complete_checkpoint(work) if resume else None
    if resume:
        say(f"resuming from {found.name}" if found else "nothing to resume; starting anew")
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


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Says step, loss, KL, rate and time left, once per log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._start_s = 0.0
        self._first_step = 0
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start_s = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self._tokens += logs["tokens"]
        elapsed_s = time.monotonic() - self._start_s
        done = state.global_step - self._first_step
        left_s = elapsed_s / done * (state.max_steps - state.global_step)
        self._say(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
            f"kl {logs['kl_nats']:.4f}  {self._tokens / elapsed_s:.0f} tokens/s  "
            f"{format_duration(left_s)} left"
        )

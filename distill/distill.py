"""``edgekd distill``: a student that follows its teacher's whole distribution.

Teacher and student run side by side, or the teacher comes out of a cache. The result is a plain
checkpoint with float32 masters, the resolved recipe, the training log, its curve, a model card and
a manifest.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from edgekd.distill.cache_format import LogitCache
from edgekd.distill.cached_teacher import CachedTeacher, check_recipe, check_vocabulary
from edgekd.distill.cross_tokenizer import CrossTeacher
from edgekd.distill.data import Document, read_documents
from edgekd.distill.heads import HeadShape, head_shape
from edgekd.distill.load_models import (
    backbone_dtype,
    load_student,
    load_teacher,
    what_to_compile,
)
from edgekd.distill.losses import LossOptions
from edgekd.distill.model import (
    DistillModel,
    HiddenMatching,
    OnlineTeacher,
    Teacher,
    compile_layers,
)
from edgekd.distill.on_policy import StudentWriter
from edgekd.distill.packing import Row, cut, pack
from edgekd.distill.preflight import (
    Machine,
    Plan,
    check_fits,
    named_machine,
    plan_run,
    this_machine,
)
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.save import Lineage, save_student, source_of
from edgekd.distill.trainer import (
    DistillTrainer,
    GridCallback,
    HeadPrecisionCallback,
    collate,
    last_complete_checkpoint,
)
from edgekd.distill.training_log import Report, fastest_step_s, last_figures
from edgekd.distill.vocabulary import common_vocabulary, vocabulary_size
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.export_model import as_checkpoint
from edgekd.export.plan import make_plan
from edgekd.files import disk_errors
from edgekd.progress import Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer

# Below this divergence bf16 heads change the gradient by a tenth and more:
# benchmarks/results/head_precision.json.
BF16_HEADS_ABOVE_NATS = 0.1
COLD_START_NATS = 2.0
_COLD_START_ROWS = 4


@dataclass(frozen=True)
class _Text:
    """What is trained on, and what is held out."""

    samples: list[Document]
    rows: list[Row]
    held_out: list[Document]
    held_out_rows: list[Row]
    tokenizer: FileTokenizer


def distill(
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    revision: str | None = None,
    student_revision: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the student of ``job`` to follow its teacher and write it to ``out``.

    ``callbacks`` are transformers' and see every step.

    Raises:
        ModelError: a model cannot be read.
        VocabularyError: the two do not share their tokens.
        DataError: the data is missing, empty or malformed.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    progress = progress or Silence()
    with (
        as_checkpoint(job.student, student_revision) as pupil,
        _open_teacher(job, pupil, revision) as master,
    ):
        tokenizer = FileTokenizer(pupil.folder)
        text = _read_text(job, pupil, tokenizer)
        machine = this_machine(with_speed=False)
        check_fits(_plan(job, pupil, master, machine), job.recipe.force)
        n_documents, n_rows = len(text.samples), len(text.rows)
        progress.say(f"{n_documents} samples, {n_rows} rows of {job.recipe.row_tokens} tokens")
        work = out.with_name(f".{out.name}.checkpoints")
        model = _make_model(pupil, master, text, job.recipe)
        trainer = _make_trainer(model, pupil, text, work, job.recipe)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.writer = _make_writer(text, job.recipe, tokenizer)
        _check_cold_start(trainer, text, job.recipe)
        _train(trainer, resume, out, work, progress)
        if job.eval_data and not _was_just_evaluated(trainer):
            trainer.evaluate()
        save_student(trainer, job, Lineage(master.source(), master.licence, pupil, tokenizer), out)
        if trainer.accelerator.is_main_process:
            shutil.rmtree(work, ignore_errors=True)
    log = trainer.state.log_history
    return {
        "path": str(out),
        "steps": trainer.state.global_step,
        "fastest_step_s": fastest_step_s(log),
        "last": last_figures(log, "loss"),
        "held_out": last_figures(log, "eval_perplexity"),
    }


def plan(
    job: Job,
    *,
    gpus: str | None = None,
    revision: str | None = None,
    student_revision: str | None = None,
) -> Plan:
    """Return what ``job`` needs, here or on the machine called ``gpus``; nothing is trained.

    Raises:
        ModelError: a model cannot be read.
        RecipeError: the machine is unknown.
    """
    machine = named_machine(gpus) if gpus else this_machine(with_speed=True)
    with (
        as_checkpoint(job.student, student_revision) as pupil,
        _open_teacher(job, pupil, revision) as master,
    ):
        return _plan(job, pupil, master, machine)


def _plan(job: Job, pupil: Checkpoint, master: "_Master", machine: Machine) -> Plan:
    teacher = None if job.recipe.hard_label_weight == 1 else master.checkpoint
    is_cached = master.cache is not None
    return plan_run(job.recipe, pupil, teacher, master.vocab_size, machine, is_cached=is_cached)


@dataclass(frozen=True)
class _Master:
    """The teacher: a checkpoint, or the cache of one."""

    vocab_size: int
    """Ids that it shares with the student."""
    checkpoint: Checkpoint | None = None
    cache: LogitCache | None = None

    @property
    def licence(self) -> str | None:
        return read_licence(self.checkpoint.folder) if self.checkpoint else None

    def source(self) -> dict[str, Any]:
        """Return role, name and hash for the manifest."""
        if self.checkpoint:
            return source_of("teacher", self.checkpoint)
        assert self.cache is not None
        identity = self.cache.identity
        return {
            "role": "teacher",
            "name": identity.teacher,
            "weights_sha256": identity.teacher_sha256,
            "cache_sha256": identity.sha256(),
        }


@contextmanager
def _open_teacher(job: Job, pupil: Checkpoint, revision: str | None) -> Iterator[_Master]:
    """Yield the teacher of ``job`` after comparing its tokens with those of ``pupil``."""
    tokenizer = FileTokenizer(pupil.folder)
    if job.cache is not None:
        cache = LogitCache(Path(job.cache))
        check_recipe(job.recipe, cache)
        check_vocabulary(cache, tokenizer, read_chat_template(pupil.folder))
        yield _Master(cache.identity.vocab_size, cache=cache)
        return
    assert job.teacher is not None
    with as_checkpoint(job.teacher, revision) as master:
        if job.recipe.cross_tokenizer == "refuse":
            vocab_size = common_vocabulary(tokenizer, FileTokenizer(master.folder))
        else:
            vocab_size = vocabulary_size(tokenizer)
        yield _Master(vocab_size, checkpoint=master)


def _read_text(job: Job, pupil: Checkpoint, tokenizer: FileTokenizer) -> _Text:
    template, row_tokens = read_chat_template(pupil.folder), job.recipe.row_tokens

    def read(sources: Sequence[str]) -> list[Document]:
        return cut(read_documents(sources, tokenizer, template), row_tokens) if sources else []

    samples, held_out = read(job.data), read(job.eval_data)
    rows = pack(samples, row_tokens)
    held_out_rows = pack(held_out, row_tokens, first_number=len(rows))
    return _Text(samples, rows, held_out, held_out_rows, tokenizer)


def _make_model(pupil: Checkpoint, master: _Master, text: _Text, recipe: Recipe) -> DistillModel:
    torch.manual_seed(recipe.seed)
    student = load_student(pupil, recipe)
    teacher, shape = _make_teacher(master, text, recipe)
    options = LossOptions(
        divergence=recipe.divergence,
        mix=recipe.mix,
        temperature=recipe.temperature,
        t_squared=recipe.t_squared,
        hard_label_weight=recipe.hard_label_weight,
        chunk_tokens=recipe.chunk_tokens,
        head_precision="fp32" if recipe.head_precision == "fp32" else "bf16",
        student_shape=head_shape(student.config),
        teacher_shape=shape,
        compiled=what_to_compile(recipe) != "none",
    )
    if what_to_compile(recipe) == "full":
        compile_layers(student)
    matching = None
    if recipe.match_hidden and isinstance(teacher, OnlineTeacher):
        student_size, teacher_size = (
            int(model.config.hidden_size) for model in (student, teacher.model)
        )
        matching = HiddenMatching(student_size, teacher_size, recipe.match_hidden)
    dtype = backbone_dtype(recipe.precision)
    return DistillModel(student, teacher, master.vocab_size, options, dtype, matching)


def _make_teacher(master: _Master, text: _Text, recipe: Recipe) -> tuple[Teacher | None, HeadShape]:
    if recipe.hard_label_weight == 1:
        return None, HeadShape()
    packed = [(text.samples, text.rows), (text.held_out, text.held_out_rows)]
    if master.cache:
        return CachedTeacher(master.cache, packed, recipe.temperature), HeadShape()
    assert master.checkpoint is not None
    model, is_placed = load_teacher(master.checkpoint, recipe)
    if what_to_compile(recipe) == "full" and not is_placed:
        compile_layers(model)
    if recipe.cross_tokenizer == "ranks":
        theirs = FileTokenizer(master.checkpoint.folder)
        crossed = CrossTeacher(model, packed, text.tokenizer, theirs, recipe.row_tokens)
        return crossed, head_shape(model.config)
    return OnlineTeacher(model, master.vocab_size, is_placed=is_placed), head_shape(model.config)


def _make_trainer(
    model: DistillModel, pupil: Checkpoint, text: _Text, work: Path, recipe: Recipe
) -> DistillTrainer:
    callbacks: list[TrainerCallback] = []
    if recipe.grid != "none":
        plan = make_plan(pupil, recipe.grid, recipe.grid_head)
        callbacks.append(GridCallback(model.student, plan.grids()))
    if recipe.head_precision == "auto":
        callbacks.append(HeadPrecisionCallback(model, BF16_HEADS_ABOVE_NATS))
    if recipe.patience and text.held_out_rows:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.patience))
    trainer = DistillTrainer(
        model=model,
        args=_training_arguments(work, recipe, has_held_out=bool(text.held_out_rows)),
        train_dataset=text.rows,
        eval_dataset=text.held_out_rows or None,
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_writer(text: _Text, recipe: Recipe, tokenizer: FileTokenizer) -> StudentWriter | None:
    if recipe.on_policy == 0:
        return None
    offset = len(text.samples)
    held_out = [
        replace(row, samples=[index + offset for index in row.samples])
        for row in text.held_out_rows
    ]
    return StudentWriter(
        samples=[*text.samples, *text.held_out],
        rows=[*text.rows, *held_out],
        fraction=recipe.on_policy,
        new_tokens=min(recipe.on_policy_tokens, recipe.row_tokens - 1),
        plain_prompt_tokens=recipe.on_policy_prompt_tokens,
        row_tokens=recipe.row_tokens,
        temperature=recipe.temperature,
        stop_ids=tokenizer.stop_ids,
    )


def _check_cold_start(trainer: DistillTrainer, text: _Text, recipe: Recipe) -> None:
    """Refuse on-policy training of a student whose text is not worth scoring.

    Raises:
        RecipeError: it is too far from its teacher on the first rows of the data.
    """
    if trainer.writer is None or recipe.force:
        return
    writer, trainer.writer = trainer.writer, None
    kl = trainer.evaluate(text.rows[:_COLD_START_ROWS], metric_key_prefix="start")["start_kl_nats"]
    trainer.writer = writer
    if kl > COLD_START_NATS:
        raise RecipeError(
            f"the student is {kl:.2f} nats per token from its teacher, more than "
            f"{COLD_START_NATS}: what it writes is not worth scoring; train it on fixed data first "
            "(on_policy 0), or give --force"
        )


def _training_arguments(work: Path, recipe: Recipe, *, has_held_out: bool) -> TrainingArguments:
    evaluation: dict[str, Any] = {}
    save_steps = recipe.save_steps
    has_kl = recipe.hard_label_weight < 1 and recipe.cross_tokenizer == "refuse"
    if has_held_out and recipe.eval_steps:
        save_steps = recipe.eval_steps  # the best checkpoint must be one that was evaluated
        evaluation = {
            "eval_strategy": "steps",
            "eval_steps": recipe.eval_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{'kl_nats' if has_kl else 'perplexity'}",
            "greater_is_better": False,
        }
    return TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.rows_per_step,
        per_device_eval_batch_size=recipe.rows_per_step,
        gradient_accumulation_steps=recipe.accumulation_steps,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused",
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        disable_tqdm=True,
        report_to=recipe.report_to.split(","),
        ddp_find_unused_parameters=False,
        use_cpu=not torch.accelerator.is_available(),  # else torchrun's processes stay strangers
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **evaluation,
    )


def _train(
    trainer: DistillTrainer, resume: bool, out: Path, work: Path, progress: Progress
) -> None:
    """Run the training loop; ``work`` holds its checkpoints."""
    found = _resume_point(trainer, work, resume, progress)
    start = int(found.name.rpartition("-")[2]) if found else 0
    with (
        disk_errors(out, work),
        progress.track("step", trainer.args.max_steps, start) as advance,
        _with_callback(trainer, Report(advance)),
    ):
        trainer.train(resume_from_checkpoint=str(found) if found else None)


@contextmanager
def _with_callback(trainer: DistillTrainer, callback: TrainerCallback) -> Iterator[None]:
    trainer.add_callback(callback)
    yield
    trainer.remove_callback(callback)


def _resume_point(
    trainer: DistillTrainer, work: Path, resume: bool, progress: Progress
) -> Path | None:
    found = last_complete_checkpoint(work) if resume else None
    if resume:
        progress.say(f"resuming from {found.name}" if found else "nothing to resume; starting anew")
    elif work.exists() and trainer.accelerator.is_main_process:
        shutil.rmtree(work)
    trainer.accelerator.wait_for_everyone()
    return found


def _was_just_evaluated(trainer: DistillTrainer) -> bool:
    entry = last_figures(trainer.state.log_history, "eval_perplexity")
    return bool(entry.get("step") == trainer.state.global_step)

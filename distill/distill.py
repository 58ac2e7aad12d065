"""``edgekd distill``: a student that follows its teacher's whole distribution.

Teacher and student run side by side, or the teacher comes out of a cache. The result is a plain
checkpoint with float32 masters, the resolved recipe, the training log, its curve, a model card and
a manifest.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import (
    TrainerCallback,
)

from edgekd.distill.assemble import TeacherSource, Text, make_model, make_trainer, make_writer
from edgekd.distill.cache_format import LogitCache
from edgekd.distill.cached_teacher import check_recipe, check_vocabulary, template_sha256
from edgekd.distill.config_only import as_planned, is_config_only
from edgekd.distill.cross_tokenizer import learn_where_aligned
from edgekd.distill.data import Document, read_documents
from edgekd.distill.machines import Machine, named_machine, this_machine
from edgekd.distill.packing import Row, cut, pack
from edgekd.distill.preflight import Plan, check_fits, epochs_note, epochs_of, plan_run
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.save import Lineage, save_student
from edgekd.distill.trainer import (
    DistillTrainer,
    dropping_incomplete_checkpoints,
    last_complete_checkpoint,
)
from edgekd.distill.training_log import Report, fastest_step_s, last_figures
from edgekd.distill.vocabulary import common_vocabulary, vocabulary_size
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import as_checkpoint
from edgekd.files import disk_errors
from edgekd.progress import Progress, Silence
from edgekd.runtime.chat_template import read_chat_template
from edgekd.runtime.tokenizer import FileTokenizer

COLD_START_NATS = 2.0
_COLD_START_ROWS = 4


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
        as_checkpoint(job.student, student_revision) as student_checkpoint,
        _open_teacher(job, student_checkpoint, revision) as teacher_source,
    ):
        tokenizer = FileTokenizer(student_checkpoint.folder)
        text = _read_text(job, student_checkpoint, tokenizer)
        text = _where_aligned(text, teacher_source, job.recipe)
        machine = this_machine(with_speed=False)
        check_fits(_plan(job, student_checkpoint, teacher_source, machine), job.recipe.force)
        _say_what_is_read(text, job.recipe, progress)
        if teacher_source.checkpoint:
            _compare_templates(text, student_checkpoint, teacher_source.checkpoint, progress)
        work = out.with_name(f".{out.name}.checkpoints")
        model = make_model(student_checkpoint, teacher_source, text, job.recipe)
        with disk_errors(out, work):
            trainer = make_trainer(model, student_checkpoint, text, work, job.recipe)
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.writer = make_writer(text, job.recipe, tokenizer)
        _check_cold_start(trainer, text, job.recipe)
        _train(trainer, resume, out, work, progress)
        if job.eval_data and not _was_just_evaluated(trainer):
            trainer.evaluate()
        save_student(
            trainer,
            job,
            Lineage(teacher_source.source(), teacher_source.licence, student_checkpoint, tokenizer),
            out,
        )
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
    network_gbit: float | None = None,
    revision: str | None = None,
    student_revision: str | None = None,
) -> Plan:
    """Return what ``job`` needs, here or on the machine called ``gpus``; nothing is trained.

    Text that is here is read, to count it. A folder with ``config.json`` and no weights stands for
    the model that it describes. Tokens are not compared then: the shorter vocabulary counts.

    Raises:
        ModelError: a model cannot be read.
        RecipeError: the machine is unknown.
    """
    machine = named_machine(gpus, network_gbit) if gpus else this_machine(with_speed=True)
    with as_planned(job.student, student_revision) as student_checkpoint:
        if job.teacher and any(map(is_config_only, (job.student, job.teacher))):
            with as_planned(job.teacher, revision) as teacher:
                both = (student_checkpoint, teacher)
                n_common = min(int(checkpoint.config["vocab_size"]) for checkpoint in both)
                source = TeacherSource(n_common, checkpoint=teacher)
                return _plan(job, student_checkpoint, source, machine)
        with _open_teacher(job, student_checkpoint, revision) as teacher_source:
            rows = _planned_rows(job, student_checkpoint)
            return _plan(job, student_checkpoint, teacher_source, machine, rows)


def _planned_rows(job: Job, student_checkpoint: Checkpoint) -> list[Row] | None:
    """Return the rows that the text fills; None where it is not here."""
    if not job.data or not all(Path(source).expanduser().exists() for source in job.data):
        return None
    tokenizer = FileTokenizer(student_checkpoint.folder)
    return _read_text(replace(job, eval_data=[]), student_checkpoint, tokenizer).rows


def _plan(
    job: Job,
    student_checkpoint: Checkpoint,
    teacher_source: TeacherSource,
    machine: Machine,
    rows: Sequence[Row] | None = None,
) -> Plan:
    teacher = None if job.recipe.hard_label_weight == 1 else teacher_source.checkpoint
    is_cached = teacher_source.cache is not None
    return plan_run(
        job.recipe,
        student_checkpoint,
        teacher,
        teacher_source.vocab_size,
        machine,
        is_cached=is_cached,
        n_rows=None if rows is None else len(rows),
        samples_per_row=sum(len(row.samples) for row in rows) / len(rows) if rows else 1.0,
    )


@contextmanager
def _open_teacher(
    job: Job, student_checkpoint: Checkpoint, revision: str | None
) -> Iterator[TeacherSource]:
    """Yield the teacher of ``job`` after comparing its tokens with those of the student."""
    tokenizer = FileTokenizer(student_checkpoint.folder)
    if job.cache is not None:
        cache = LogitCache(Path(job.cache))
        check_recipe(job.recipe, cache)
        check_vocabulary(cache, tokenizer, read_chat_template(student_checkpoint.folder))
        yield TeacherSource(cache.identity.vocab_size, cache=cache)
        return
    assert job.teacher is not None
    with as_checkpoint(job.teacher, revision) as teacher_source:
        if job.recipe.cross_tokenizer == "refuse":
            vocab_size = common_vocabulary(tokenizer, FileTokenizer(teacher_source.folder))
        else:
            vocab_size = vocabulary_size(tokenizer)
        yield TeacherSource(vocab_size, checkpoint=teacher_source)


def _read_text(job: Job, student_checkpoint: Checkpoint, tokenizer: FileTokenizer) -> Text:
    template, row_tokens = read_chat_template(student_checkpoint.folder), job.recipe.row_tokens

    def read(sources: Sequence[str]) -> list[Document]:
        return cut(read_documents(sources, tokenizer, template), row_tokens) if sources else []

    samples, held_out = read(job.data), read(job.eval_data)
    rows = pack(samples, row_tokens)
    held_out_rows = pack(held_out, row_tokens, first_number=len(rows))
    return Text(samples, rows, held_out, held_out_rows, tokenizer)


def _say_what_is_read(text: Text, recipe: Recipe, progress: Progress) -> None:
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's and accelerate's
    epochs = epochs_note(epochs_of(recipe, len(text.rows), n_processes))
    progress.say(
        f"{len(text.samples)} samples, {len(text.rows)} rows of {recipe.row_tokens} tokens; "
        f"{epochs}"
    )


def _compare_templates(
    text: Text, student: Checkpoint, teacher: Checkpoint, progress: Progress
) -> None:
    """Say so where a teacher of another chat template, or of none, is given the student's chats."""
    has_chats = not all(all(sample.learned) for sample in text.samples)
    ours, theirs = (
        template_sha256(read_chat_template(model.folder)) for model in (student, teacher)
    )
    if has_chats and ours != theirs:
        found = "no chat template" if theirs is None else "another chat template than the student"
        progress.say(
            f"the teacher has {found}: it reads the chats as the student's template renders them, "
            "which it may never have seen; better give both the same chat_template"
        )


def _where_aligned(text: Text, teacher_source: TeacherSource, recipe: Recipe) -> Text:
    """Return ``text`` learned only where a teacher of other tokens has something to say."""
    has_teacher = teacher_source.checkpoint is not None and recipe.hard_label_weight < 1
    if recipe.cross_tokenizer == "refuse" or not has_teacher:
        return text
    assert teacher_source.checkpoint is not None
    theirs = FileTokenizer(teacher_source.checkpoint.folder)
    return replace(text, rows=learn_where_aligned(text.samples, text.rows, text.tokenizer, theirs))


def _check_cold_start(trainer: DistillTrainer, text: Text, recipe: Recipe) -> None:
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


def _train(
    trainer: DistillTrainer, resume: bool, out: Path, work: Path, progress: Progress
) -> None:
    """Run the training loop; ``work`` holds its checkpoints."""
    found = _resume_point(trainer, work, resume, progress)
    start = int(found.name.rpartition("-")[2]) if found else 0
    with (
        disk_errors(out, work),
        dropping_incomplete_checkpoints(work),
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

"""From a recipe to the parts of a run: model, teacher, loss, trainer, and who writes the data."""

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
from edgekd.distill.cached_teacher import CachedTeacher
from edgekd.distill.compile_layers import compile_layers
from edgekd.distill.cross_tokenizer import CrossTeacher
from edgekd.distill.data import Document
from edgekd.distill.grid import GridCallback
from edgekd.distill.heads import HeadShape, head_shape
from edgekd.distill.int8_activations import round_inputs
from edgekd.distill.learned_scales import LearnedScales
from edgekd.distill.load_models import (
    backbone_dtype,
    for_machine,
    load_student,
    load_teacher,
    what_to_compile,
)
from edgekd.distill.loss_options import LossOptions
from edgekd.distill.machines import has_native_bf16
from edgekd.distill.model import (
    DistillModel,
    HiddenMatching,
    OnlineTeacher,
    Teacher,
)
from edgekd.distill.on_policy import StudentWriter
from edgekd.distill.packing import Row
from edgekd.distill.recipe import Recipe
from edgekd.distill.save import source_of
from edgekd.distill.trainer import (
    DistillTrainer,
    HeadPrecisionCallback,
    collate,
)
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.plan import make_plan
from edgekd.runtime.tokenizer import FileTokenizer

# Below this divergence bf16 heads change the gradient by a tenth and more:
# benchmarks/results/head_precision.json.
BF16_HEADS_ABOVE_NATS = 0.1


@dataclass(frozen=True)
class Text:
    """What is trained on, and what is held out."""

    samples: list[Document]
    rows: list[Row]
    held_out: list[Document]
    held_out_rows: list[Row]
    tokenizer: FileTokenizer


@dataclass(frozen=True)
class TeacherSource:
    """The teacher: a checkpoint, or the cache of one."""

    vocab_size: int
    """Ids that it shares with the student."""
    checkpoint: Checkpoint | None = None
    cache: LogitCache | None = None

    @property
    def licence(self) -> str | None:
        """The teacher's licence, where its checkpoint is here and names one."""
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


def make_model(
    student_checkpoint: Checkpoint, teacher_source: TeacherSource, text: Text, recipe: Recipe
) -> DistillModel:
    """Return student, teacher and loss as one module."""
    recipe = for_machine(recipe, has_native_bf16())
    torch.manual_seed(recipe.seed)
    student = load_student(student_checkpoint, recipe)
    teacher, shape = _make_teacher(teacher_source, text, recipe)
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
    return DistillModel(student, teacher, teacher_source.vocab_size, options, dtype, matching)


def _make_teacher(
    teacher_source: TeacherSource, text: Text, recipe: Recipe
) -> tuple[Teacher | None, HeadShape]:
    if recipe.hard_label_weight == 1:
        return None, HeadShape()
    packed = [(text.samples, text.rows), (text.held_out, text.held_out_rows)]
    if teacher_source.cache:
        return CachedTeacher(teacher_source.cache, packed, recipe.temperature), HeadShape()
    assert teacher_source.checkpoint is not None
    model, is_placed = load_teacher(teacher_source.checkpoint, recipe)
    if what_to_compile(recipe) == "full" and not is_placed:
        compile_layers(model)
    if recipe.cross_tokenizer == "ranks":
        theirs = FileTokenizer(teacher_source.checkpoint.folder)
        crossed = CrossTeacher(model, packed, text.tokenizer, theirs, recipe.row_tokens)
        return crossed, head_shape(model.config)
    return OnlineTeacher(model, teacher_source.vocab_size, is_placed=is_placed), head_shape(
        model.config
    )


def make_trainer(
    model: DistillModel, student_checkpoint: Checkpoint, text: Text, work: Path, recipe: Recipe
) -> DistillTrainer:
    """Return the training loop; ``work`` will hold its checkpoints."""
    callbacks: list[TrainerCallback] = []
    grid = None if recipe.grid == "none" else _put_on_grid(model, student_checkpoint, recipe)
    if grid:
        callbacks.append(grid)
    heads = None
    if recipe.head_precision == "auto":
        heads = HeadPrecisionCallback(model, BF16_HEADS_ABOVE_NATS)
        callbacks.append(heads)
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
    trainer.grid, trainer.heads = grid, heads
    trainer.remove_callback(PrinterCallback)
    return trainer


def _put_on_grid(
    model: DistillModel, student_checkpoint: Checkpoint, recipe: Recipe
) -> GridCallback:
    """Return what rounds the student of ``model`` in every step."""
    assert recipe.grid != "none"
    grids = make_plan(student_checkpoint, recipe.grid, recipe.grid_head).grids()
    if recipe.grid_scales == "learned":
        parameters = dict(model.student.named_parameters())
        learned = [name for name, grid in grids.items() if grid == "q4_0"]
        model.learn_scales(LearnedScales((name, parameters[name]) for name in learned))
    if recipe.grid_activations == "int8":
        round_inputs(model.student, grids)
        model.rounds_hidden = True
    return GridCallback(model.student, grids, model.learned_scales)


def make_writer(text: Text, recipe: Recipe, tokenizer: FileTokenizer) -> StudentWriter | None:
    """Return who replaces batches by the student's own text; None without on-policy data."""
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

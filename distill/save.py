"""A trained student as a folder: weights, tokenizer, recipe, log, curve, model card, manifest."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.distill.curve import write_curve
from edgekd.distill.learned_scales import LearnedScales
from edgekd.distill.load_models import merged
from edgekd.distill.model_card import write_card
from edgekd.distill.prune import copy_tokenizer
from edgekd.distill.recipe import Job, write_recipe
from edgekd.distill.trainer import DistillTrainer
from edgekd.distill.training_log import write_log
from edgekd.distill.vocabulary import vocabulary_sha256
from edgekd.export.blocks import pack_gguf
from edgekd.export.checkpoint import Checkpoint, read_licence
from edgekd.export.trained_rows import write_trained_rows
from edgekd.files import atomic_folder
from edgekd.manifest import NAME, Manifest, describe_files, write_manifest
from edgekd.runtime.tokenizer import FileTokenizer


@dataclass(frozen=True)
class Lineage:
    """What a student was made from."""

    teacher: dict[str, Any]
    """Role, name and hash, as in the manifest."""
    teacher_licence: str | None
    student: Checkpoint
    tokenizer: FileTokenizer

    @property
    def licence(self) -> str | None:
        """The student's licence, else the teacher's."""
        return read_licence(self.student.folder) or self.teacher_licence

    def sources(self) -> list[dict[str, Any]]:
        """Return role, name and hash of each source."""
        return [self.teacher, source_of("student", self.student)]


def source_of(role: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return role, name and hash of ``checkpoint``, as in a manifest."""
    return {
        "role": role,
        "name": checkpoint.folder.name,
        "weights_sha256": checkpoint.weights_sha256(),
    }


def save_student(trainer: DistillTrainer, job: Job, lineage: Lineage, out: Path) -> None:
    """Write the trained student to ``out``; every rank must call it, the first one writes.

    Raises:
        OutputError: ``out`` cannot be written; it is as it was.
    """
    weights = trainer.student_weights()  # gathered from all ranks
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        student, scales = model.student, model.learned_scales
        log = trainer.state.log_history
        with atomic_folder(out) as partial:
            _save_weights(student, weights, partial)
            if scales is not None:
                write_trained_rows(partial, _rows(scales, weights))
            copy_tokenizer(lineage.student.folder, partial)
            write_log(partial / "training_log.jsonl", log)
            write_curve(partial / "training_curve.svg", log)
            write_recipe(partial / "recipe.toml", job)
            write_card(partial / "README.md", job, lineage.licence, lineage.sources(), log)
            write_manifest(partial / NAME, _manifest(partial, job, lineage))
    trainer.accelerator.wait_for_everyone()


def _save_weights(student: Any, weights: dict[str, Any], folder: Path) -> None:
    if hasattr(student, "merge_and_unload"):
        merged(student).save_pretrained(folder)
    else:
        student.save_pretrained(folder, state_dict=weights)


def _rows(scales: LearnedScales, weights: dict[str, Any]) -> dict[str, NDArray[np.uint8]]:
    """Return the matrices as they are rounded in the next step that there might have been."""
    return {name: pack_gguf(scales.to("cpu").blocks(name, weights[name])) for name in scales.names}


def _manifest(folder: Path, job: Job, lineage: Lineage) -> Manifest:
    return Manifest(
        kind="checkpoint",
        files=describe_files(path for path in folder.iterdir() if path.is_file()),
        made_from=lineage.sources(),
        recipe={
            "verb": "distill",
            **asdict(job.recipe),
            "vocabulary_sha256": vocabulary_sha256(lineage.tokenizer),
        },
        licence=lineage.licence,
    )

"""``edgekd demo``: the whole chain on a real model, ending with the five rows.

Teacher: SmolLM2-135M-Instruct. Student: the same with fewer layers. Text: the documentation of
the Python that runs this, a part of which is held out. Everything is measured in this run.
"""

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.distill.data import read_documents
from edgekd.distill.demo_teacher import fetch_teacher
from edgekd.distill.demo_text import make_questions, write_corpus
from edgekd.distill.distill import distill
from edgekd.distill.importance import measure_importance
from edgekd.distill.load_models import can_compile
from edgekd.distill.prune import write_pruned
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.student_shape import Kept, choose_layers
from edgekd.errors import OutputError, RecipeError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.from_gguf import gguf_to_checkpoint
from edgekd.progress import Progress
from edgekd.runtime.bench import BenchSettings, bench_models
from edgekd.runtime.five_rows import QualityFigures, Row, measure_quality
from edgekd.runtime.tokenizer import FileTokenizer

N_LAYERS = 22  # of the teacher's 30: 106M of 135M parameters
_CALIBRATION_DOCUMENTS = 16
_ROW_TOKENS = 512
_EVAL_TOKENS = 1024
_N_QUESTIONS = 24
_PROBE_STEPS = 3
# Shares of the budget. The baseline's steps cost less than half of a distilled one's, having no
# teacher; what is left over pays for pruning, exporting and measuring.
_DISTILL_SHARE, _GRID_SHARE = 0.34, 0.16
_MIN_STEPS = 12


@dataclass(frozen=True)
class DemoResult:
    """The table and where everything lies."""

    rows: list[Row]
    pruned: QualityFigures
    folder: Path

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "folder": str(self.folder),
            "pruned_quality": asdict(self.pruned),
            "rows": [row.as_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class _Stage:
    """What every stage needs: where the teacher, the text and the results lie."""

    out: Path
    teacher: Path
    text: Path
    progress: Progress

    def train(self, student: Path, name: str, recipe: Recipe) -> tuple[Path, dict[str, Any]]:
        job = Job(
            teacher=str(self.teacher), student=str(student), data=[str(self.text)], recipe=recipe
        )
        report = distill(job, self.out / name, progress=self.progress)
        return self.out / name, report


def demo(out: Path, minutes: float, progress: Progress) -> DemoResult:
    """Run the chain into ``out`` within about ``minutes`` and return the five rows.

    Raises:
        RecipeError: the budget is too small for any training.
        OutputError: ``out`` cannot be written.
        DownloadError: the teacher cannot be fetched, or is not the pinned file.
    """
    if minutes < 1:
        raise RecipeError(f"--minutes {minutes} is too short to train anything; give 2 or more")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {out}: {error.strerror}; choose another --out") from error
    progress.say("1/8 teacher: SmolLM2-135M-Instruct")
    teacher = out / "teacher"
    try:
        gguf_to_checkpoint(fetch_teacher(progress), teacher)
    except BaseException:
        with suppress(OSError):
            out.rmdir()  # where there is nothing in it
        raise
    progress.say("2/8 text: this Python's own documentation")
    train, held_out = write_corpus(out)
    stage = _Stage(out, teacher, train, progress)
    progress.say(f"3/8 student: {N_LAYERS} of the teacher's layers, chosen by block influence")
    pruned = _prune(stage)
    progress.say("4/8 distillation")
    recipe = _fit_recipe(stage, pruned, minutes)
    distilled, _ = stage.train(pruned, "student-distilled", recipe)
    progress.say("5/8 baseline: the same student, tokens and steps, hard labels only")
    baseline, _ = stage.train(pruned, "student-baseline", replace(recipe, hard_label_weight=1.0))
    progress.say("6/8 last steps on the int4 grid that ships")
    int4, _ = stage.train(distilled, "student-int4", _grid_recipe(recipe))
    progress.say("7/8 export and verify")
    files = _export(stage, baseline, distilled, int4)
    progress.say("8/8 measure")
    return _measure(stage, pruned, held_out, files)


def _prune(stage: _Stage) -> Path:
    checkpoint = open_checkpoint(stage.teacher)
    documents = read_documents([str(stage.text)], FileTokenizer(stage.teacher), None)
    found = measure_importance(checkpoint, documents[:_CALIBRATION_DOCUMENTS], stage.progress)
    out = stage.out / "student-pruned"
    write_pruned(checkpoint, Kept(choose_layers(found.layers_L, N_LAYERS)), out)
    return out


def _fit_recipe(stage: _Stage, pruned: Path, minutes: float) -> Recipe:
    """Return a recipe whose steps fill their share of the budget, from a short timed run."""
    probe = Recipe(
        steps=_PROBE_STEPS,
        row_tokens=_ROW_TOKENS,
        learning_rate=2e-4,
        save_steps=10_000,
        compile="full" if can_compile() else "none",
    )
    folder, report = stage.train(pruned, "probe", probe)
    shutil.rmtree(folder)
    step_s = report["fastest_step_s"]
    steps = max(_MIN_STEPS, int(minutes * 60 * _DISTILL_SHARE / step_s))
    stage.progress.say(f"{step_s:.1f} s a step of {2 * _ROW_TOKENS} tokens: {steps} steps")
    return replace(probe, steps=steps, warmup_steps=max(1, steps // 10))


def _grid_recipe(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        grid="q4_0",
        steps=max(_MIN_STEPS, round(recipe.steps * _GRID_SHARE / _DISTILL_SHARE)),
        learning_rate=recipe.learning_rate / 2,
        seed=recipe.seed + 1,
    )


def _export(
    stage: _Stage, baseline: Path, distilled: Path, int4: Path
) -> dict[str, tuple[Path, Path]]:
    """Write the files that the rows are measured on, verified; return checkpoint and file."""
    jobs: list[tuple[str, Path, str]] = [
        ("teacher", stage.teacher, "f16"),
        ("student baseline", baseline, "f16"),
        ("student quantized", baseline, "q4_0"),
        ("student distilled", distilled, "f16"),
        ("distilled + int4", int4, "q4_0"),
    ]
    files = {}
    for row, folder, quant in jobs:
        path = stage.out / f"{folder.name}-{quant}.gguf"
        export_model(str(folder), "gguf", path, quant=quant, progress=stage.progress)
        files[row] = folder, path
    onnx = stage.out / "student-int4-onnx"
    if onnx.exists():
        shutil.rmtree(onnx)
    export_model(str(int4), "onnx", onnx, quant="q4_0", progress=stage.progress)
    files["distilled + int4 (ONNX)"] = int4, onnx
    return files


def _measure(
    stage: _Stage, pruned: Path, held_out: Path, files: dict[str, tuple[Path, Path]]
) -> DemoResult:
    text = held_out.read_text("utf-8")
    artifacts = [path for _, path in files.values()]
    quality = measure_quality(
        stage.teacher,
        [pruned, *artifacts],
        text,
        _EVAL_TOKENS,
        make_questions(text, _N_QUESTIONS),
        stage.progress,
    )
    settings = BenchSettings(prompt_tokens=256, decode_tokens=64, repetitions=3)
    speed = bench_models([str(path) for path in artifacts], settings, stage.progress)
    rows = [
        Row(name, open_checkpoint(folder).n_parameters, quality[path], result)
        for (name, (folder, path)), result in zip(files.items(), speed, strict=True)
    ]
    return DemoResult(rows, quality[pruned], stage.out)

"""``edgekd demo``: the whole chain on a real model, ending with the five rows.

Teacher: SmolLM2-135M-Instruct. Student: the same with fewer layers. Text: the documentation of
the Python that runs this, a part of which is held out. Everything is measured in this run.
"""

import ast
import hashlib
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekd.distill.data import read_documents
from edgekd.distill.demo_teacher import fetch_teacher
from edgekd.distill.distill import Recipe, distill
from edgekd.distill.prune import block_influence, choose_layers, write_pruned
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.from_gguf import gguf_to_checkpoint
from edgekd.runtime.bench import BenchResult, BenchSettings, bench_models
from edgekd.runtime.five_rows import QualityFigures, Row, measure_quality
from edgekd.runtime.tokenizer import FileTokenizer

N_LAYERS = 22  # of the teacher's 30: 106M of 135M parameters
_HELD_OUT_SHARE = 12  # one document in so many
_MIN_CHARS = 400
_CALIBRATION_DOCUMENTS = 16
_ROW_TOKENS = 512
_EVAL_TOKENS = 1024
_PROBE_STEPS = 2
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


def demo(out: Path, minutes: float, say: Callable[[str], None]) -> DemoResult:
    """Run the chain into ``out`` within about ``minutes`` and return the five rows.

    Raises:
        RecipeError: the budget is too small for any training.
        DownloadError: the teacher cannot be fetched, or is not the pinned file.
    """
    if minutes < 1:
        raise RecipeError(f"--minutes {minutes} is too short to train anything; give 2 or more")
    out.mkdir(parents=True, exist_ok=True)
    say("1/8 teacher: SmolLM2-135M-Instruct")
    teacher = out / "teacher"
    gguf_to_checkpoint(fetch_teacher(say), teacher)
    say("2/8 text: this Python's own documentation")
    train, held_out = write_corpus(out)
    say(f"3/8 student: {N_LAYERS} of the teacher's layers, chosen by block influence")
    pruned = _prune(teacher, train, out / "student-pruned")
    say("4/8 distillation")
    recipe = _fit_recipe(teacher, pruned, train, out, minutes, say)
    distilled = _train(teacher, pruned, train, out / "student-distilled", recipe, say)
    say("5/8 baseline: the same student, tokens and steps, hard labels only")
    plain = replace(recipe, hard_label_weight=1.0)
    baseline = _train(teacher, pruned, train, out / "student-baseline", plain, say)
    say("6/8 last steps on the int4 grid that ships")
    on_grid = replace(
        recipe,
        grid="q4_0",
        max_steps=max(_MIN_STEPS, round(recipe.max_steps * _GRID_SHARE / _DISTILL_SHARE)),
        learning_rate=recipe.learning_rate / 2,
        seed=recipe.seed + 1,
    )
    int4 = _train(teacher, distilled, train, out / "student-int4", on_grid, say)
    say("7/8 export and verify")
    files = _export(teacher, baseline, distilled, int4, out, say)
    say("8/8 measure")
    return _measure(teacher, pruned, held_out, files, out)


def write_corpus(out: Path) -> tuple[Path, Path]:
    """Write the demo's training and held-out text into ``out`` and return both paths.

    A document is held out by a hash of its text, so the split is the same in every run.
    """
    by_digest = {hashlib.sha256(text.encode()).digest(): text for text in _documents()}
    paths = out / "text-train.txt", out / "text-held-out.txt"
    for path, is_held_out in zip(paths, (False, True), strict=True):
        chosen = [  # in the order of their hashes, which is as good as shuffled
            by_digest[digest]
            for digest in sorted(by_digest)
            if (digest[-1] % _HELD_OUT_SHARE == 0) is is_held_out
        ]
        path.write_text("\n\n\n".join(chosen) + "\n", "utf-8")
    return paths


def _documents() -> list[str]:
    """Return the language reference's topics and the standard library's docstrings."""
    from pydoc_data.topics import topics

    found = [_tidy(text) for text in topics.values()]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8", "replace"))
        owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
        for node in ast.walk(tree):
            if isinstance(node, owners) and (text := ast.get_docstring(node)):
                found.append(_tidy(text))
    return [text for text in found if len(text) >= _MIN_CHARS]


def _tidy(text: str) -> str:
    """Return ``text`` without the blank lines that would part it into documents."""
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


def _prune(teacher: Path, train: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(teacher)
    documents = read_documents([str(train)], FileTokenizer(teacher), None)
    influence = block_influence(checkpoint, documents[:_CALIBRATION_DOCUMENTS])
    write_pruned(checkpoint, choose_layers(influence, N_LAYERS), out)
    return out


def _fit_recipe(
    teacher: Path, pruned: Path, train: Path, out: Path, minutes: float, say: Callable[[str], None]
) -> Recipe:
    """Return a recipe whose steps fill their share of the budget, from a short timed run."""
    probe = Recipe(
        max_steps=_PROBE_STEPS, row_tokens=_ROW_TOKENS, learning_rate=2e-4, save_steps=10_000
    )
    started_s = 0.0
    step_times_s: list[float] = []

    def note(line: str) -> None:
        nonlocal started_s
        now_s = time.monotonic()
        if line.strip().startswith("step") and started_s:
            step_times_s.append(now_s - started_s)
        started_s = now_s

    _train(teacher, pruned, train, out / "probe", probe, note)
    shutil.rmtree(out / "probe")
    step_s = min(step_times_s)
    steps = max(_MIN_STEPS, int(minutes * 60 * _DISTILL_SHARE / step_s))
    say(f"    {step_s:.1f} s a step of {2 * _ROW_TOKENS} tokens: {steps} steps")
    return replace(probe, max_steps=steps, warmup_steps=max(1, steps // 10))


def _train(
    teacher: Path, student: Path, train: Path, out: Path, recipe: Recipe, say: Callable[[str], None]
) -> Path:
    distill(
        str(teacher), str(student), [str(train)], out, recipe, say=lambda line: say(f"    {line}")
    )
    return out


def _export(
    teacher: Path,
    baseline: Path,
    distilled: Path,
    int4: Path,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Path]:
    """Write the files that the rows are measured on, each verified as it is written."""
    jobs: list[tuple[str, Path, str]] = [
        ("teacher", teacher, "f16"),
        ("student baseline", baseline, "f16"),
        ("student quantized", baseline, "q4_0"),
        ("student distilled", distilled, "f16"),
        ("distilled + int4", int4, "q4_0"),
    ]
    files = {}
    for row, folder, quant in jobs:
        path = out / f"{folder.name}-{quant}.gguf"
        export_model(str(folder), "gguf", path, quant=quant, say=lambda line: say(f"    {line}"))
        files[row] = path
    onnx = out / "student-int4-onnx"
    if onnx.exists():
        shutil.rmtree(onnx)
    export_model(str(int4), "onnx", onnx, quant="q4_0", say=lambda line: say(f"    {line}"))
    files["distilled + int4 (ONNX)"] = onnx
    return files


def _measure(
    teacher: Path, pruned: Path, held_out: Path, files: dict[str, Path], out: Path
) -> DemoResult:
    text = held_out.read_text("utf-8")
    quality = measure_quality(teacher, [pruned, *files.values()], text, _EVAL_TOKENS)
    settings = BenchSettings(prompt_tokens=256, decode_tokens=64, repetitions=3)
    speed = bench_models([str(path) for path in files.values()], settings)
    rows = [
        _row(name, quality[path], result)
        for (name, path), result in zip(files.items(), speed, strict=True)
    ]
    return DemoResult(rows, quality[pruned], out)


def _row(name: str, quality: QualityFigures, speed: BenchResult) -> Row:
    return Row(name=name, quality=quality, speed=speed)


def as_document(result: DemoResult) -> dict[str, Any]:
    """Return ``result`` for ``--json``."""
    return {
        "folder": str(result.folder),
        "pruned_quality": asdict(result.pruned),
        "rows": [
            {"row": row.name, "quality": asdict(row.quality), "speed": row.speed.as_dict()}
            for row in result.rows
        ],
    }

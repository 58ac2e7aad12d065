"""Training on the int4 grid against rounding afterwards, at the same number of tokens.

    python benchmarks/qad.py --teacher T --student S --text F --held-out G \
        --out benchmarks/results/qad.json

The student, already distilled, is trained on from the same point, tokens and settings: in float,
and on the grid that ships. The first is exported as F16, Q4_0, Q4_0 by GPTQ and Q4_K_M with an
importance matrix, the second as Q4_0. With --heads it is trained a third time, embedding and head
on the grid at 4 bits too, and both Q4_0 files stand beside those whose head has 8 bits.

KL is to the teacher, each file on llama.cpp, on held-out text; decoding speeds are of all files in
turns in one process. Closed is the share of the KL that rounding adds and training on the grid
takes back.
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from decoding import CONTEXT_TOKENS, N_DECODE, edgekd_turn, measure_decoding
from record import record

ROW_TOKENS, ROWS = 256, 4
N_EVAL_TOKENS = 4096
DECODE_ROUNDS = 20


class File(NamedTuple):
    """One row: which of the trainings, and how it is written."""

    training: str
    quant: str
    head: str = "q8_0"
    on_text: bool = False


FLOAT, ROUNDED, K_QUANT = (
    "float F16",
    "float rounded to Q4_0",
    "float Q4_K_M with importance matrix",
)
TRAINED, HEAD_4 = "trained on the grid Q4_0", ", head Q4_0"
FILES = {
    FLOAT: File("float", "f16"),
    ROUNDED: File("float", "q4_0"),
    "float rounded to Q4_0 by GPTQ": File("float", "q4_0", on_text=True),
    K_QUANT: File("float", "q4_k_m", on_text=True),
    TRAINED: File("grid", "q4_0"),
}
FILES_OF_HEADS = {
    ROUNDED + HEAD_4: File("float", "q4_0", head="q4_0"),
    TRAINED + HEAD_4: File("grid with head", "q4_0", head="q4_0"),
}


def train(
    teacher: Path, student: Path, text: Path, out: Path, steps: int, **grid_settings: Any
) -> None:
    """Continue ``student`` on ``text``."""
    from edgekd.distill.distill import distill
    from edgekd.distill.recipe import Job, Recipe

    recipe = Recipe(
        steps=steps,
        row_tokens=ROW_TOKENS,
        rows_per_step=ROWS,
        learning_rate=2e-4,
        warmup_steps=max(1, steps // 20),
        compile="full",
        save_steps=10_000,
        **grid_settings,
    )
    job = Job(teacher=str(teacher), student=str(student), data=[str(text)], recipe=recipe)
    distill(job, out)


def export(files: Mapping[str, File], folder: Path, text: Path) -> dict[str, Path]:
    """Write each of ``files`` from the students in ``folder``."""
    from edgekd.export.export_model import export_model
    from edgekd.export.export_options import CalibrationOptions

    paths = {}
    for number, (name, file) in enumerate(files.items()):
        paths[name] = folder / f"{number}.gguf"
        export_model(
            str(folder / file.training),
            "gguf",
            paths[name],
            quant=file.quant,
            head="q4_0" if file.head == "q4_0" else "q8_0",
            calibration=CalibrationOptions(text=text) if file.on_text else None,
        )
    return paths


def measure(teacher: Path, files: Mapping[str, Path], held_out: Path) -> dict[str, dict[str, Any]]:
    """Return quality, size and decoding speed of each file."""
    from edgekd.files import size_of
    from edgekd.runtime.bench_worker import text_ids
    from edgekd.runtime.five_rows import measure_quality
    from edgekd.runtime.loading import default_threads
    from edgekd.runtime.tokenizer import FileTokenizer

    found = measure_quality(
        teacher, list(files.values()), held_out.read_text("utf-8"), N_EVAL_TOKENS
    )
    ids = text_ids(FileTokenizer(teacher), CONTEXT_TOKENS - N_DECODE - 1)
    turns = {name: edgekd_turn(path, ids, default_threads()) for name, path in files.items()}
    speeds = measure_decoding(turns, ROUNDED, DECODE_ROUNDS)
    return {
        name: {
            "kl_nats": found[path].kl_nats,
            "top1_agreement": found[path].top1_agreement,
            "perplexity": found[path].perplexity,
            "bytes": size_of(path),
            "decoding": speeds[name],
        }
        for name, path in files.items()
    }


def gap_closed(rows: Mapping[str, Mapping[str, Any]], head: str = "") -> float:
    """Return how much of what rounding costs training on the grid takes back."""
    kl = {name: row["kl_nats"] for name, row in rows.items()}
    gap = kl[ROUNDED + head] - kl[FLOAT]
    return float((kl[ROUNDED + head] - kl[TRAINED + head]) / gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=190)
    parser.add_argument("--grid-scales", default="derived", choices=["derived", "learned"])
    parser.add_argument("--grid-activations", default="none", choices=["none", "int8"])
    parser.add_argument("--heads", action="store_true", help="4-bit heads beside 8-bit ones")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    teacher, text, steps = arguments.teacher, arguments.text, arguments.steps
    on_grid = {
        "grid": "q4_0",
        "grid_scales": arguments.grid_scales,
        "grid_activations": arguments.grid_activations,
    }
    trainings: dict[str, dict[str, Any]] = {"float": {}, "grid": on_grid}
    files = dict(FILES)
    if arguments.heads:
        trainings["grid with head"] = {**on_grid, "grid_head": "q4_0"}
        files |= FILES_OF_HEADS
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder)
        for name, settings in trainings.items():
            train(teacher, arguments.student, text, folder / name, steps, **settings)
        rows = measure(teacher, export(files, folder, text), arguments.held_out)
    trained, k_quant = rows[TRAINED], rows[K_QUANT]
    result = {
        "trained_tokens": steps * ROW_TOKENS * ROWS,
        "on_grid": on_grid,
        "rows": rows,
        "gap_closed": gap_closed(rows),
        "kl_over_q4_k_m": trained["kl_nats"] / k_quant["kl_nats"],
        "bytes_over_q4_k_m": trained["bytes"] / k_quant["bytes"],
    }
    if arguments.heads:
        result["gap_closed_head_q4_0"] = gap_closed(rows, HEAD_4)
    record(result, arguments.out)


if __name__ == "__main__":
    main()

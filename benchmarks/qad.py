"""Training on the int4 grid against rounding afterwards, at the same number of tokens.

    python benchmarks/qad.py --teacher T --student S --text F --held-out G \
        --out benchmarks/results/qad.json

The student, already distilled, is trained on twice from the same point, tokens and settings: in
float, and on the grid that ships. The first is exported as F16, Q4_0, Q4_0 by GPTQ and Q4_K_M with
an importance matrix, the second as Q4_0. KL is to the teacher, each file on llama.cpp, on held-out
text. Closed is the share of the KL that rounding adds and training on the grid takes back.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

ROW_TOKENS, ROWS = 256, 4
N_EVAL_TOKENS = 4096


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--student", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--steps", type=int, default=190)
    parser.add_argument("--grid-scales", default="derived", choices=["derived", "learned"])
    parser.add_argument("--grid-activations", default="none", choices=["none", "int8"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from edgekd.export.calibrate import CalibrationOptions
    from edgekd.export.export_model import export_model
    from edgekd.files import size_of
    from edgekd.runtime.five_rows import measure_quality

    teacher, text, steps = arguments.teacher, arguments.text, arguments.steps
    on_grid = {
        "grid": "q4_0",
        "grid_scales": arguments.grid_scales,
        "grid_activations": arguments.grid_activations,
    }
    with tempfile.TemporaryDirectory() as holder:
        folder = Path(holder)
        train(teacher, arguments.student, text, folder / "float", steps)
        train(teacher, arguments.student, text, folder / "grid", steps, **on_grid)
        files: dict[str, Path] = {}
        on_text = CalibrationOptions(text=text)
        for name, source, quant, calibration in (
            ("float F16", "float", "f16", None),
            ("float rounded to Q4_0", "float", "q4_0", None),
            ("float rounded to Q4_0 by GPTQ", "float", "q4_0", on_text),
            ("float Q4_K_M with importance matrix", "float", "q4_k_m", on_text),
            ("trained on the grid Q4_0", "grid", "q4_0", None),
        ):
            files[name] = folder / f"{len(files)}.gguf"
            export_model(
                str(folder / source), "gguf", files[name], quant=quant, calibration=calibration
            )
        held_out = arguments.held_out.read_text("utf-8")
        quality = measure_quality(teacher, list(files.values()), held_out, N_EVAL_TOKENS)
        rows: dict[str, dict[str, Any]] = {
            name: {
                "kl_nats": quality[path].kl_nats,
                "top1_agreement": quality[path].top1_agreement,
                "perplexity": quality[path].perplexity,
                "bytes": size_of(path),
            }
            for name, path in files.items()
        }
    kl = {name: row["kl_nats"] for name, row in rows.items()}
    gap = kl["float rounded to Q4_0"] - kl["float F16"]
    closed = (kl["float rounded to Q4_0"] - kl["trained on the grid Q4_0"]) / gap
    grid, k = rows["trained on the grid Q4_0"], rows["float Q4_K_M with importance matrix"]
    result = {
        "trained_tokens": steps * ROW_TOKENS * ROWS,
        "on_grid": on_grid,
        "rows": rows,
        "gap_closed": closed,
        "kl_over_q4_k_m": grid["kl_nats"] / k["kl_nats"],
        "bytes_over_q4_k_m": grid["bytes"] / k["bytes"],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()

"""What pruning to one size costs by depth, by width and by both, and what training wins back.

    python benchmarks/prune_recovery.py --teacher T --text F --held-out G --out \
        benchmarks/results/prune.json

All students are carved from the teacher to the same number of parameters and trained on the same
tokens. KL is to the teacher, on held-out text. Not measured: other sizes, longer training.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import record

MAX_PARAMS, STEPS, ROW_TOKENS, ROWS = 90_000_000, 40, 256, 4


def measure(teacher: Path, text: Path, held_out: Path, way: Any) -> dict[str, Any]:
    """Return initial and recovered KL of a student pruned by ``way``."""
    from edgekd.distill.carve import carve
    from edgekd.distill.distill import distill
    from edgekd.distill.recipe import Job, Recipe
    from edgekd.export.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        student, out = Path(folder) / "student", Path(folder) / "out"
        report = carve(
            open_checkpoint(teacher), student, data=[str(text)], max_params=MAX_PARAMS, way=way
        )
        recipe = Recipe(
            steps=STEPS,
            row_tokens=ROW_TOKENS,
            rows_per_step=ROWS,
            learning_rate=3e-4,
            compile="full",
            save_steps=10_000,
        )
        before = Recipe(steps=1, row_tokens=ROW_TOKENS, learning_rate=1e-12, compile="none")
        found = {}
        for name, chosen in (("before", before), ("after", recipe)):
            job = Job(
                teacher=str(teacher),
                student=str(student),
                data=[str(text)],
                eval_data=[str(held_out)],
                recipe=chosen,
            )
            found[name] = distill(job, out)["held_out"]
    return {
        "sizes": report["sizes"],
        "parameters": report["n_parameters"],
        "trained_tokens": STEPS * ROW_TOKENS * ROWS,
        "initial": {key: value for key, value in found["before"].items() if "eval" in key},
        "recovered": {key: value for key, value in found["after"].items() if "eval" in key},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--teacher", "--text", "--held-out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {
        way: measure(arguments.teacher, arguments.text, arguments.held_out, way)
        for way in ("depth", "width", "both")
    }
    record({"rows": rows}, arguments.out)


if __name__ == "__main__":
    main()

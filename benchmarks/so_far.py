"""What a run of benchmarks/five_rows.py that was cut off had measured by then.

    python benchmarks/so_far.py W --out benchmarks/results/five_rows_gpu.json

Reads the stages that ended in the folder W and the logs of its trainings, which is all that has to
be brought home from a lent machine; W/where.json says which machine it was, as that said itself.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from five_rows import FILES, curve_of, slug
from five_rows_budget import RUNS
from stages import Json

from edgekd.files import write_text_atomic


def so_far(work: Path) -> Json:
    """Return the rows whose text was scored, the trainings that ended, and what each stage took."""
    stages = {path.stem: json.loads(path.read_text("utf-8")) for path in work.glob("stages/*.json")}
    results = {name: stage["result"] for name, stage in stages.items()}
    names = [f"{kind}-{part}" for kind, part in RUNS]
    return {
        "settings": results["settings"],
        "rows": [_row(row, results) for row in FILES if f"quality-{slug(row)}-text" in results],
        "not_measured": [row for row in FILES if f"quality-{slug(row)}-text" not in results],
        "trainings": {name: results[name] for name in names if name in results},
        "stages_s": {name: stage["seconds"] for name, stage in stages.items()},
        "curves": {
            name: curve_of(log)
            for name in names
            if (log := work / name / "training_log.jsonl").exists()
        },
        **json.loads((work / "where.json").read_text("utf-8")),
    }


def _row(row: str, results: dict[str, Json]) -> Json:
    names = ["text", *results["settings"]["questions"]]
    stages = {name: f"quality-{slug(row)}-{name}" for name in names}
    measured: dict[str, Any] = {
        name: results[stage]["models"][0] for name, stage in stages.items() if stage in results
    }
    text = measured.pop("text")
    return {
        "row": row,
        "engine": text["engine"],
        "file_bytes": results[f"export-{slug(row)}"]["bytes"],
        "n_positions": text["text"]["n_positions"],
        "perplexity": text["text"]["perplexity"],
        "kl_nats": text["text"]["to_teacher"]["kl_nats"],
        "top1_agreement": text["text"]["to_teacher"]["top1_agreement"],
        "tasks": {name: found["questions"] for name, found in measured.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(so_far(arguments.work), indent=2) + "\n"
    if arguments.out:
        write_text_atomic(arguments.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()

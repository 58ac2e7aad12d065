"""Run the whole fault matrix and write benchmarks/results/faults.json.

    scripts/faults [--rounds N] [--only TEXT]

Every round draws other moments, bits and limits. Exits with 1 where a cell is bad.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.commands import make_world
from tests.faults.forks import zygote
from tests.faults.matrix import Runner, cells

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "faults.json"


def run(rounds: int, only: str) -> dict[str, Any]:
    """Return what came of every cell whose name has ``only`` in it, over all rounds."""
    chosen = [cell for cell in cells() if only in cell.name]
    states: dict[str, Counter[str]] = {cell.name: Counter() for cell in chosen}
    said: dict[str, list[str]] = {cell.name: [] for cell in chosen}
    with tempfile.TemporaryDirectory() as folder, zygote() as process:
        runner = Runner(process, make_world(Path(folder), process))
        for number in range(rounds):
            for cell in chosen:
                verdict = runner.run(cell)
                came = verdict.outcome if verdict.state == "good" else verdict.state
                states[cell.name][came] += 1
                if verdict.state == "bad":
                    said[cell.name].append(verdict.said)
                print(f"{number + 1}/{rounds} {verdict.state:4} {cell.name}: {came}", flush=True)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "rounds": rounds,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime")},
        "cells": [
            {
                "command": cell.command.name,
                "fault": cell.fault,
                "expected": cell.expected,
                "outcomes": dict(sorted(states[cell.name].items())),
                "bad": said[cell.name],
            }
            for cell in chosen
        ],
    }


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="scripts/faults", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the cells with this in their name")
    given = parser.parse_args()
    record = run(given.rounds, given.only)
    if not given.only:
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    bad = [entry for entry in record["cells"] if entry["bad"]]
    for entry in bad:
        print(f"{entry['command']}, {entry['fault']}: {entry['bad'][0]}", file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()

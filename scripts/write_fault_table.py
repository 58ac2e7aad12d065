"""Write the tables of docs/reliability.md from benchmarks/results; ``--check`` fails if stale.

faults.json is written by scripts/faults, fuzz.json by scripts/fuzz.
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "reliability.md"
_MARK, _END = "<!-- {}: scripts/write_fault_table.py -->\n", "<!-- end of {} -->"


def fault_table(record: dict[str, Any]) -> str:
    """Return command x fault with what came of each."""
    faults = list(dict.fromkeys(entry["fault"] for entry in record["cells"]))
    commands = list(dict.fromkeys(entry["command"] for entry in record["cells"]))
    found = {(entry["command"], entry["fault"]): cell(entry) for entry in record["cells"]}
    lines = [f"| | {' | '.join(faults)} |", "|---|" + "---|" * len(faults)]
    for command in commands:
        cells = [found.get((command, fault), "–") for fault in faults]
        lines.append(f"| `{command}` | {' | '.join(cells)} |")
    n_runs = sum(sum(entry["outcomes"].values()) for entry in record["cells"])
    n_bad = sum(len(entry["bad"]) for entry in record["cells"])
    head = (
        f"{len(record['cells'])} cells, {record['rounds']} times each: {n_runs} runs, {n_bad} bad "
        f"(Python {record['python']}, {record['system']}, commit {record['commit']}, "
        f"{record['date'][:10]}).\n\n"
    )
    return head + "\n".join(lines) + "\n"


def cell(entry: dict[str, Any]) -> str:
    """Return what came of one cell; how often, where it differed."""
    outcomes = entry["outcomes"]
    if len(outcomes) == 1:
        return str(next(iter(outcomes)))
    return ", ".join(f"{name} {count}" for name, count in outcomes.items())


def fuzz_table(runs: list[dict[str, Any]]) -> str:
    """Return one row for each target's last run."""
    lines = [
        "| target | minutes | runs | branches | findings | crashes, hangs | not again | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        lines.append(
            f"| {run['target']} | {run['minutes']:.0f} | {run['executions']:,} "
            f"| {run['branches_covered']} | {len(run['findings'])} "
            f"| {run['crashes_hangs_or_memory']} | {run['not_reproduced']} | {run['date'][:10]} |"
        )
    return "\n".join(lines) + "\n"


def put(page: str, name: str, table: str) -> str:
    """Return ``page`` with ``table`` between the marks of ``name``."""
    start, end = _MARK.format(name), _END.format(name)
    before, found, rest = page.partition(start)
    if not found or end not in rest:
        sys.exit(f"{TARGET} has no marks for the table {name!r}")
    return before + start + table + end + rest.partition(end)[2]


def main() -> None:
    """Put both tables between their marks."""
    text = TARGET.read_text("utf-8")
    page = put(text, "faults", fault_table(json.loads((RESULTS / "faults.json").read_text())))
    page = put(page, "fuzzing", fuzz_table(json.loads((RESULTS / "fuzz.json").read_text())))
    if "--check" not in sys.argv:
        TARGET.write_text(page, "utf-8")
    elif text != page:
        sys.exit("docs/reliability.md is stale; run: python scripts/write_fault_table.py")


if __name__ == "__main__":
    main()

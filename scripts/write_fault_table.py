"""Write the tables of docs/reliability.md from benchmarks/results; ``--check`` fails if stale.

faults.json is written by scripts/faults, fuzz.json by scripts/fuzz.
"""

import json
from pathlib import Path
from typing import Any

from generated import put, write_or_check

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "reliability.md"


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
    """Return one row for each target: all of its runs together, and when the last one was."""
    lines = [
        "| target | minutes | runs | branches | findings | crashes, hangs | not again | on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target in dict.fromkeys(run["target"] for run in runs):
        own = [run for run in runs if run["target"] == target]
        findings = {place for run in own for place in run["findings"]}
        lines.append(
            f"| {target} | {total(own, 'minutes'):.0f} | {total(own, 'executions'):,} "
            f"| {max(run['branches_covered'] for run in own)} | {len(findings)} "
            f"| {total(own, 'crashes_hangs_or_memory')} | {total(own, 'not_reproduced')} "
            f"| {own[-1]['date'][:10]} |"
        )
    return "\n".join(lines) + "\n"


def total(runs: list[dict[str, Any]], field: str) -> Any:
    """Return the sum of ``field`` over ``runs``."""
    return sum(run[field] for run in runs)


def main() -> None:
    """Put both tables between their marks."""
    text = TARGET.read_text("utf-8")
    page = put(text, "faults", fault_table(json.loads((RESULTS / "faults.json").read_text())))
    page = put(page, "fuzzing", fuzz_table(json.loads((RESULTS / "fuzz.json").read_text())))
    write_or_check(TARGET, page)


if __name__ == "__main__":
    main()

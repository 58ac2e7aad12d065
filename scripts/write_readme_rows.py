"""Write the five rows into README.md from benchmarks/results; ``--check`` fails if they are stale.

five_rows.json is written by benchmarks/five_rows.py. As long as there is none, nothing is done.
Better or worse, beyond two standard errors or not: what the sentences say comes from the figures.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import put, write_or_check

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "five_rows.json"
QUALITIES = {
    "perplexity": ("perplexity", ".2f", False),
    "kl_nats": ("KL to teacher, nats", ".4f", False),
    "top1_agreement": ("top-1", ".1%", True),
}
"""Of a field: its name, how it is written, and whether more is better."""
CHANGES = {"perplexity": "+.1%", "kl_nats": "+.4f", "top1_agreement": "+.1%"}
"""How a difference is written; that of perplexity is relative."""
TASK_FIELD = "acc_tokens"  # as in the five rows of edgekd report

Json = dict[str, Any]


def section(result: Json) -> str:
    """Return the table, how it came about, and what it shows."""
    parts = [rows_table(result), "", provenance(result), "", *verdicts(result)]
    return "\n".join(parts) + "\n"


def rows_table(result: Json) -> str:
    """Return one line for each row."""
    tasks = list(result["rows"][0]["tasks"])
    names = [name for name, _, _ in QUALITIES.values()]
    head = ["row", "engine", "params", "file", "ms/token", "tokens/s", "peak memory"]
    lines = [[*head, *tasks, *names], ["---"] * len([*head, *tasks, *names])]
    for row in result["rows"]:
        rates = row["tokens_per_s"]
        spread = "" if rates["stdev"] is None else f" ± {rates['stdev']:.1f}"
        peak = row["peak_rss_bytes"]
        cells = [row["row"], row["engine"], f"{row['n_parameters'] / 1e6:.1f}M"]
        cells += [megabytes(row["file_bytes"]), f"{row['ms_per_token']:.2f}"]
        cells += [f"{rates['mean']:.1f}{spread}", megabytes(peak) if peak else "unknown"]
        cells += [shown(row["tasks"][task][TASK_FIELD], ".1%") for task in tasks]
        cells += [shown(row[field], shape) for field, (_, shape, _) in QUALITIES.items()]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(figure: Json, shape: str) -> str:
    """Return a figure with its standard error, where there is one."""
    value, error = format(figure["value"], shape), figure["standard_error"]
    return value if error is None else f"{value} ± {format(error, shape)}"


def megabytes(size_bytes: float) -> str:
    """Return a size in MB."""
    return f"{size_bytes / 1e6:.1f} MB"


def provenance(result: Json) -> str:
    """Return where, when and on how much all was measured."""
    machine, rows = result["machine"], result["rows"]
    asked = ", ".join(f"{name}: {found['n_questions']}" for name, found in rows[0]["tasks"].items())
    questions = f" Questions, by likelihood per token: {asked}." if asked else ""
    gpus = ", ".join(str(gpu.get("name", gpu)) for gpu in machine.get("gpus") or [])
    noisy = "" if result["speeds_valid"] else " Other work disturbed the speeds."
    return (
        f"Measured on {result['date']} by [five_rows.py](benchmarks/five_rows.py) in "
        f"{result['minutes']:.0f} minutes ([all figures](benchmarks/results/five_rows.json)): "
        f"{machine['processor']}, {machine['n_usable_cores']} cores, "
        f"{machine['memory_bytes'] / 1e9:.0f} GB{', ' + gpus if gpus else ''}. Teacher: "
        f"{result['teacher']}. Each student was trained on "
        f"{result['trained_tokens_per_row']:,} tokens, its text was scored at "
        f"{rows[0]['n_positions']:,} positions.{questions} ± is a standard error, of tokens/s the "
        f"standard deviation.{noisy}"
    )


def verdicts(result: Json) -> Iterator[str]:
    """Yield a line for each pair of rows: every figure of both, and what the difference is."""
    rows = {row["row"]: row for row in result["rows"]}
    pairs = {(each["new"], each["base"], each["figure"]): each for each in result["differences"]}
    for new, old in dict.fromkeys((new, old) for new, old, _ in pairs):
        said = [
            f"{name} {difference(pairs[new, old, field], CHANGES[field], more_is_better)}"
            for field, (name, _, more_is_better) in QUALITIES.items()
        ]
        for task, found in rows[new]["tasks"].items():
            other = rows[old]["tasks"][task]
            said.append(f"{task} {verdict(found[TASK_FIELD], other[TASK_FIELD], True)}")
        yield f"- **{new}** against {old}: {'; '.join(said)}."
    yield ""
    yield (
        "Differences on the text are paired, window by window. Of the questions the standard error "
        "is taken as the root of both squares' sum, as if they had not been the same."
    )


def difference(found: Json, shape: str, more_is_better: bool) -> str:
    """Return a paired difference, and whether it is more than two of its standard errors."""
    value, error = found["difference"], found["standard_error"]
    if error is None:
        return "not comparable, a standard error is unknown"
    said = judged(value if more_is_better else -value, error)
    return f"{said} ({format(value, shape)} ± {format(error, shape.lstrip('+'))})"


def verdict(new: Json, old: Json, more_is_better: bool) -> str:
    """Return which is better, and whether by more than two standard errors of the difference."""
    gain = (new["value"] - old["value"]) * (1 if more_is_better else -1)
    if new["standard_error"] is None or old["standard_error"] is None:
        return "not comparable, a standard error is unknown"
    return judged(gain, math.hypot(new["standard_error"], old["standard_error"]))


def judged(gain: float, error: float) -> str:
    """Return what a ``gain`` with a standard ``error`` is."""
    if gain == 0:
        return "equal"
    beyond = "beyond" if abs(gain) > 2 * error else "within"
    return f"{'better' if gain > 0 else 'worse'}, {beyond} two standard errors"


def main() -> None:
    """Put the section between its marks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=ROOT / "README.md")
    arguments = parser.parse_args()
    if not arguments.result.exists():
        return
    made = section(json.loads(arguments.result.read_text("utf-8")))
    page = put(arguments.page.read_text("utf-8"), "five rows", made)
    write_or_check(arguments.page, page)


if __name__ == "__main__":
    main()

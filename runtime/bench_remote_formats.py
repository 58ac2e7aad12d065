"""What a phone measured, as text: llama-bench's rows have fewer figures than edgekd's document."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from edgekd.errors import RecipeError
from edgekd.runtime.llama_bench_rows import samples_of, scenario_of
from edgekd.runtime.stats import summarise

_COLUMNS = ("model", "test", "tokens_per_s", "ci95_low", "ci95_high", "median", "n", "threads")


def render_phone(document: dict[str, Any], form: str) -> str:
    """Return ``document`` in one of ``PHONE_FORMS``.

    Raises:
        RecipeError: a phone's rows have no such form.
    """
    if form not in PHONE_FORMS:
        raise RecipeError(f"no form {form!r} over adb; there are {', '.join(PHONE_FORMS)}")
    return PHONE_FORMS[form](document)


def _figures(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one line a row, everything computed again from its samples."""
    lines = []
    for row in document["rows"]:
        scenario = scenario_of(row)
        rates = summarise([scenario.n_tokens / seconds for seconds in samples_of(row)])
        low, high = rates.ci95 or (None, None)
        name = PurePath(row["model_filename"]).name
        values = (name, scenario.name, rates.mean, low, high, rates.median, rates.n)
        lines.append(dict(zip(_COLUMNS, (*values, row.get("n_threads")), strict=True)))
    return lines


def _table(document: dict[str, Any]) -> str:
    machine = document["machine"]
    chip = machine["soc_model"] or machine["processor"] or machine["architecture"]
    lines = [f"{machine['address']}: {machine['board'] or 'a phone'}, {chip}, {machine['system']}"]
    for entry in _figures(document):
        margin = "" if entry["ci95_high"] is None else _margin(entry)
        rate = f"{entry['tokens_per_s']:.1f}{margin} tokens/s"
        lines.append(f"{entry['model']}  {entry['test']:>8}  {rate}")
    return "\n".join(lines + [f"INVALID: {reason}" for reason in document["invalid_reasons"]])


def _markdown(document: dict[str, Any]) -> str:
    lines = ["| model | test | tokens/s (95 %) |", "| --- | --- | ---: |"]
    for entry in _figures(document):
        margin = "" if entry["ci95_high"] is None else _margin(entry)
        rate = f"{entry['tokens_per_s']:.1f}{margin}"
        lines.append(f"| {entry['model']} | {entry['test']} | {rate} |".replace("\n", " "))
    return "\n".join(lines + [f"\n- INVALID: {r}" for r in document["invalid_reasons"]])


def _margin(entry: dict[str, Any]) -> str:
    return f" \u00b1 {entry['ci95_high'] - entry['tokens_per_s']:.1f}"


def _csv(document: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_figures(document))
    return out.getvalue().rstrip("\n")


PHONE_FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": _table,
    "json": lambda document: json.dumps(document, indent=2),
    "jsonl": lambda document: "\n".join(json.dumps(row) for row in document["rows"]),
    "csv": _csv,
    "md": _markdown,
}

"""A document of edgekd bench as text: a table for people, JSON, JSON lines, CSV and Markdown.

Every form is a function from the document (docs/schemas/bench-1.json) to a string.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from edgekd.errors import RecipeError
from edgekd.runtime.llama_bench_rows import processor_label, to_jsonl
from edgekd.runtime.providers import label_of_engine
from edgekd.runtime.quality_figures import (
    QUALITY_COLUMNS,
    bench_quality_lines,
    quality_columns,
    quality_rows,
)
from edgekd.units import format_bytes, format_duration

_TABLE_WIDTH = 150
_MODEL_COLUMNS = (
    "model",
    "engine",
    "size",
    "load cold",
    "load warm",
    "first token",
    "peak memory",
    "private",
    "mapped weights",
    "KV/token",
)
_SPEED_COLUMNS = (
    "model",
    "test",
    "tokens/s (95 %)",
    "median",
    "of limit",
    "TTFT",
    "ms/token p50 / p95 / p99",
    "KV cache",
    "J/token",
)


def render(document: dict[str, Any], form: str) -> str:
    """Return ``document`` in one of ``FORMS``.

    Raises:
        RecipeError: there is no such form.
    """
    if form not in FORMS:
        raise RecipeError(f"no form {form!r}; there are {', '.join(FORMS)}")
    return FORMS[form](document)


def to_json(document: dict[str, Any]) -> str:
    """Return the whole document."""
    return json.dumps(document, indent=2)


def to_table(document: dict[str, Any]) -> str:
    """Return the tables, the limits of the machine before them and the warnings after."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = io.StringIO()
    console = Console(file=out, width=_TABLE_WIDTH, color_system=None)
    for line in limit_lines(document):
        console.print(escape(line))
    for _, columns, rows in _tables(document):
        table = Table()
        for place, column in enumerate(columns):
            table.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    for line in note_lines(document):
        console.print(escape(line))
    return out.getvalue().rstrip("\n")


def to_markdown(document: dict[str, Any]) -> str:
    """Return the tables in Markdown, with limits and warnings."""
    parts = ["\n".join(f"- {line}" for line in limit_lines(document))]
    for _, columns, rows in _tables(document):
        parts.append(markdown_table(columns, rows, n_text_columns=2))
    parts.append("\n".join(f"- {line}" for line in note_lines(document)))
    return "\n\n".join(part for part in parts if part)


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], n_text_columns: int
) -> str:
    """Return a table whose first columns are text, the others numbers."""
    kinds = ["---" if place < n_text_columns else "---:" for place in range(len(columns))]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (columns, kinds, *rows))


def to_csv(document: dict[str, Any]) -> str:
    """Return one line for each test of each model, units in the names of the columns."""
    rows = [
        _figures(result, entry) for result in document["results"] for entry in result["scenarios"]
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def limit_lines(document: dict[str, Any]) -> list[str]:
    """Return what the machine is and can do at most, and how far each engine was seen to work."""
    machine, limits = document["machine"], document["roofline"]
    engines = dict.fromkeys(result["engine"] for result in document["results"])
    lines = [f"{processor_label(machine)}, {machine['n_usable_cores']} cores"]
    lines += [f"{engine}: {label_of_engine(engine)}" for engine in engines]
    if limits is None:
        return lines
    read, gemm = (limits[name]["value"] for name in ("read_bytes_per_s", "gemm_flop_per_s"))
    if read is None or gemm is None:
        return [*lines, f"limits unknown: {limits['read_bytes_per_s']['reason']}"]
    threads = limits["n_threads"]
    return [
        *lines,
        f"limits on {threads} threads: reads {read / 1e9:.1f} GB/s, "
        f"multiplies {gemm / 1e9:.0f} GFLOP/s (fp32)",
    ]


def warning_lines(document: dict[str, Any]) -> list[str]:
    """Return what spoils the figures, what to do, and what is not known."""
    lines = [
        f"{'INVALID' if entry['invalid'] else 'warning'}: {entry['message']}; {entry['advice']}"
        for entry in document["conditions"]["warnings"]
    ]
    for result in document["results"]:
        known = [entry["message"] for entry in document["conditions"]["warnings"]]
        name = PurePath(result["model"]).name
        lines += [f"INVALID: {name} {r}" for r in result["invalid_reasons"] if r not in known]
        if soak := result["soak"]:
            lines.append(f"soak: {name} {_soak(soak)}")
    energies = [entry["energy_per_token"] for r in document["results"] for entry in r["scenarios"]]
    reasons = [energy["reason"] for energy in energies if energy["value"] is None]
    lines += [f"energy unavailable: {reason}" for reason in dict.fromkeys(reasons)]
    return lines


def note_lines(document: dict[str, Any]) -> list[str]:
    """Return what quality was measured on, if any, then the warnings."""
    return [*bench_quality_lines(document), *warning_lines(document)]


def _tables(document: dict[str, Any]) -> list[tuple[str, Sequence[str], list[tuple[str, ...]]]]:
    """Return caption, columns and rows of each table; that of quality only where it was asked."""
    tables: list[tuple[str, Sequence[str], list[tuple[str, ...]]]] = [
        ("models", _MODEL_COLUMNS, _model_rows(document)),
        ("tests", _SPEED_COLUMNS, _speed_rows(document)),
        ("quality", QUALITY_COLUMNS, quality_rows(document)),
    ]
    return [entry for entry in tables if entry[2]]


def _soak(soak: dict[str, Any]) -> str:
    first, steady = soak["first_tokens_per_s"], soak["steady_tokens_per_s"]
    took = format_duration(soak["seconds"])
    if steady is None:
        return f"was not steady after {took}"
    return f"{first:.1f} tokens/s at first, {steady:.1f} once steady ({steady / first:.0%}, {took})"


def _model_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            PurePath(result["model"]).name,
            result["engine"],
            format_bytes(result["file_bytes"]),
            _cold(result["cold_start"]),
            f"{result['warm_start']['load_s']:.2f} s",
            f"{(result['cold_start'] or result['warm_start'])['process_to_first_token_s']:.2f} s",
            _bytes(result["memory"]["peak_rss_bytes"]["value"]),
            _bytes(result["memory"]["private_bytes"]["value"]),
            _bytes(result["memory"]["mapped_weights_bytes"]["value"]),
            _bytes(result["facts"]["kv_bytes_per_token"]["value"]),
        )
        for result in document["results"]
    ]


def _cold(start: dict[str, Any] | None) -> str:
    if start is None:
        return "not asked"
    mark = {True: "", False: " (not cold)", None: " (not verified)"}[start["cold"]]
    return f"{start['load_s']:.2f} s{mark}"


def _speed_rows(document: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for result in document["results"]:
        for entry in result["scenarios"]:
            gaps, share = entry["gap_ms"], entry["roofline_share"]
            joules = entry["energy_per_token"]["value"]
            rows.append(
                (
                    PurePath(result["model"]).name,
                    entry["name"],
                    _with_interval(entry["tokens_per_s"]),
                    f"{entry['tokens_per_s']['median']:.1f}",
                    "" if share is None else f"{share:.0%}",
                    f"{entry['ttft_s']['median'] * 1e3:.0f} ms" if entry["ttft_s"] else "",
                    " / ".join(f"{gaps[p]:.2f}" for p in gaps) if gaps else "",
                    _bytes(entry["kv_bytes"]),
                    "" if joules is None else f"{joules:.3f}",
                )
            )
    return rows


def _with_interval(summary: dict[str, Any]) -> str:
    if summary["ci95"] is None:
        return f"{summary['mean']:.1f}"
    return f"{summary['mean']:.1f} \u00b1 {summary['ci95'][1] - summary['mean']:.1f}"


def _figures(result: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    rates, gaps = entry["tokens_per_s"], entry["gap_ms"] or {}
    low, high = rates["ci95"] or (None, None)
    return {
        "model": result["model"],
        "engine": result["engine"],
        "threads": result["n_threads"],
        "test": entry["name"],
        "tokens_per_s": rates["mean"],
        "tokens_per_s_ci95_low": low,
        "tokens_per_s_ci95_high": high,
        "tokens_per_s_median": rates["median"],
        "tokens_per_s_stdev": rates["stdev"],
        "n": rates["n"],
        "ttft_s_median": entry["ttft_s"]["median"] if entry["ttft_s"] else None,
        **{f"gap_ms_{name}": gaps.get(name) for name in ("p50", "p95", "p99")},
        "roofline_share": entry["roofline_share"],
        "energy_j_per_token": entry["energy_per_token"]["value"],
        "kv_bytes": entry["kv_bytes"],
        "peak_rss_bytes": result["memory"]["peak_rss_bytes"]["value"],
        "valid": result["valid"],
        **quality_columns(result.get("quality")),
    }


def _bytes(size: float | None) -> str:
    return "unknown" if size is None else format_bytes(size)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_html(document: dict[str, Any]) -> str:
    """Return one HTML file with pictures, see runtime/bench_html.py."""
    from edgekd.runtime.bench_html import bench_page
    from edgekd.runtime.html_page import table

    tables = [
        table(caption, columns, rows, n_text_columns=2)
        for caption, columns, rows in _tables(document)
    ]
    return bench_page(document, tables, limit_lines(document), warning_lines(document))


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": to_table,
    "json": to_json,
    "jsonl": to_jsonl,
    "csv": to_csv,
    "md": to_markdown,
    "html": to_html,
}

"""The five rows as one HTML file: the table, quality against size and speed, then the benchmark."""

from collections.abc import Sequence
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.bench_html import machine_section, picture_sections, versions_section
from edgekd.runtime.charts import Point, Series, scatter_chart
from edgekd.runtime.five_rows import COLUMNS, N_TEXT_COLUMNS, row_cells

_Z95 = 1.959964  # two-sided 95 % of a normal distribution: the errors are of a bootstrap
_QUALITIES = {
    "kl_nats": ("KL to teacher", "nats a token, less is better", 1.0),
    "task_accuracy": ("Right answers", "% of the questions, more is better", 100.0),
    "perplexity": ("Perplexity", "less is better", 1.0),
}


def report_page(
    document: dict[str, Any], machine_lines: Sequence[str], warnings: Sequence[str]
) -> str:
    """Return the page of a report (docs/report.md)."""
    rows, bench = row_views(document), document["bench"]
    missing = [f"{name}: missing, {reason}" for name, reason in document["missing"].items()]
    rows_table = page.table(
        "measured on this machine, each on the engine that runs it; tokens/s \u00b1 standard "
        "deviation",
        COLUMNS,
        [row_cells(row) for row in rows],
        N_TEXT_COLUMNS,
    )
    names = [row["row"] for row in rows]
    sections = [
        page.section("The five rows", rows_table, page.notes(missing) if missing else ""),
        page.section("What quality costs", *_trade_offs(rows)),
        machine_section(bench, machine_lines, warnings),
        *picture_sections(bench, names),
        versions_section(bench),
    ]
    return page.whole_page("edgekd report", bench["created"], sections)


def row_views(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``document``, each with its measurements beside it."""
    results = document["bench"]["results"]
    return [{**row, "speed": results[row["result"]]} for row in document["rows"]]


def _trade_offs(rows: Sequence[dict[str, Any]]) -> list[str]:
    measured = [
        name
        for name in _QUALITIES
        if any((row["quality"] or {}).get(name) is not None for row in rows)
    ]
    if not measured:
        return [
            '<p class="none">No quality was measured: neither text nor questions were given.</p>'
        ]
    pictures = [
        _trade_off(rows, name, against) for name in measured for against in ("size", "speed")
    ]
    return [f'<div class="grid">{"".join(pictures)}</div>']


def _trade_off(rows: Sequence[dict[str, Any]], name: str, against: str) -> str:
    what, unit, factor = _QUALITIES[name]
    title = f"{what} against {against}"
    note = f"{unit}; bars: 95 % intervals"
    series = [Series(row["row"], _points(row, name, against, factor)) for row in rows]
    x_label = "size of the file, MB" if against == "size" else "tokens/s while decoding"
    picture = scatter_chart(title, note, series, x_label, f"{what}, {unit.split(',')[0]}")
    return page.figure(title, note, picture, [one.name for one in series])


def _points(row: dict[str, Any], name: str, against: str, factor: float) -> tuple[Point, ...]:
    quality, speed = row["quality"] or {}, row["speed"]
    value = quality.get(name)
    if value is None:
        return ()
    half = _Z95 * quality["standard_errors"].get(name, 0.0)
    rates = next(e for e in speed["scenarios"] if e["kind"] == "decode")["tokens_per_s"]
    is_size = against == "size"
    return (
        Point(
            speed["file_bytes"] / 1e6 if is_size else rates["mean"],
            value * factor,
            (max(0.0, value - half) * factor, (value + half) * factor) if half else None,
            None
            if is_size or rates["ci95"] is None
            else (max(0.0, rates["ci95"][0]), rates["ci95"][1]),
            f"{row['row']}: {value * factor:.4g}",
        ),
    )

"""The five rows as one HTML file: the table, quality against size and speed, then the benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.bench_formats import limit_lines, warning_lines
from edgekd.runtime.bench_html import machine_section, picture_sections, versions_section
from edgekd.runtime.charts import Point, Series, scatter_chart
from edgekd.runtime.five_rows import COLUMNS, N_TEXT_COLUMNS, first_decode, row_cells
from edgekd.runtime.report_formats import file_lines, missing_lines, quality_lines, row_views

_Z95 = 1.959964  # two-sided 95 % of a normal distribution: the errors are of a bootstrap
_QUALITIES = {
    "kl_nats": ("KL to teacher", "nats a token", 1.0, False),
    "task_accuracy": ("Right answers", "% of the questions", 100.0, True),
    "perplexity": ("Perplexity", "on the text", 1.0, False),
}
"""Title, unit, factor, and whether more is better."""

Rows = Sequence[Mapping[str, Any]]


def report_page(document: dict[str, Any]) -> str:
    """Return the page of a report (docs/report.md)."""
    rows, bench = row_views(document), document["bench"]
    table = page.table(
        "measured on this machine, each on the engine that runs it; tokens/s \u00b1 standard "
        "deviation",
        COLUMNS,
        [row_cells(row) for row in rows],
        N_TEXT_COLUMNS,
    )
    lines = [*file_lines(rows), *missing_lines(document), *quality_lines(document)]
    sections = [
        page.section("The five rows", *_doubts(bench), table, page.notes(lines)),
        page.section("What quality costs", *_trade_offs(rows)),
        machine_section(bench, limit_lines(bench), warning_lines(bench)),
        *picture_sections(bench, [row["row"] for row in rows]),
        versions_section(bench),
    ]
    return page.whole_page("edgekd report", bench["created"], sections)


def _doubts(bench: Mapping[str, Any]) -> list[str]:
    if bench["valid"]:
        return []
    return [page.alert("The speeds are not to be relied on: see Machine and conditions.")]


def frontier(
    points: Sequence[Point], *, more_x_is_better: bool, more_y_is_better: bool
) -> list[tuple[float, float]]:
    """Return the points that no other beats on both axes, from left to right.

    A point as good on one axis and better on the other beats.
    """
    x_sign, y_sign = (1 if better else -1 for better in (more_x_is_better, more_y_is_better))
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (x_sign * p.x, y_sign * p.y), reverse=True):
        if not best or y_sign * point.y > y_sign * best[-1][1]:
            best.append((point.x, point.y))
    return sorted(best)


def _trade_offs(rows: Rows) -> list[str]:
    measured = [name for name in _QUALITIES if any(_quality(row, name) is not None for row in rows)]
    if not measured:
        return [page.nothing("No quality was measured: neither text nor questions were given.")]
    return [
        page.grid([_trade_off(rows, name, against) for against in ("size", "speed")])
        for name in measured
    ]


def _trade_off(rows: Rows, name: str, against: str) -> str:
    what, unit, factor, more_is_better = _QUALITIES[name]
    title = f"{what} against {against}"
    better = "more" if more_is_better else "less"
    note = f"{unit}, {better} is better; whiskers: 95 % intervals; dashed: beaten by no other row"
    series = [Series(row["row"], _points(row, name, against, factor)) for row in rows]
    best = frontier(
        [point for one in series for point in one.points],
        more_x_is_better=against == "speed",
        more_y_is_better=more_is_better,
    )
    x_label = "size of the file, MB" if against == "size" else "tokens/s while decoding"
    picture = scatter_chart(title, note, series, x_label, f"{what}, {unit}", best)
    return page.figure(title, note, picture, [one.name for one in series])


def _points(row: Mapping[str, Any], name: str, against: str, factor: float) -> tuple[Point, ...]:
    value, x = _quality(row, name), _x(row, against)
    if value is None or x is None:
        return ()
    half = _Z95 * row["quality"]["standard_errors"].get(name, 0.0)
    return (
        Point(
            x[0],
            value * factor,
            (max(0.0, value - half) * factor, (value + half) * factor) if half else None,
            x[1],
            f"{row['row']}: {value * factor:.4g}",
        ),
    )


def _x(row: Mapping[str, Any], against: str) -> tuple[float, tuple[float, float] | None] | None:
    """Return size or speed with its interval, if known."""
    if against == "size":
        return row["speed"]["file_bytes"] / 1e6, None
    if (entry := first_decode(row["speed"])) is None:
        return None
    mean, interval = (entry["tokens_per_s"][name] for name in ("mean", "ci95"))
    return mean, interval and (max(0.0, interval[0]), interval[1])


def _quality(row: Mapping[str, Any], name: str) -> float | None:
    value: float | None = (row["quality"] or {}).get(name)
    return value

"""The five rows as one HTML file: the table, quality against size and speed, then the benchmark."""

from collections.abc import Mapping
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.bench_formats import limit_lines, warning_lines
from edgekd.runtime.bench_html import machine_section, picture_sections, versions_section
from edgekd.runtime.five_rows import COLUMNS, N_TEXT_COLUMNS, row_cells
from edgekd.runtime.report_formats import file_lines, missing_lines, quality_lines, row_views
from edgekd.runtime.trade_offs import trade_offs


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
        page.section("What quality costs", *trade_offs(rows)),
        machine_section(bench, limit_lines(bench), warning_lines(bench)),
        *picture_sections(bench, [row["row"] for row in rows]),
        versions_section(bench),
    ]
    return page.whole_page("edgekd report", bench["created"], sections)


def _doubts(bench: Mapping[str, Any]) -> list[str]:
    if bench["valid"]:
        return []
    return [page.alert("The speeds are not to be relied on: see Machine and conditions.")]

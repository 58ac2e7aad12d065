"""A document of edgekd report as text: a table for people, JSON, Markdown and HTML.

Every form is a function from the document (docs/schemas/report-1.json) to a string.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from edgekd.errors import DataError, RecipeError
from edgekd.runtime.bench_formats import limit_lines, markdown_table, to_json, warning_lines
from edgekd.runtime.five_rows import COLUMNS, N_TEXT_COLUMNS, row_cells, rows_table
from edgekd.runtime.quality_figures import text_lines
from edgekd.runtime.report import SCHEMA
from edgekd.untrusted import parse_json

_TABLE_WIDTH = 170


def render_report(document: dict[str, Any], form: str) -> str:
    """Return ``document`` in one of ``FORMS``.

    Raises:
        RecipeError: there is no such form.
    """
    if form not in FORMS:
        raise RecipeError(f"no form {form!r}; there are {', '.join(FORMS)}")
    return FORMS[form](document)


def read_report(path: Path) -> dict[str, Any]:
    """Return the document that ``edgekd report --save`` wrote to ``path``.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        document = parse_json(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON file: {error}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        raise DataError(f"{path} has schema {found!r}, {SCHEMA!r} is needed: edgekd report --save")
    return dict(document)


def row_views(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of ``document``, each with its measurements beside it as ``speed``."""
    results = document["bench"]["results"]
    return [{**row, "speed": results[row["result"]]} for row in document["rows"]]


def file_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which file each of ``row_views`` was measured on."""
    return [f"{row['row']}: {PurePath(row['speed']['model']).name}" for row in rows]


def missing_lines(document: Mapping[str, Any]) -> list[str]:
    """Return the rows that were left out."""
    return [f"{name}: missing, {reason}" for name, reason in document["missing"].items()]


def quality_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what quality was measured on."""
    settings, reference = document["quality_settings"], document["quality_reference"]
    if settings is None:
        return ["quality: not asked, neither text nor questions were given"]
    counts = [row["quality"] for row in document["rows"] if row["quality"]]
    n_questions = max((one["n_questions"] for one in counts), default=0)
    lines = text_lines(settings, reference, counts)
    if n_questions:
        asked = PurePath(settings["questions"]).name
        lines.append(f"task: {n_questions} questions of {asked}, {settings['shots']} shots")
    return lines


def to_table(document: dict[str, Any]) -> str:
    """Return the five rows for a terminal, with what was measured and what spoils it."""
    from rich.console import Console
    from rich.markup import escape

    out = io.StringIO()
    console = Console(file=out, width=_TABLE_WIDTH, color_system=None)
    for line in limit_lines(document["bench"]):
        console.print(escape(line))
    console.print(rows_table(row_views(document)))
    for line in _notes(document):
        console.print(escape(line))
    return out.getvalue().rstrip("\n")


def to_markdown(document: dict[str, Any]) -> str:
    """Return the five rows in Markdown, with what was measured and what spoils it."""
    cells = [row_cells(row) for row in row_views(document)]
    table = markdown_table(COLUMNS, cells, N_TEXT_COLUMNS)
    before = [f"- {line}" for line in limit_lines(document["bench"])]
    after = [f"- {line}" for line in _notes(document)]
    return "\n\n".join(["\n".join(before), table, "\n".join(after)])


def to_html(document: dict[str, Any]) -> str:
    """Return one HTML file with pictures, see runtime/report_html.py."""
    from edgekd.runtime.report_html import report_page

    return report_page(document)


def _notes(document: dict[str, Any]) -> list[str]:
    return [
        *file_lines(row_views(document)),
        *missing_lines(document),
        *quality_lines(document),
        *warning_lines(document["bench"]),
    ]


FORMS: dict[str, Callable[[dict[str, Any]], str]] = {
    "table": to_table,
    "json": to_json,
    "md": to_markdown,
    "html": to_html,
}

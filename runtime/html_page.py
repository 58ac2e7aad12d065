"""A web page that is one file: no script, nothing fetched, its style allowed by hash alone."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgekd.runtime.marks import mark, shorten

_FOLDER = Path(__file__).parent / "page"
_LEGEND_CELLS = 40
_STYLES = ("theme.css", "report.css")


def whole_page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """Return the page; ``sections`` are HTML, the titles are text."""
    style = "".join((_FOLDER / name).read_text("utf-8") for name in _STYLES)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'<header><h1>{escape(title)} <span class="quiet">{escape(subtitle)}</span></h1></header>'
        f"<main>{''.join(sections)}</main></body></html>"
    )


def section(title: str, *content: str) -> str:
    """Return a part of the page under a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def figure(title: str, note: str, picture: str, legend: Sequence[str] = ()) -> str:
    """Return a picture with its title, a note, and the names of its series."""
    entries = "".join(
        f'<li><svg viewBox="0 0 18 16" aria-hidden="true">{mark(9, 8, place)}</svg>'
        f"{escape(shorten(name, _LEGEND_CELLS))}</li>"
        for place, name in enumerate(legend)
    )
    listed = f'<ul class="legend">{entries}</ul>' if legend else ""
    said = f"<p>{escape(note)}</p>" if note else ""
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3>{said}</figcaption>{listed}{picture}</figure>"
    )


def table(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], n_text_columns: int = 1
) -> str:
    """Return a table; the first columns are text, the others numbers."""
    kinds = [' class="text"' if place < n_text_columns else "" for place in range(len(columns))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>'
        for name, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + f'<th scope="row"{kinds[0]}>{escape(row[0])}</th>'
        + "".join(
            f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, content: str) -> str:
    """Return ``content`` behind a line that opens it."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def grid(figures: Sequence[str]) -> str:
    """Return pictures beside each other, as many as there is room for."""
    return f'<div class="grid">{"".join(figures)}</div>'


def notes(lines: Sequence[str]) -> str:
    """Return a list of lines, or nothing for none."""
    listed = "".join(f"<li>{escape(entry)}</li>" for entry in lines)
    return f'<ul class="notes">{listed}</ul>' if lines else ""


def nothing(why: str) -> str:
    """Return what stands where there is nothing to show."""
    return f'<p class="none">{escape(why)}</p>'


def alert(line: str) -> str:
    """Return a line that nobody should miss."""
    return f'<p class="wrong"><strong>{escape(line)}</strong></p>'


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Return names with their values, side by side."""
    listed = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in pairs)
    return f'<dl class="facts">{listed}</dl>'

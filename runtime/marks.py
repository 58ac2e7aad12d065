"""The parts of a chart as SVG text: lines, text, intervals, points. No script, no style attribute.

Colours come from the classes ``s0`` to ``s5``, which the page's style sheet sets for light and
dark; every series also has a shape and a dash of its own, so that no reading needs colour.
"""

from collections.abc import Sequence
from html import escape

from rich.cells import cell_len, set_cell_size

from edgekd.runtime.scales import clean

WIDTH = 560
N_SERIES = 6
LABEL_CELLS = 24
CELL_PX = 7.5  # of the page's 12 px type, wide letters included
_DASHES = ("none", "7 4", "2 4", "9 4 2 4", "12 5", "5 5")


def svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    """Return ``parts`` as a picture that names and describes itself."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {px(height)}" role="img">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, anchor: str = "start", css: str = "") -> str:
    """Return a line of escaped text."""
    named = f' class="{css}"' if css else ""
    return f'<text{named} x="{px(x)}" y="{px(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """Return a straight line."""
    return f'<line class="{css}" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>'


def whisker(x1: float, y1: float, x2: float, y2: float, css: str = "") -> str:
    """Return an interval: a line with a short stroke across each end."""
    css = f"interval {css}".rstrip()
    across = (0, 4) if y1 == y2 else (4, 0)
    ends = [
        line(x - across[0], y - across[1], x + across[0], y + across[1], css)
        for x, y in ((x1, y1), (x2, y2))
    ]
    return line(x1, y1, x2, y2, css) + "".join(ends)


def mark(x: float, y: float, place: int, name: str = "") -> str:
    """Return the shape of the series ``place``: circle, square, triangle, diamond ...

    Colours and shapes repeat after ``N_SERIES``, but no pair of them before its square.
    """
    shapes = (
        f"M{px(x - 5)} {px(y)}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        f"M{px(x - 4.5)} {px(y - 4.5)}h9v9h-9z",
        f"M{px(x)} {px(y - 6)}l6 10.5h-12z",
        f"M{px(x)} {px(y - 6.5)}l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
        f"M{px(x)} {px(y + 6)}l6 -10.5h-12z",
        f"M{px(x - 2)} {px(y - 6)}h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    )
    css = f"fill ring s{place % N_SERIES}"
    return f'<path class="{css}" d="{shapes[_turn(place)]}"><title>{escape(name)}</title></path>'


def px(value: float) -> str:
    """Return a coordinate, short; never NaN or infinite."""
    return f"{max(-1e6, min(1e6, clean(value))):.1f}".removesuffix(".0")


def shorten(label: str, n_cells: int = LABEL_CELLS) -> str:
    """Return ``label`` within ``n_cells`` columns of a terminal: letters of Asia take two."""
    if cell_len(label) <= n_cells:
        return label
    return set_cell_size(label, n_cells - 1).rstrip() + "\u2026"


def dash(place: int) -> str:
    """Return the dashes of the line of the series ``place``."""
    return _DASHES[_turn(place)]


def _turn(place: int) -> int:
    return (place + place // N_SERIES) % N_SERIES


def path(placed: Sequence[tuple[float, float]]) -> str:
    """Return the data of a path from point to point."""
    return "M" + "L".join(f"{px(x)} {px(y)}" for x, y in placed)

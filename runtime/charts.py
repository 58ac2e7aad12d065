"""Charts as SVG text: lines, points and bars over axes. Pure functions, drawn by marks.py."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from rich.cells import cell_len

from edgekd.runtime.marks import (
    CELL_PX,
    LABEL_CELLS,
    N_SERIES,
    WIDTH,
    dash,
    line,
    mark,
    path,
    px,
    shorten,
    svg,
    text,
    whisker,
)
from edgekd.runtime.scales import Scale, make_scale, show_number

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 14, 46
_BAR_RIGHT = 84


@dataclass(frozen=True)
class Point:
    """One value, its 95 % interval where it is known, and the name it is read out with."""

    x: float
    y: float
    y_interval: tuple[float, float] | None = None
    x_interval: tuple[float, float] | None = None
    name: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one model."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Bar:
    """One bar, of the series ``place``; the label stands in front, ``shown`` behind.

    Neighbours of one ``group`` stand under its name.
    """

    label: str
    value: float
    shown: str
    place: int = 0
    interval: tuple[float, float] | None = None
    is_faint: bool = False
    group: str = ""


def line_chart(
    title: str, description: str, series: Sequence[Series], x_label: str, y_label: str
) -> str:
    """Return lines over x with intervals as bars; both axes start at 0."""
    return _plane(title, description, series, (x_label, y_label), has_lines=True, height=300)


def scatter_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    frontier: Sequence[tuple[float, float]] = (),
) -> str:
    """Return points with intervals as bars and a line along ``frontier``; both axes start at 0."""
    labels = x_label, y_label
    return _plane(title, description, series, labels, has_lines=False, height=320, under=frontier)


def bar_chart(title: str, description: str, bars: Sequence[Bar], x_label: str) -> str:
    """Return horizontal bars from 0, intervals drawn over them."""
    widest = max((cell_len(shorten(bar.label)) for bar in bars), default=0)
    rows = list(_bar_rows(bars))
    bottom = _TOP + sum(height for height, _ in rows)
    ends = [end for bar in bars for end in (bar.value, *(bar.interval or ()))]
    scale = make_scale(ends, max(64.0, 16 + CELL_PX * widest), WIDTH - _BAR_RIGHT)
    parts = _vertical_grid(scale, _TOP, bottom, x_label)
    top = float(_TOP)
    for height, row in rows:
        middle = top + height / 2
        if isinstance(row, str):
            parts.append(text(4, middle + 6, shorten(row, 2 * LABEL_CELLS), css="group"))
        else:
            parts += _bar(row, scale, middle)
        top += height
    return svg(title, description, bottom + _BOTTOM, parts)


def _bar_rows(bars: Sequence[Bar]) -> Iterator[tuple[int, Bar | str]]:
    """Yield the height and content of each row: a bar, or the name of the group that begins."""
    group = ""
    for bar in bars:
        if bar.group != group:
            group = bar.group
            yield 28, group
        yield 26, bar


def _bar(bar: Bar, scale: Scale, middle: float) -> list[str]:
    edge = max(scale(bar.value), scale.start)
    css = f"fill s{bar.place % N_SERIES}" + (" faint" if bar.is_faint else "")
    parts = [
        text(scale.start - 8, middle + 4, shorten(bar.label), "end"),
        f'<rect class="{css}" x="{px(scale.start)}" y="{px(middle - 8)}" '
        f'width="{px(edge - scale.start)}" height="16" rx="2">'
        f"<title>{escape(bar.label)}: {escape(bar.shown)}</title></rect>",
    ]
    if bar.interval:
        low, high = (scale(end) for end in bar.interval)
        parts.append(whisker(low, middle, high, middle))
        edge = max(edge, high)
    return [*parts, text(edge + 7, middle + 4, bar.shown, css="value")]


def _plane(
    title: str,
    description: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    has_lines: bool,
    height: int,
    under: Sequence[tuple[float, float]] = (),
) -> str:
    series = [_drawable(one) for one in series]
    points = [point for one in series for point in one.points]
    xs = [x for point in points for x in (point.x, *(point.x_interval or ()))]
    ys = [y for point in points for y in (point.y, *(point.y_interval or ()))]
    x_scale = make_scale(xs, _LEFT, WIDTH - _RIGHT)
    y_scale = make_scale(ys, height - _BOTTOM, _TOP)
    parts = _vertical_grid(x_scale, _TOP, height - _BOTTOM, labels[0], has_lines=not has_lines)
    parts += _horizontal_grid(y_scale, labels[1])
    if len(under) > 1:
        placed = [(x_scale(x), y_scale(y)) for x, y in under]
        parts.append(f'<path class="frontier" d="{path(placed)}"/>')
    for place, one in enumerate(series):
        parts += _series(one, place, x_scale, y_scale, has_line=has_lines)
    return svg(title, description, height, parts)


def _drawable(one: Series) -> Series:
    """Return ``one`` without what is no number: a point left out is better than one at 0."""
    return Series(
        one.name,
        tuple(
            replace(point, x_interval=_known(point.x_interval), y_interval=_known(point.y_interval))
            for point in one.points
            if _known((point.x, point.y))
        ),
    )


def _known(pair: tuple[float, float] | None) -> tuple[float, float] | None:
    return pair if pair and all(map(math.isfinite, pair)) else None


def _series(
    one: Series, place: int, x_scale: Scale, y_scale: Scale, *, has_line: bool
) -> list[str]:
    parts = []
    placed = [(x_scale(point.x), y_scale(point.y)) for point in one.points]
    colour = f"s{place % N_SERIES}"
    if has_line and len(placed) > 1:
        css, drawn = f"stroke {colour}", path(placed)
        parts.append(f'<path class="{css}" d="{drawn}" stroke-dasharray="{dash(place)}"/>')
    for point, (x, y) in zip(one.points, placed, strict=True):
        if point.y_interval:
            low, high = (y_scale(end) for end in point.y_interval)
            parts.append(whisker(x, low, x, high, colour))
        if point.x_interval:
            low, high = (x_scale(end) for end in point.x_interval)
            parts.append(whisker(low, y, high, y, colour))
        parts.append(mark(x, y, place, point.name or one.name))
    return parts


def _vertical_grid(
    scale: Scale, top: float, bottom: float, label: str, *, has_lines: bool = True
) -> list[str]:
    parts = [line(scale.start, bottom, scale.end, bottom, "axis")]
    for tick in scale.ticks:
        if has_lines:
            parts.append(line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(text(scale(tick), bottom + 17, show_number(tick), "middle", "tick"))
    return [*parts, text((scale.start + scale.end) / 2, bottom + 38, label, "middle", "label")]


def _horizontal_grid(scale: Scale, label: str) -> list[str]:
    parts = []
    for tick in scale.ticks:
        parts.append(line(_LEFT, scale(tick), WIDTH - _RIGHT, scale(tick), "grid"))
        parts.append(text(_LEFT - 8, scale(tick) + 4, show_number(tick), "end", "tick"))
    middle = (scale.start + scale.end) / 2
    turned = text(0, 0, label, "middle", "label")
    return [*parts, f'<g transform="translate(16 {px(middle)}) rotate(-90)">{turned}</g>']

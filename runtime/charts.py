"""Charts as SVG text: scales, axes, marks. Pure functions, no script, no style attribute.

Colours come from the classes ``s0`` to ``s5``, which the page's style sheet sets for light and
dark; every series also has a shape and a dash of its own, so that no reading needs colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 18, 14, 46
N_SERIES = 6
_DASHES = ("", "7 4", "2 4", "9 4 2 4", "12 5", "5 5")
_LABEL_CHARACTERS = 24
_MOST = 1e300  # further out, differences of floats overflow


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels, with ticks that cover the values."""

    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        share = (clean(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


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
    """One bar, of the series ``place``; the label stands in front, ``shown`` behind."""

    label: str
    value: float
    shown: str
    place: int = 0
    interval: tuple[float, float] | None = None
    is_faint: bool = False


def clean(value: float) -> float:
    """Return ``value`` as a finite number; what is none becomes 0."""
    return max(-_MOST, min(_MOST, value)) if math.isfinite(value) else 0.0


def make_scale(
    values: Sequence[float], start: float, end: float, *, from_zero: bool = True, n_ticks: int = 5
) -> Scale:
    """Return a scale whose ticks are round numbers and reach from below all values to above."""
    known = [clean(value) for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if not high - low > abs(high) * 1e-9:
        low, high = (low, low + 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    step = _round_step((high - low) / n_ticks)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Scale(min(ticks[0], low), max(ticks[-1], high), start, end, ticks)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-300)))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999999)


def show_number(value: float) -> str:
    """Return ``value`` short, as a tick has it."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.0e}"


def line_chart(
    title: str, description: str, series: Sequence[Series], x_label: str, y_label: str
) -> str:
    """Return lines over x with intervals as bars; y starts at 0."""
    return _plane(title, description, series, (x_label, y_label), has_lines=True, height=300)


def scatter_chart(
    title: str, description: str, series: Sequence[Series], x_label: str, y_label: str
) -> str:
    """Return labelled points with intervals as bars; both axes start at 0."""
    return _plane(title, description, series, (x_label, y_label), has_lines=False, height=320)


def bar_chart(title: str, description: str, bars: Sequence[Bar], x_label: str) -> str:
    """Return horizontal bars from 0, intervals drawn over them."""
    left, right, row = 168, 84, 26
    height = _TOP + row * len(bars) + _BOTTOM
    ends = [end for bar in bars for end in (bar.value, *(bar.interval or ()))]
    scale = make_scale(ends, left, WIDTH - right)
    parts = _vertical_grid(scale, _TOP, height - _BOTTOM, x_label)
    for number, bar in enumerate(bars):
        middle = _TOP + row * (number + 0.5)
        edge = max(scale(bar.value), scale(0))
        css = f"fill s{bar.place % N_SERIES}" + (" faint" if bar.is_faint else "")
        parts.append(text(left - 8, middle + 4, shorten(bar.label), "end"))
        parts.append(
            f'<rect class="{css}" x="{px(left)}" y="{px(middle - 8)}" '
            f'width="{px(max(0.0, edge - left))}" height="16" rx="2">'
            f"<title>{escape(bar.label)}: {escape(bar.shown)}</title></rect>"
        )
        if bar.interval:
            low, high = (scale(end) for end in bar.interval)
            parts.append(whisker(low, middle, high, middle))
            edge = max(edge, high)
        parts.append(text(edge + 7, middle + 4, bar.shown, css="value"))
    return svg(title, description, height, parts)


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


def whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    """Return an interval: a line with a short stroke across each end."""
    across = (0, 4) if y1 == y2 else (4, 0)
    ends = [
        line(x - across[0], y - across[1], x + across[0], y + across[1], "interval")
        for x, y in ((x1, y1), (x2, y2))
    ]
    return line(x1, y1, x2, y2, "interval") + "".join(ends)


def mark(x: float, y: float, place: int, name: str = "") -> str:
    """Return the shape of the series ``place``: circle, square, triangle, diamond ..."""
    shapes = (
        f"M{px(x - 5)} {px(y)}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
        f"M{px(x - 4.5)} {px(y - 4.5)}h9v9h-9z",
        f"M{px(x)} {px(y - 6)}l6 10.5h-12z",
        f"M{px(x)} {px(y - 6.5)}l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
        f"M{px(x)} {px(y + 6)}l6 -10.5h-12z",
        f"M{px(x - 2)} {px(y - 6)}h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    )
    css = f"fill ring s{place % N_SERIES}"
    return (
        f'<path class="{css}" d="{shapes[place % N_SERIES]}"><title>{escape(name)}</title></path>'
    )


def px(value: float) -> str:
    """Return a coordinate, short; never NaN or infinite."""
    return f"{max(-1e6, min(1e6, clean(value))):.1f}".removesuffix(".0")


def shorten(label: str) -> str:
    """Return ``label`` within the space that charts have for it."""
    return label if len(label) <= _LABEL_CHARACTERS else label[: _LABEL_CHARACTERS - 1] + "\u2026"


def _plane(
    title: str,
    description: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    *,
    has_lines: bool,
    height: int,
) -> str:
    points = [point for one in series for point in one.points]
    xs = [x for point in points for x in (point.x, *(point.x_interval or ()))]
    ys = [y for point in points for y in (point.y, *(point.y_interval or ()))]
    x_scale = make_scale(xs, _LEFT, WIDTH - _RIGHT)
    y_scale = make_scale(ys, height - _BOTTOM, _TOP)
    parts = _vertical_grid(x_scale, _TOP, height - _BOTTOM, labels[0], has_lines=not has_lines)
    parts += _horizontal_grid(y_scale, labels[1])
    for place, one in enumerate(series):
        placed = [(x_scale(point.x), y_scale(point.y)) for point in one.points]
        if has_lines and len(placed) > 1:
            path = "M" + "L".join(f"{px(x)} {px(y)}" for x, y in placed)
            dash = _DASHES[place % N_SERIES]
            css = f"stroke s{place % N_SERIES}"
            parts.append(f'<path class="{css}" d="{path}" stroke-dasharray="{dash or "none"}"/>')
        for point, (x, y) in zip(one.points, placed, strict=True):
            if point.y_interval:
                low, high = (y_scale(end) for end in point.y_interval)
                parts.append(whisker(x, low, x, high))
            if point.x_interval:
                low, high = (x_scale(end) for end in point.x_interval)
                parts.append(whisker(low, y, high, y))
            parts.append(mark(x, y, place, point.name or one.name))
    return svg(title, description, height, parts)


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

"""Distributions as small histograms under one another, on one scale."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from edgekd.runtime.marks import N_SERIES, WIDTH, line, px, shorten, svg, text
from edgekd.runtime.scales import Scale, make_log_scale, make_scale, show_number

_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 16, 18, 8, 46, 74
_NAME_CELLS = 34
_N_BINS = 60
_TALLEST_PX = 42
# Largest over smallest: on a linear scale most would share one bin; but no picture shows more.
_LOG_FROM, _LOG_UNTIL = 20.0, 1e6
_SMALLEST = 1e-12


def histogram_chart(
    title: str,
    description: str,
    samples: Mapping[str, Sequence[float]],
    marks: Mapping[str, Mapping[str, float]],
    x_label: str,
) -> str:
    """Return a histogram for each name of ``samples``, with lines at its ``marks``."""
    shown = {name: list(filter(math.isfinite, values)) for name, values in samples.items()}
    marked = (value for one in marks.values() for value in one.values())
    scale = choose_scale([*(value for one in shown.values() for value in one), *marked])
    bottom = _TOP + _ROW * len(shown)
    parts = [*_axis(scale, bottom, x_label)]
    for place, (name, values) in enumerate(shown.items()):
        base = _TOP + _ROW * (place + 1)
        parts += _bins(values, scale, base, f"fill s{place % N_SERIES}")
        parts += _marks(name, marks.get(name, {}), scale, base)
    return svg(title, description, bottom + _BOTTOM, parts)


def choose_scale(values: Iterable[float]) -> Scale:
    """Return a scale for ``values``: logarithmic where a few lie very far from the others."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    if low >= _SMALLEST and _LOG_FROM < high / low < _LOG_UNTIL:
        return make_log_scale(known, _LEFT, WIDTH - _RIGHT)
    from_zero = low <= 0.4 * high
    return make_scale(known, _LEFT, WIDTH - _RIGHT, from_zero=from_zero, n_ticks=7)


def count_bins(samples: Sequence[float], scale: Scale) -> list[int]:
    """Return how many of ``samples`` fall into each of the bins along ``scale``."""
    counts = [0] * _N_BINS
    for sample in samples:
        counts[max(0, min(_N_BINS - 1, int(scale.share(sample) * _N_BINS)))] += 1
    return counts


def _axis(scale: Scale, bottom: float, label: str) -> list[str]:
    parts = [line(scale(tick), _TOP, scale(tick), bottom, "grid") for tick in scale.ticks]
    for tick in scale.ticks:
        parts.append(text(scale(tick), bottom + 17, show_number(tick), "middle", "tick"))
    label += ", logarithmic" if scale.is_log else ""
    return [*parts, text((scale.start + scale.end) / 2, bottom + 38, label, "middle", "label")]


def _bins(values: Sequence[float], scale: Scale, base: float, css: str) -> list[str]:
    """Return the bars, as high as the square root of their counts, so that one is still seen."""
    counts = count_bins(values, scale)
    wide = (scale.end - scale.start) / _N_BINS
    parts = []
    for number, count in enumerate(counts):
        if count:
            tall = _TALLEST_PX * math.sqrt(count / max(counts))
            parts.append(
                f'<rect class="{css}" x="{px(scale.start + number * wide)}" '
                f'y="{px(base - tall)}" width="{px(wide - 0.6)}" height="{px(tall)}">'
                f"<title>{count} of {len(values)}</title></rect>"
            )
    return [*parts, line(scale.start, base, scale.end, base, "axis")]


def _marks(name: str, marks: Mapping[str, float], scale: Scale, base: float) -> list[str]:
    parts = [
        f"<g><title>{escape(name)} {escape(key)}: {value:.3g}</title>"
        f"{line(scale(value), base - _TALLEST_PX - 6, scale(value), base, 'quantile')}</g>"
        for key, value in marks.items()
    ]
    figures = ", ".join(f"{key} {value:.2f}" for key, value in marks.items())
    top = base - _TALLEST_PX - 14
    named = text(_LEFT, top, shorten(name, _NAME_CELLS), css="group")
    return [*parts, named, text(WIDTH - _RIGHT, top, figures, "end", "value")]

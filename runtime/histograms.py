"""Distributions as small histograms under one another, on one scale."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from edgekd.runtime.charts import (
    N_SERIES,
    WIDTH,
    clean,
    line,
    make_scale,
    px,
    shorten,
    show_number,
    svg,
    text,
)

_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 16, 18, 8, 46, 74
_N_BINS = 60


def histogram_chart(
    title: str,
    description: str,
    samples: Mapping[str, Sequence[float]],
    marks: Mapping[str, Mapping[str, float]],
    x_label: str,
) -> str:
    """Return a histogram for each name of ``samples``, with lines at its ``marks``."""
    values = [value for one in samples.values() for value in one]
    lowest = min(values, default=0.0)
    start = lowest if lowest > 0.4 * max(values, default=0.0) else 0.0
    scale = make_scale(
        [*values, *(m for one in marks.values() for m in one.values())],
        *(_LEFT, WIDTH - _RIGHT),
        from_zero=start == 0.0,
        n_ticks=7,
    )
    height = _TOP + _ROW * len(samples) + _BOTTOM
    bottom = height - _BOTTOM
    parts = [line(scale(tick), _TOP, scale(tick), bottom, "grid") for tick in scale.ticks]
    for tick in scale.ticks:
        parts.append(text(scale(tick), bottom + 17, show_number(tick), "middle", "tick"))
    parts.append(text((scale.start + scale.end) / 2, bottom + 38, x_label, "middle", "label"))
    for place, (name, found) in enumerate(samples.items()):
        base = _TOP + _ROW * (place + 1)
        bins = count_bins(found, scale.low, scale.high)
        tallest = max(1, *bins)
        wide = (scale.end - scale.start) / _N_BINS
        for number, count in enumerate(bins):
            if count:
                tall = 42 * math.sqrt(count / tallest)
                parts.append(
                    f'<rect class="fill s{place % N_SERIES}" x="{px(scale.start + number * wide)}" '
                    f'y="{px(base - tall)}" width="{px(wide - 0.6)}" height="{px(tall)}">'
                    f"<title>{count} of {len(found)}</title></rect>"
                )
        parts.append(line(scale.start, base, scale.end, base, "axis"))
        shown = ", ".join(f"{k} {v:.2f}" for k, v in marks.get(name, {}).items())
        for key, value in marks.get(name, {}).items():
            x = scale(value)
            parts.append(line(x, base - 48, x, base, "quantile"))
            parts.append(f"<g><title>{escape(name)} {escape(key)}: {value:.3g}</title></g>")
        parts.append(text(WIDTH - _RIGHT, base - 56, f"{shorten(name)}  {shown}", "end", "value"))
    return svg(title, description, height, parts)


def count_bins(samples: Sequence[float], low: float, high: float) -> list[int]:
    """Return how many of ``samples`` fall into each bin from ``low`` to ``high``."""
    counts = [0] * _N_BINS
    for sample in samples:
        share = (clean(sample) - low) / (high - low)
        counts[max(0, min(_N_BINS - 1, int(share * _N_BINS)))] += 1
    return counts

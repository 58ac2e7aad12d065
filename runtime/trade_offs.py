"""Pictures of what quality costs: each model against its size and against its speed."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.runtime import html_page as page
from edgekd.runtime.charts import Point, Series, scatter_chart
from edgekd.runtime.five_rows import first_decode

_Z95 = 1.959964  # two-sided 95 % of a normal distribution: the errors are of a bootstrap
_QUALITIES = {
    "kl_nats": ("KL to teacher", "nats a token", 1.0, False),
    "task_accuracy": ("Right answers", "% of the questions", 100.0, True),
    "perplexity": ("Perplexity", "on the text", 1.0, False),
}
"""Title, unit, factor, and whether more is better."""

Rows = Sequence[Mapping[str, Any]]


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


def trade_offs(rows: Rows, each: str = "row") -> list[str]:
    """Return the pictures of ``Row.as_dict()`` of every row, two for each measured quality.

    ``each`` is what a row is called.
    """
    measured = [name for name in _QUALITIES if any(_quality(row, name) is not None for row in rows)]
    if not measured:
        return [page.nothing("No quality was measured: neither text nor questions were given.")]
    return [
        page.grid([_trade_off(rows, name, against, each) for against in ("size", "speed")])
        for name in measured
    ]


def _trade_off(rows: Rows, name: str, against: str, each: str) -> str:
    what, unit, factor, more_is_better = _QUALITIES[name]
    title = f"{what} against {against}"
    best_is = "more is better" if more_is_better else "less is better"
    note = f"{unit}, {best_is}; whiskers: 95 % intervals; dashed: beaten by no other {each}"
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

"""Summaries of repeated measurements, the samples kept so that anyone can recompute them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What ``n`` samples have in common, and the samples."""

    mean: float
    stdev: float | None
    """Of the sample (n - 1); None for a single one, whose spread is unknown."""
    median: float
    min: float
    max: float
    n: int
    samples: tuple[float, ...]


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of ``samples``.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    return Summary(
        mean=statistics.fmean(samples),
        stdev=statistics.stdev(samples) if len(samples) > 1 else None,
        median=statistics.median(samples),
        min=min(samples),
        max=max(samples),
        n=len(samples),
        samples=tuple(samples),
    )


def percentile(samples: Sequence[float], p: float) -> float:
    """Return the ``p``-th percentile of ``samples``, between two of them by linear interpolation.

    Definition 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages" (The American
    Statistician 50, 1996): the default of numpy, R and spreadsheets.

    Raises:
        ValueError: there are no samples, or ``p`` is not in 0..100.
    """
    if not samples:
        raise ValueError("no samples to take a percentile of")
    if not 0 <= p <= 100:
        raise ValueError(f"percentile {p} is not between 0 and 100")
    ordered = sorted(samples)
    place = (len(ordered) - 1) * p / 100
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place % 1)

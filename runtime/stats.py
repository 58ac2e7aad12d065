"""Summaries of repeated measurements, the samples kept so that anyone can recompute them.

Intervals are Student's t: with the handful of repetitions that a benchmark affords, a percentile
bootstrap is too narrow, and t needs nothing but mean and spread. Ratios are compared on the
logarithm, where twice as fast and half as fast lie equally far from no change.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
INTERVAL_METHOD = "Student's t on the mean, two-sided, 95 %"
_NORMAL_DF = 1e6  # from here on t is the normal distribution to six digits


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
    ci95: tuple[float, float] | None = None
    """In which the mean lies with 95 % confidence; None for a single sample."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How much larger one measurement is than another, with its 95 % interval."""

    value: float
    """Of the geometric means."""
    low: float
    high: float
    n: int
    """Pairs, or samples of both sides where they are not paired."""
    paired: bool


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of ``samples``.

    Raises:
        ValueError: there are none.
    """
    if not samples:
        raise ValueError("no samples to summarise")
    mean = statistics.fmean(samples)
    stdev = statistics.stdev(samples) if len(samples) > 1 else None
    half = None if stdev is None else t_quantile(len(samples) - 1) * stdev / len(samples) ** 0.5
    return Summary(
        mean=mean,
        stdev=stdev,
        median=statistics.median(samples),
        min=min(samples),
        max=max(samples),
        n=len(samples),
        samples=tuple(samples),
        ci95=None if half is None else (mean - half, mean + half),
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


def paired_ratio(base: Sequence[float], new: Sequence[float]) -> Ratio | None:
    """Return new / base from samples taken in the same blocks; None from fewer than two pairs.

    What slows a whole block down, such as another program, falls out of each pair.
    """
    logs = [math.log(b / a) for a, b in zip(base, new, strict=True)]
    if len(logs) < 2:
        return None
    half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / len(logs) ** 0.5
    return _ratio(statistics.fmean(logs), half, len(logs), paired=True)


def unpaired_ratio(base: Sequence[float], new: Sequence[float]) -> Ratio | None:
    """Return new / base of two runs, by Welch's t; None where a side has fewer than two samples.

    Welch, "The generalization of Student's problem when several different population variances
    are involved" (Biometrika 34, 1947).
    """
    if len(base) < 2 or len(new) < 2:
        return None
    logs = [[math.log(sample) for sample in side] for side in (base, new)]
    errors = [statistics.variance(side) / len(side) for side in logs]
    total = sum(errors)
    parts = sum(e**2 / (len(side) - 1) for e, side in zip(errors, logs, strict=True))
    half = t_quantile(total**2 / parts) * total**0.5 if parts else 0.0
    middle = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    return _ratio(middle, half, len(base) + len(new), paired=False)


def t_quantile(df: float, confidence: float = CONFIDENCE) -> float:
    """Return how many standard errors a two-sided interval reaches at ``df`` degrees of freedom.

    The root of the distribution function, found by bisection; there is no such function in the
    standard library, and scipy would be the base install's largest package.
    """
    if df >= _NORMAL_DF:
        return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1.0
    while _t_within(high, df) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_within(middle, df) < confidence else (low, middle)
    return high


def _ratio(middle: float, half: float, n: int, *, paired: bool) -> Ratio:
    low, value, high = (math.exp(middle + step) for step in (-half, 0.0, half))
    return Ratio(value=value, low=low, high=high, n=n, paired=paired)


def _t_within(t: float, df: float) -> float:
    """Return the probability of -t..t: 1 - I_x(df/2, 1/2) with x = df / (df + t^2)."""
    return 1.0 - _incomplete_beta(df / (df + t * t), df / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b).

    Continued fraction DLMF 8.17.22, which converges fast below (a + 1) / (a + b + 2).
    """
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(1 - x, b, a)
    logs = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logs + a * math.log(x) + b * math.log1p(-x)) / a
    fraction = 1.0
    for m in range(200, 0, -1):  # evaluated from the far end
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    return front / fraction

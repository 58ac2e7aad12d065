"""Seconds per token from bytes read: t = a + bytes / BW, fitted to what was measured.

``a`` is what a token costs besides reading: launches, sampling, synchronizing. With two or three
measured models a free ``a`` fits noise, so it is drawn to 2 ms, give or take 1 ms, by ridge
regression; to a fifth of the fastest token, give or take half of that, where a token is faster
than 10 ms and 2 ms would be most of it. Residuals are weighed by the time measured: a tenth too
slow is as bad on a small model as on a large one. Centre and width were chosen on published
points, see benchmarks/predictor.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

PRIOR_OVERHEAD_S = 0.002
PRIOR_SPREAD = 0.5
"""Of the overhead, as a share of it."""
_PRIOR_SHARE = 0.2
_RESIDUAL = 0.05  # relative spread of a measured time around the line
# Where only the peak of the memory is known: the middle of what engines reached on devices that
# were measured, and how far from it they lie. See docs/devices.md.
TYPICAL_SHARE = 0.6
UNCALIBRATED_FACTOR = 2.0
CALIBRATED_INTERVAL = 0.20
_LEAST_OF_ONE_FORMAT = 2
# A model that reads this much less or more than any measured one is outside what was measured.
_REACH = 2.0


@dataclass(frozen=True)
class Point:
    """One measured model."""

    read_bytes: float
    """Read for one token: weights and KV cache."""
    seconds: float
    """Per decoded token."""
    format: str


@dataclass(frozen=True)
class Calibration:
    """The line of one device, backend and power mode."""

    overhead_s: float
    bytes_per_s: float
    n_points: int
    spread: float = CALIBRATED_INTERVAL
    """Half of the interval, as a share: what is usual, or more where the points scatter more."""
    measured_bytes: tuple[float, float] = (0.0, 0.0)
    """Least and most bytes per token among the points."""

    def seconds(self, read_bytes: float) -> float:
        """Return the seconds of one token that reads ``read_bytes``."""
        return self.overhead_s + read_bytes / self.bytes_per_s

    def reaches(self, read_bytes: float) -> bool:
        """Return whether ``read_bytes`` lies near enough to what was measured."""
        least, most = self.measured_bytes
        return self.n_points > 0 and least / _REACH <= read_bytes <= most * _REACH

    def interval(self, read_bytes: float) -> tuple[float, float]:
        """Return the range in which the tokens/s of ``read_bytes`` are expected."""
        factor = 1 + self.spread
        if not self.reaches(read_bytes):
            factor = max(factor, UNCALIBRATED_FACTOR)
        tokens_per_s = 1 / self.seconds(read_bytes)
        return tokens_per_s / factor, tokens_per_s * factor


def calibrate(points: Sequence[Point], format: str | None = None) -> Calibration:
    """Return the line through ``points``; of those of ``format`` alone where there are enough.

    On a processor the kernels of one format may be bound by arithmetic and those of another not.
    """
    assert points, "nothing to calibrate on"
    alike = [point for point in points if format and point.format == format]
    chosen = alike if len(alike) >= _LEAST_OF_ONE_FORMAT else list(points)
    weights = [1 / (_RESIDUAL * point.seconds) ** 2 for point in chosen]
    expected_s = min(PRIOR_OVERHEAD_S, _PRIOR_SHARE * min(point.seconds for point in chosen))
    prior = 1 / (PRIOR_SPREAD * expected_s) ** 2
    w = sum(weights) + prior
    wx = sum(k * p.read_bytes for k, p in zip(weights, chosen, strict=True))
    wxx = sum(k * p.read_bytes**2 for k, p in zip(weights, chosen, strict=True))
    wt = sum(k * p.seconds for k, p in zip(weights, chosen, strict=True)) + prior * expected_s
    wxt = sum(k * p.read_bytes * p.seconds for k, p in zip(weights, chosen, strict=True))
    overhead_s = (wt * wxx - wx * wxt) / (w * wxx - wx * wx)
    seconds_per_byte = (wxt - wx * overhead_s) / wxx
    if overhead_s < 0 or seconds_per_byte <= 0:
        return _through_origin(chosen)
    return Calibration(overhead_s, 1 / seconds_per_byte, len(chosen), measured_bytes=_span(chosen))


def from_bandwidth(bytes_per_s: float, share: float = TYPICAL_SHARE) -> Calibration:
    """Return the line of a device of which only the peak of its memory is known."""
    return Calibration(PRIOR_OVERHEAD_S, bytes_per_s * share, 0)


def leave_one_out(points: Sequence[Point]) -> list[float]:
    """Return for each point the error of its predicted tokens/s from all others, as a share."""
    errors = []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        predicted_s = calibrate(others, point.format).seconds(point.read_bytes)
        errors.append(point.seconds / predicted_s - 1)
    return errors


def calibrate_with_spread(points: Sequence[Point], format: str | None = None) -> Calibration:
    """Return the line through ``points``, its interval as wide as they scatter around it."""
    line = calibrate(points, format)
    if len(points) <= _LEAST_OF_ONE_FORMAT:
        return line
    worst = max(abs(error) for error in leave_one_out(points))
    return replace(line, spread=max(CALIBRATED_INTERVAL, worst))


def _through_origin(points: Sequence[Point]) -> Calibration:
    """Return the line without overhead: the points contradict a positive one."""
    rate = median(p.read_bytes / p.seconds for p in points)
    return Calibration(0.0, rate, len(points), measured_bytes=_span(points))


def _span(points: Sequence[Point]) -> tuple[float, float]:
    sizes = [point.read_bytes for point in points]
    return min(sizes), max(sizes)

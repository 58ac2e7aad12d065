"""Seconds per token: t = c x layers + bytes / BW, fitted to what was measured.

``c`` is what a layer costs besides reading its weights: launches, waits between threads or units,
small operations. With two or three measured models a free ``c`` fits noise, and one that is tied
down misses devices where it is large; so every ``c`` is tried, each weighed by how well the points
agree and by how usual it is: a tenth of the fastest token, give or take a factor of seven. The
prediction is the geometric mean over these lines. Residuals are weighed by the time measured: a
tenth too slow is as bad on a small model as on a large one. benchmarks/predictor.py says how good
that is, and how good where the two numbers are chosen without the device that is predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

PRIOR_SHARE = 0.1
"""Of the fastest measured token that is not reading, as a median."""
PRIOR_SPREAD = 2.0
"""Of the logarithm of that share: a factor of seven both ways."""
_RESIDUAL = 0.05  # relative spread of a measured time around the line
_N_LINES, _N_SPREADS = 61, 3.0  # tried values of c: so many, out to so many spreads
# Of devices that were not measured: the 2 ms that fitted most of those that were, at 28 layers.
TYPICAL_LAYER_S = 0.002 / 28
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
    n_layers: int


@dataclass(frozen=True)
class Line:
    """One way in which the time of a token may divide into layers and bytes."""

    weight: float
    """How likely it is among all of them."""
    layer_s: float
    byte_s: float


@dataclass(frozen=True)
class Calibration:
    """What is known of one device, backend and power mode."""

    lines: tuple[Line, ...]
    n_points: int
    spread: float = CALIBRATED_INTERVAL
    """Half of the interval, as a share: what is usual, or more where the points scatter more."""
    measured_bytes: tuple[float, float] = (0.0, 0.0)
    """Least and most bytes per token among the points."""

    @classmethod
    def of_line(cls, layer_s: float, byte_s: float) -> Self:
        """Return the calibration of a device whose line is assumed, not measured."""
        return cls((Line(1.0, layer_s, byte_s),), 0)

    def seconds(self, read_bytes: float, n_layers: int) -> float:
        """Return the seconds of one token that reads ``read_bytes`` in ``n_layers``."""
        times = ((k.weight, k.layer_s * n_layers + k.byte_s * read_bytes) for k in self.lines)
        return math.exp(sum(weight * math.log(time_s) for weight, time_s in times))

    @property
    def layer_s(self) -> float:
        """Seconds of a layer besides reading, on average over the lines."""
        return sum(line.weight * line.layer_s for line in self.lines)

    @property
    def bytes_per_s(self) -> float:
        """Bytes read in a second, on average over the lines."""
        return 1 / sum(line.weight * line.byte_s for line in self.lines)

    def reaches(self, read_bytes: float) -> bool:
        """Return whether ``read_bytes`` lies near enough to what was measured."""
        least, most = self.measured_bytes
        return self.n_points > 0 and least / _REACH <= read_bytes <= most * _REACH

    def interval(self, read_bytes: float, n_layers: int) -> tuple[float, float]:
        """Return the range in which the tokens/s of such a token are expected."""
        factor = 1 + self.spread
        if not self.reaches(read_bytes):
            factor = max(factor, UNCALIBRATED_FACTOR)
        tokens_per_s = 1 / self.seconds(read_bytes, n_layers)
        return tokens_per_s / factor, tokens_per_s * factor


def calibrate(points: Sequence[Point], format: str | None = None) -> Calibration:
    """Return what ``points`` tell; those of ``format`` alone where there are enough.

    On a processor the kernels of one format may be bound by arithmetic and those of another not.
    """
    assert points, "nothing to calibrate on"
    alike = [point for point in points if format and point.format == format]
    chosen = alike if len(alike) >= _LEAST_OF_ONE_FORMAT else list(points)
    sizes = [point.read_bytes for point in chosen]
    lines = tuple(_weigh([_fit(chosen, share) for share in _shares()]))
    return Calibration(lines, len(chosen), measured_bytes=(min(sizes), max(sizes)))


def _shares() -> list[float]:
    """Return the tried costs of layers, as shares of the fastest token, evenly in logarithm."""
    steps = (2 * i / (_N_LINES - 1) - 1 for i in range(_N_LINES))
    return [PRIOR_SHARE * math.exp(step * _N_SPREADS * PRIOR_SPREAD) for step in steps]


def _fit(points: Sequence[Point], share: float) -> Line:
    """Return the best line whose layers take ``share`` of the fastest token for its layers.

    Its weight is the logarithm of prior and likelihood. Bytes enter linearly and every line has
    the same curvature in them, so the best slope stands for all slopes.
    """
    layer_s = share * min(point.seconds / point.n_layers for point in points)
    pairs = [
        (p.read_bytes / p.seconds, (p.seconds - layer_s * p.n_layers) / p.seconds) for p in points
    ]
    byte_s = sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)
    misses = sum(((y - byte_s * x) / _RESIDUAL) ** 2 for x, y in pairs)
    usual = (math.log(share / PRIOR_SHARE) / PRIOR_SPREAD) ** 2
    return Line(-(misses + usual) / 2, layer_s, byte_s)


def _weigh(lines: Sequence[Line]) -> list[Line]:
    """Return the lines on which bytes take time, their weights summing to 1."""
    possible = [line for line in lines if line.byte_s > 0]
    best = max(line.weight for line in possible)
    weights = [math.exp(line.weight - best) for line in possible]
    total = sum(weights)
    return [replace(k, weight=w / total) for k, w in zip(possible, weights, strict=True)]


def from_bandwidth(bytes_per_s: float, share: float = TYPICAL_SHARE) -> Calibration:
    """Return the line of a device of which only the peak of its memory is known."""
    return Calibration.of_line(TYPICAL_LAYER_S, 1 / (bytes_per_s * share))


def leave_one_out(points: Sequence[Point]) -> list[float]:
    """Return for each point the error of its predicted tokens/s from all others, as a share."""
    errors = []
    for i, point in enumerate(points):
        others = [*points[:i], *points[i + 1 :]]
        line = calibrate(others, point.format)
        predicted_s = line.seconds(point.read_bytes, point.n_layers)
        errors.append(point.seconds / predicted_s - 1)
    return errors


def calibrate_with_spread(points: Sequence[Point], format: str | None = None) -> Calibration:
    """Return what ``points`` tell, the interval as wide as they scatter."""
    line = calibrate(points, format)
    if len(points) <= _LEAST_OF_ONE_FORMAT:
        return line
    worst = max(abs(error) for error in leave_one_out(points))
    return replace(line, spread=max(CALIBRATED_INTERVAL, worst))

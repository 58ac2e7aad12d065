"""Maps from values to pixels with round numbers as ticks. Pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_MOST = 1e300  # further out, differences of floats overflow
_MOST_LOG_TICKS = 10


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels, with ticks that cover the values."""

    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    end: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        return self.start + self.share(value) * (self.end - self.start)

    def share(self, value: float) -> float:
        """Return how far ``value`` lies from ``low`` (0) to ``high`` (1)."""
        value = clean(value)
        if self.is_log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


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


def make_log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a logarithmic scale over ``values``, all above 0, with ticks at 1, 2 and 5.

    Where many decades leave no room, the ticks are powers of ten.
    """
    low, high = min(values), max(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        all_ticks = [factor * 10.0**power for power in decades for factor in factors]
        first = max(tick for tick in all_ticks if tick <= low * (1 + 1e-9))
        last = min(t for t in all_ticks if t >= high * (1 - 1e-9) and t > first)
        ticks = tuple(tick for tick in all_ticks if first <= tick <= last)
        if len(ticks) <= _MOST_LOG_TICKS:
            break
    return Scale(min(low, ticks[0]), max(high, ticks[-1]), start, end, ticks, is_log=True)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-300)))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999999)


def show_number(value: float) -> str:
    """Return ``value`` short, as a tick has it: ``2.5``, ``1,500``, ``20k``, ``3M``."""
    if value == 0 or 1e-4 <= abs(value) < 1e4:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6)):
        if size <= abs(value) < size * 1e3:
            return f"{value / size:.4g}{unit}"
    return f"{value:.2g}"

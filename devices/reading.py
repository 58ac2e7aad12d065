"""One value of one sensor, or the reason why there is none.

A sensor that is absent must never look like a sensor that reads zero: whoever divides joules by
tokens would publish it.
"""

from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class Reading:
    """What a sensor said, and where it was read."""

    value: float | None
    """None where ``status`` is ``unavailable``."""
    unit: str
    status: Literal["measured", "estimated", "unavailable"]
    source: str
    """The file or the call that was asked."""
    reason: str | None
    """Why nothing was measured, or why it is only an estimate; None where it was measured."""

    @classmethod
    def measured(cls, value: float, unit: str, source: str) -> Self:
        """Return a reading with a value."""
        return cls(value, unit, "measured", source, None)

    @classmethod
    def estimated(cls, value: float, unit: str, source: str, reason: str) -> Self:
        """Return a value that leaves something out or was corrected, as ``reason`` says."""
        return cls(value, unit, "estimated", source, reason)

    @classmethod
    def unavailable(cls, unit: str, source: str, reason: str) -> Self:
        """Return a reading without a value, for ``reason``."""
        return cls(None, unit, "unavailable", source, reason)

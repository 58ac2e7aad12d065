"""A figure with its standard error, and how both are shown; light, for whoever only shows them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure and how far chance may have moved it."""

    value: float
    standard_error: float | None
    """None where a single block says nothing of the spread."""


def value_text(estimate: Estimate, digits: int) -> str:
    """Return the figure with so many digits behind the point, and ``±`` its standard error."""
    error = estimate.standard_error
    spread = "" if error is None else f" \u00b1 {error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{spread}"


def percent_text(estimate: Estimate) -> str:
    """Return the figure in percent, and ``±`` its standard error."""
    error = estimate.standard_error
    spread = "" if error is None else f" \u00b1 {error:.2%}"
    return f"{estimate.value:.2%}{spread}"

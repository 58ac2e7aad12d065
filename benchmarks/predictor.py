"""How well the decode predictor meets speeds that it was not fitted on.

    python benchmarks/predictor.py --out benchmarks/results/predictor.json

Every published point is predicted from the other points of its device, backend and power mode.
The prior of the overhead was chosen on the groups marked in_survey, so those errors flatter the
prior a little; the other groups were added later and no choice was made on them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from record import record

from edgekd.devices.measured import Group, published_groups
from edgekd.devices.predict import (
    CALIBRATED_INTERVAL,
    PRIOR_OVERHEAD_S,
    PRIOR_SPREAD,
    UNCALIBRATED_FACTOR,
    calibrate,
    from_bandwidth,
    leave_one_out,
)
from edgekd.devices.spec import list_specs


def percentile(values: Sequence[float], share: float) -> float:
    """Return the ``share`` quantile by linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    """Return how large the errors of all points of ``groups`` are."""
    errors = [abs(error) for group in groups for error in leave_one_out(group.points)]
    return {
        "points": len(errors),
        "median": median(errors),
        "p90": percentile(errors, 0.9),
        "max": max(errors),
        "within_interval": sum(error <= CALIBRATED_INTERVAL for error in errors) / len(errors),
    }


def describe(group: Group) -> dict[str, Any]:
    """Return the fit of one group and the error of each of its points."""
    line = calibrate(group.points)
    errors = leave_one_out(group.points)
    return {
        "device": group.device,
        "backend": group.backend,
        "power_mode": group.power_mode,
        "overhead_ms": line.overhead_s * 1e3,
        "gb_per_s": line.bytes_per_s / 1e9,
        "held_out_errors": dict(zip(group.models, errors, strict=True)),
    }


def from_peak_alone(groups: Sequence[Group]) -> dict[str, Any]:
    """Return how the prediction from the published bandwidth alone does."""
    peaks = {spec.name: spec.value("bandwidth_bytes_per_s") for spec in list_specs()}
    ratios = [
        from_bandwidth(peak).seconds(point.read_bytes) / point.seconds
        for group in groups
        if (peak := peaks.get(group.device))
        for point in group.points
    ]
    within = [1 / UNCALIBRATED_FACTOR <= ratio <= UNCALIBRATED_FACTOR for ratio in ratios]
    return {
        "points": len(ratios),
        "median_measured_over_predicted": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "within_factor_2": sum(within) / len(within),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    groups = published_groups()
    result = {
        "prior_overhead_ms": PRIOR_OVERHEAD_S * 1e3,
        "prior_spread": PRIOR_SPREAD,
        "all": summary(groups),
        "survey": summary([group for group in groups if group.in_survey]),
        "survey_with_three_points": summary(
            [group for group in groups if group.in_survey and len(group.points) > 2]
        ),
        "added_later": summary([group for group in groups if not group.in_survey]),
        "peak_bandwidth_alone": from_peak_alone(groups),
        "groups": [describe(group) for group in groups],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()

"""How well the decode predictor meets speeds that it was not fitted on.

    python benchmarks/predictor.py --out benchmarks/results/predictor.json

Every published point is predicted from the other points of its device, backend and power mode.
``chosen_without_the_device`` is the same with the two numbers of the prior chosen anew for each
device, on the points of all other devices: what a device that nobody looked at may expect. Groups
marked in_survey are those that the first form of the prediction was found on.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from record import record

from edgekd.devices import predict
from edgekd.devices.measured import Group, published_groups
from edgekd.devices.predict import (
    CALIBRATED_INTERVAL,
    PRIOR_SHARE,
    PRIOR_SPREAD,
    UNCALIBRATED_FACTOR,
    calibrate,
    from_bandwidth,
    leave_one_out,
)
from edgekd.devices.spec import list_specs

TRIED = [
    (share, spread)
    for share in (0.02, 0.03, 0.05, 0.08, 0.1, 0.15, 0.2)
    for spread in (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the ``share`` quantile by linear interpolation."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@contextmanager
def prior(share: float, spread: float) -> Iterator[None]:
    """Predict with another prior for a while."""
    before = predict.PRIOR_SHARE, predict.PRIOR_SPREAD
    predict.PRIOR_SHARE, predict.PRIOR_SPREAD = share, spread
    yield
    predict.PRIOR_SHARE, predict.PRIOR_SPREAD = before


def chosen_elsewhere(groups: Sequence[Group]) -> dict[int, list[float]]:
    """Return the errors of each group, its prior the best one of all other devices."""
    tried: dict[tuple[float, float], list[list[float]]] = {}
    for pair in TRIED:
        with prior(*pair):
            tried[pair] = [leave_one_out(group.points) for group in groups]
    found = {}
    for place, group in enumerate(groups):
        others = [i for i, other in enumerate(groups) if other.device != group.device]

        def miss(pair: tuple[float, float], others: Sequence[int] = others) -> float:
            errors = [error for i in others for error in tried[pair][i]]
            return sum(abs(math.log1p(error)) for error in errors) / len(errors)

        found[place] = tried[min(TRIED, key=miss)][place]
    return found


def summary(groups: Sequence[Group]) -> dict[str, Any]:
    """Return how large the errors of all points of ``groups`` are."""
    return summarise([error for group in groups for error in leave_one_out(group.points)])


def summarise(signed: Sequence[float]) -> dict[str, Any]:
    """Return how large ``signed`` errors are."""
    errors = [abs(error) for error in signed]
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
        "layer_us": line.layer_s * 1e6,
        "gb_per_s": line.bytes_per_s / 1e9,
        "held_out_errors": dict(zip(group.models, errors, strict=True)),
    }


def from_peak_alone(groups: Sequence[Group]) -> dict[str, Any]:
    """Return how the prediction from the published bandwidth alone does."""
    peaks = {spec.name: spec.value("bandwidth_bytes_per_s") for spec in list_specs()}
    ratios = [
        from_bandwidth(peak).seconds(point.read_bytes, point.n_layers) / point.seconds
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
    elsewhere = chosen_elsewhere(groups)
    result = {
        "prior_share": PRIOR_SHARE,
        "prior_spread": PRIOR_SPREAD,
        "all": summary(groups),
        "survey": summary([group for group in groups if group.in_survey]),
        "survey_with_three_points": summary(
            [group for group in groups if group.in_survey and len(group.points) > 2]
        ),
        "added_later": summary([group for group in groups if not group.in_survey]),
        "chosen_without_the_device": {
            "all": summarise([error for errors in elsewhere.values() for error in errors]),
            "survey": summarise(
                [e for i, errors in elsewhere.items() if groups[i].in_survey for e in errors]
            ),
        },
        "peak_bandwidth_alone": from_peak_alone(groups),
        "groups": [describe(group) for group in groups],
    }
    record(result, arguments.out)


if __name__ == "__main__":
    main()

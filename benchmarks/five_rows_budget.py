"""How many steps fit: what the stages of benchmarks/five_rows.py cost, from what was timed."""

from collections.abc import Mapping
from dataclasses import dataclass

FIRST, SECOND = "first", "second"
RUNS = (
    ("baseline", FIRST),
    ("baseline", SECOND),
    ("distilled", FIRST),
    ("distilled", SECOND),
    ("grid", SECOND),
)
"""What is trained: how, and which part of the tokens."""
MARGIN = 1.15  # a long run's steps are slower than the fastest of a probe
MIN_STEPS = 4
N_OTHER_ROWS = 5  # beside the teacher's


@dataclass(frozen=True)
class Cost:
    """What one way of training takes."""

    step_s: float
    fixed_s: float
    """Of a run without its steps: imports, compiling, writing the student."""


def cut(steps: int, second_share: float) -> dict[str, int]:
    """Return the steps of both parts of a row's training; together they are ``steps``."""
    second = max(1, min(steps - 1, round(steps * second_share)))
    return {FIRST: steps - second, SECOND: second}


def measuring_s(export_s: float, quality_s: float, pilot_bench_s: float, repetitions: int) -> float:
    """Return at most how many seconds the other rows' exports and measurements take.

    Each is no larger than the teacher, whose exporting and answering were timed. The pilot is a
    benchmark of the teacher with one repetition and all warming up.
    """
    bench_s = (N_OTHER_ROWS + 1) * pilot_bench_s * (1 + repetitions) / 2
    return N_OTHER_ROWS * (export_s + quality_s) + bench_s


def steps_within(left_s: float, costs: Mapping[str, Cost], second_share: float) -> int:
    """Return how many steps each row can be trained for in ``left_s`` seconds; 0 if for none."""
    shares = {FIRST: 1 - second_share, SECOND: second_share}
    fixed_s = sum(costs[kind].fixed_s for kind, _ in RUNS)
    step_s = sum(costs[kind].step_s * shares[part] for kind, part in RUNS)
    steps = int((left_s - fixed_s) / (step_s * MARGIN))
    return steps if steps >= MIN_STEPS else 0

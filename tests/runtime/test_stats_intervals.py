import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.stats import paired_ratio, summarise, t_quantile, unpaired_ratio

# Two-sided 95 %, from the table in Student's t: NIST/SEMATECH e-Handbook, 1.3.6.7.2.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}
TIMES = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=20)


@pytest.mark.parametrize("df", TABLE)
def test_t_quantiles_are_those_of_the_table(df: int) -> None:
    assert t_quantile(df) == pytest.approx(TABLE[df], abs=6e-4)


def test_t_becomes_the_normal_distribution() -> None:
    assert t_quantile(1e9) == pytest.approx(1.95996, abs=1e-5)
    assert t_quantile(2000) == pytest.approx(1.9612, abs=1e-4)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says() -> None:
    generator = random.Random(0)
    hits = 0
    for _ in range(1000):
        interval = summarise([generator.gauss(10, 1) for _ in range(5)]).ci95
        assert interval
        hits += interval[0] <= 10 <= interval[1]
    assert 930 <= hits <= 970


@given(TIMES, st.floats(0.5, 2))
def test_a_paired_ratio_of_scaled_samples_is_exact(base: list[float], factor: float) -> None:
    ratio = paired_ratio(base, [sample * factor for sample in base])
    assert ratio and ratio.paired
    assert ratio.low == pytest.approx(factor) and ratio.high == pytest.approx(factor)


@given(TIMES, TIMES)
def test_swapping_the_sides_inverts_the_ratio(base: list[float], new: list[float]) -> None:
    one, other = unpaired_ratio(base, new), unpaired_ratio(new, base)
    assert one and other
    assert one.value * other.value == pytest.approx(1)
    assert math.log(one.low) == pytest.approx(-math.log(other.high), abs=1e-9)


def test_what_hits_both_of_a_pair_falls_out_of_its_ratio() -> None:
    drift = [1.0, 1.5, 0.7, 2.0, 1.2]
    noise = [1.001, 0.999, 1.002, 0.998, 1.0]
    base, new = drift, [1.1 * d * n for d, n in zip(drift, noise, strict=True)]
    paired, unpaired = paired_ratio(base, new), unpaired_ratio(base, new)
    assert paired and unpaired
    assert paired.low > 1.09 and paired.high < 1.11
    assert unpaired.low < 1 < unpaired.high


def test_one_sample_says_nothing_about_a_ratio() -> None:
    assert paired_ratio([1.0], [2.0]) is None
    assert unpaired_ratio([1.0], [2.0, 2.1]) is None


def test_welchs_interval_is_the_one_of_the_textbook() -> None:
    # log samples 0, 2 and 1, 3, 5: means 1 and 3, variances 2 and 4, df = (2/2 + 4/3)^2 / (1 + 8/9)
    ratio = unpaired_ratio([math.exp(x) for x in (0, 2)], [math.exp(x) for x in (1, 3, 5)])
    error = (1 + 4 / 3) ** 0.5
    df = (7 / 3) ** 2 / (1 + (4 / 3) ** 2 / 2)
    assert ratio and math.log(ratio.value) == pytest.approx(2)
    assert math.log(ratio.high) == pytest.approx(2 + t_quantile(df) * error)

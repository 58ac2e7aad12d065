import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.stats import percentile, summarise

SAMPLES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(SAMPLES, st.floats(0, 100))
def test_percentile_is_the_default_one_of_numpy(samples: list[float], p: float) -> None:
    expected = float(np.percentile(samples, p))
    assert math.isclose(percentile(samples, p), expected, rel_tol=1e-9, abs_tol=1e-6)


@given(SAMPLES)
def test_the_extreme_percentiles_are_samples(samples: list[float]) -> None:
    assert percentile(samples, 0) == min(samples)
    assert percentile(samples, 100) == max(samples)


@given(SAMPLES)
def test_a_summary_agrees_with_numpy_and_keeps_its_samples(samples: list[float]) -> None:
    summary = summarise(samples)
    assert summary.samples == tuple(samples)
    assert math.isclose(summary.mean, float(np.mean(samples)), rel_tol=1e-9, abs_tol=1e-6)
    assert math.isclose(summary.median, float(np.median(samples)), rel_tol=1e-9, abs_tol=1e-6)
    if len(samples) > 1:
        expected = float(np.std(samples, ddof=1))
        assert math.isclose(summary.stdev or 0.0, expected, rel_tol=1e-9, abs_tol=1e-6)


def test_a_single_sample_has_no_spread() -> None:
    summary = summarise([2.5])
    assert (summary.n, summary.stdev, summary.mean) == (1, None, 2.5)


def test_nothing_cannot_be_summarised() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise([])
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)
    with pytest.raises(ValueError, match="not between"):
        percentile([1.0], 101)

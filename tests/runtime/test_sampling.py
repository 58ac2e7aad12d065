import numpy as np
import pytest

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.sampling import Sampler, SamplingParams

LOGITS_V = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))


def drawn(n: int = 300, **settings: float) -> set[int]:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1, **settings))  # type: ignore[arg-type]
    return {sampler.pick(LOGITS_V) for _ in range(n)}


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    assert Sampler(SamplingParams()).pick(LOGITS_V) == 1


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3))
    counts_V = np.bincount([sampler.pick(LOGITS_V) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts_V / 4000, np.exp(LOGITS_V), atol=0.03)


def test_the_same_seed_draws_the_same_tokens() -> None:
    first, second = (Sampler(SamplingParams(temperature=1.5, seed=7)) for _ in range(2))
    assert [first.pick(LOGITS_V) for _ in range(50)] == [second.pick(LOGITS_V) for _ in range(50)]


def test_top_k_leaves_the_likeliest_tokens() -> None:
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=9) == {0, 1, 2, 3}


def test_top_p_leaves_the_smallest_set_that_is_likely_enough() -> None:
    assert drawn(top_p=0.6) == {1, 3}
    assert drawn(top_p=0.9) == {0, 1, 3}
    assert drawn(top_p=0.0) == {1}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    assert Sampler(SamplingParams(temperature=1e-300, seed=0)).pick(LOGITS_V) == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(broken: float) -> None:
    with pytest.raises(EngineError, match="finite"):
        Sampler(SamplingParams()).pick(np.array([0, broken, 1], np.float32))


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        SamplingParams(
            temperature=float("nan"), top_k=-1, top_p=1.1, seed=-2, max_tokens=0, stop=("",)
        )
    for name in ("temperature", "top_k", "top_p", "seed", "max_tokens", "stop"):
        assert name in str(caught.value)

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.candidates import Candidates, at_least, likeliest, most_typical, nucleus
from edgekd.runtime.sampling import Sampler, SamplingParams, check_vocabulary

LOGITS_V = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))


WRONG: dict[str, Any] = {
    "temperature": float("nan"),
    "top_k": -1,
    "top_p": 1.1,
    "min_p": -0.1,
    "typical_p": 2,
    "min_keep": -1,
    "repeat_penalty": 0,
    "frequency_penalty": 2.1,
    "presence_penalty": -3,
    "repeat_last_n": -2,
    "logit_bias": ((-1, 0.0), (3, float("inf"))),
    "seed": -2,
    "max_tokens": 0,
    "stop": ("",),
    "logprobs": 101,
    "samplers": ("top_k", "mirror"),
}


def drawn(n: int = 300, **settings: Any) -> set[int]:
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1} | settings))
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
        SamplingParams(**WRONG)
    for name in WRONG:
        assert name in str(caught.value)


def test_min_p_leaves_what_is_likely_beside_the_likeliest() -> None:
    assert drawn(min_p=0.21) == {1, 3}
    assert drawn(min_p=0.19) == {0, 1, 3}


def test_typical_sampling_leaves_the_tokens_of_expected_surprise() -> None:
    # Entropy 1.09 nats; the surprises 2.30, 0.69, 3.00, 1.05 lie nearest for token 3, then 1.
    assert drawn(typical_p=0.3) == {3}
    assert drawn(typical_p=0.4) == {1, 3}


def test_the_temperature_comes_after_top_p() -> None:
    assert drawn(top_p=0.6) == {1, 3}
    hot = Sampler(SamplingParams(temperature=2.0, top_p=0.6, seed=1))
    assert {hot.pick(LOGITS_V) for _ in range(300)} == {1, 3}


def test_penalties_weigh_tokens_of_the_window_as_llama_cpp_does() -> None:
    logits_V = np.array([2.0, -1.0, 0.5, 0.0], np.float32)
    params = SamplingParams(
        repeat_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.5, repeat_last_n=3
    )
    sampler = Sampler(params, prompt_ids=[2, 0, 1, 0])
    expected_V = [2.0 / 2 - 2 * 0.25 - 0.5, -1.0 * 2 - 0.25 - 0.5, 0.5, 0.0]
    np.testing.assert_allclose(sampler._biased(logits_V, None), expected_V)
    assert sampler.pick(logits_V) == 2


def test_a_token_is_penalized_once_it_was_chosen() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=2.0))
    picked = [sampler.pick(LOGITS_V) for _ in range(3)]
    assert picked == [1, 3, 0]


def test_a_bias_forces_and_forbids() -> None:
    assert Sampler(SamplingParams(logit_bias=((2, 100.0),))).pick(LOGITS_V) == 2
    assert drawn(logit_bias=((1, -100.0), (3, -100.0))) == {0, 2}
    with pytest.raises(RecipeError, match="token 4.*0 to 3"):
        check_vocabulary(SamplingParams(logit_bias=((4, 1.0),)), 4)


def test_only_allowed_tokens_are_chosen_and_none_at_all_is_an_error() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=3, seed=1))
    allowed_V = np.array([True, False, True, False])
    assert {sampler.pick(LOGITS_V, allowed_V) for _ in range(200)} == {0, 2}
    with pytest.raises(EngineError, match="no token is allowed"):
        sampler.pick(LOGITS_V, np.zeros(4, bool))


def test_samplers_act_in_the_order_that_was_asked_for() -> None:
    assert drawn(top_p=0.8, temperature=2.0) == {1, 3}
    first = ("temperature", "top_p")  # flattened, the two likeliest tokens have 0.71 together
    assert drawn(top_p=0.8, temperature=2.0, samplers=first) == {0, 1, 3}
    assert drawn(top_k=1, top_p=0.8, samplers=("top_p",)) == {1, 3}


def test_a_sampler_that_is_not_named_is_off() -> None:
    assert drawn(top_k=2, temperature=0.0, samplers=()) == {0, 1, 2, 3}
    punished = SamplingParams(presence_penalty=2.0, repeat_last_n=-1)
    assert Sampler(punished, [1]).pick(LOGITS_V) == 3
    assert Sampler(replace(punished, samplers=("temperature",)), [1]).pick(LOGITS_V) == 1


def test_penalties_behind_other_samplers_are_refused_where_they_cost_anything() -> None:
    behind = ("top_k", "penalties")
    SamplingParams(samplers=behind)
    with pytest.raises(RecipeError, match="penalties behind others"):
        SamplingParams(samplers=behind, repeat_penalty=1.1)


def test_ignored_stop_tokens_are_never_chosen() -> None:
    assert Sampler(SamplingParams(ignore_eos=True), [], frozenset({1, 3})).pick(LOGITS_V) == 0


def test_log_probabilities_are_the_models_whatever_the_settings() -> None:
    params = SamplingParams(temperature=0.5, logit_bias=((2, 100.0),), logprobs=2)
    choice = Sampler(params).choose(LOGITS_V + 3)
    assert choice.token_id == 2 and choice.logprob == pytest.approx(math.log(0.05), abs=1e-5)
    assert [token_id for token_id, _ in choice.alternatives] == [1, 3]
    assert choice.alternatives[1][1] == pytest.approx(math.log(0.35), abs=1e-5)
    assert Sampler(SamplingParams(logprobs=0)).choose(LOGITS_V).alternatives == ()


def test_the_logits_are_left_as_they_were() -> None:
    logits_V = LOGITS_V.copy()
    settings = {"repeat_penalty": 1.5, "logit_bias": ((0, 1.0),), "temperature": 1.0}
    Sampler(SamplingParams(**settings), [1]).pick(logits_V, LOGITS_V > -2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(logits_V, LOGITS_V)


@pytest.mark.parametrize("settings", [{"top_p": 0.1}, {"min_p": 0.9}, {"typical_p": 0.1}])
def test_a_filter_leaves_as_many_tokens_as_are_to_be_kept(settings: dict[str, Any]) -> None:
    assert len(drawn(**settings)) == 1
    for n in (2, 3, 4):
        assert len(drawn(**settings, min_keep=n)) == n
    assert drawn(top_k=1, min_keep=3) == {1}  # as in llama.cpp


def test_probabilities_behind_the_chain_are_those_of_the_draw() -> None:
    settings = {"top_k": 3, "logit_bias": ((0, 1.0),), "logprobs": 9, "post_sampling_probs": True}
    sampler = Sampler(SamplingParams(temperature=0.5, seed=2, **settings))  # type: ignore[arg-type]
    choices = [sampler.choose(LOGITS_V) for _ in range(4000)]
    told = dict(choices[0].alternatives)
    assert set(told) == {0, 1, 3} and list(told.values()) == sorted(told.values(), reverse=True)
    assert sum(map(math.exp, told.values())) == pytest.approx(1)
    for token_id, log_p in told.items():
        share = np.mean([choice.token_id == token_id for choice in choices])
        assert share == pytest.approx(math.exp(log_p), abs=0.03)
    assert all(choice.logprob == told[choice.token_id] for choice in choices)


def test_behind_no_temperature_one_token_is_certain() -> None:
    params = SamplingParams(logprobs=5, post_sampling_probs=True)
    choice = Sampler(params).choose(LOGITS_V)
    assert (choice.logprob, choice.alternatives) == (0.0, ((1, 0.0),))


def plainly_kept(
    scores_V: NDArray[np.float64], k: int, typical: float, top_p: float, min_p: float, least: int
) -> list[int]:
    """The chain as loops over sorted lists."""
    kept = sorted(range(len(scores_V)), key=lambda i: -scores_V[i])[: k or None]

    def until(ordered: list[int], p: float) -> list[int]:
        total, sums = sum(math.exp(scores_V[i]) for i in kept), 0.0
        for n, i in enumerate(ordered):
            if sums >= p and n >= max(1, least):
                return ordered[:n]
            sums += math.exp(scores_V[i]) / total
        return ordered

    if typical < 1:
        total = sum(math.exp(scores_V[i]) for i in kept)
        surprise = {i: math.log(total) - scores_V[i] for i in kept}
        entropy = sum(math.exp(-each) * each for each in surprise.values())
        kept = until(sorted(kept, key=lambda i: abs(surprise[i] - entropy)), typical)
    if top_p < 1:
        kept = until(sorted(kept, key=lambda i: -scores_V[i]), top_p)
    floor = max(scores_V[i] for i in kept) + (math.log(min_p) if min_p else -math.inf)
    ordered = sorted(kept, key=lambda i: -scores_V[i])
    return sorted(i for n, i in enumerate(ordered) if scores_V[i] >= floor or n < least)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([5, 300, 3000, 9001]),
    st.sampled_from([0, 1, 40, 2000]),
    *[st.sampled_from([1.0, 0.97, 0.5, 0.01])] * 2,
    st.sampled_from([0.0, 0.02, 0.5]),
    st.sampled_from([0, 1, 7, 1000, 10_000]),
)
def test_the_filters_keep_what_plain_loops_keep(
    seed: int, n: int, k: int, typical: float, top_p: float, min_p: float, least: int
) -> None:
    scores_V = np.random.default_rng(seed).normal(scale=2.0, size=n)
    found = likeliest(Candidates.of(scores_V), k)
    found = at_least(nucleus(most_typical(found, typical, least), top_p, least), min_p, least)
    ids = list(range(n)) if found.ids_K is None else found.ids_K.tolist()
    assert ids == plainly_kept(scores_V, k, typical, top_p, min_p, least)
    np.testing.assert_array_equal(found.scores_K, scores_V[ids])

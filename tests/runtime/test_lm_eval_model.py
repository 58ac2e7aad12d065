"""Our model behind lm-evaluation-harness's interface gives what its own HFLM gives."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgekd.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's own imports warn

PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick brown ", "lazy dog"),
    ("", "The lazy dog"),
    ("A distribution is a function that gives the probability " * 6, "of each outcome."),
]


@pytest.fixture
def module() -> Any:
    pytest.importorskip("lm_eval")
    import edgekd.runtime.lm_eval_model as found

    return found


@pytest.fixture
def models(module: Any, tiny_folder: Path) -> tuple[Any, Any]:
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    own = get_model("edgekd")(pretrained=str(tiny_folder), max_length=64)
    hflm = HFLM(str(tiny_folder), device="cpu", dtype="float32", max_length=64, batch_size=1)
    return own, hflm


def _requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_likelihoods_are_those_of_hflm(models: tuple[Any, Any]) -> None:
    own, theirs = (model.loglikelihood(_requests(*PAIRS)) for model in models)
    for (log_p, is_greedy), (expected, expected_greedy) in zip(own, theirs, strict=True):
        assert log_p == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy


def test_rolling_likelihoods_are_those_of_hflm(models: tuple[Any, Any]) -> None:
    texts = [(PAIRS[3][0],), ("The lazy dog",)]
    own, theirs = (model.loglikelihood_rolling(_requests(*texts)) for model in models)
    assert own == pytest.approx(theirs, abs=1e-2)


def test_greedy_texts_are_those_of_hflm(models: tuple[Any, Any]) -> None:
    asked = {"until": ["zzzz"], "max_gen_toks": 6, "do_sample": False}
    own, theirs = (
        model.generate_until([SimpleNamespace(args=("The quick brown", dict(asked)))])
        for model in models
    )
    assert own[0] and own == theirs
    cut = own[0][2:4]
    (short,) = models[0].generate_until(_requests(("The quick brown", asked | {"until": [cut]})))
    assert short == own[0][: own[0].index(cut)]


def test_likelihoods_after_a_generated_text_are_the_same(models: tuple[Any, Any]) -> None:
    own = models[0]
    before = own.loglikelihood(_requests(*PAIRS[:1]))
    own.generate_until(_requests(("The lazy", {"max_gen_toks": 4, "until": []})))
    assert own.loglikelihood(_requests(*PAIRS[:1]))[0][0] == pytest.approx(before[0][0], abs=1e-5)


def test_settings_of_generation_become_ours_or_are_refused(module: Any) -> None:
    sampled = module.sampling_params({"temperature": 0.5, "top_p": 0.9, "until": "stop"})
    assert (sampled.temperature, sampled.top_p, sampled.stop) == (0.5, 0.9, ("stop",))
    greedy = module.sampling_params({"do_sample": False, "temperature": 0.7, "until": [""]})
    assert (greedy.temperature, greedy.stop, greedy.max_tokens) == (0.0, (), 256)
    with pytest.raises(RecipeError, match="beam_width"):
        module.sampling_params({"beam_width": 3})

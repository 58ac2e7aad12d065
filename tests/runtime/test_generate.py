from pathlib import Path

import pytest

from edgekd.errors import EngineError, RecipeError
from edgekd.runtime.generate import generate
from edgekd.runtime.loading import LoadedModel, open_model
from edgekd.runtime.sampling import SamplingParams
from edgekd.runtime.tokenizer import decode

GREEDY = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module", params=["tiny_gguf", "tiny_onnx"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(request.getfixturevalue(request.param), context_tokens=64, n_threads=1)


def run(loaded: LoadedModel, params: SamplingParams, prompt: str = "The quick") -> tuple[str, str]:
    pieces = list(generate(loaded, loaded.tokenizer.encode(prompt), params))
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    return "".join(piece.text for piece in pieces), str(pieces[-1].finish_reason)


def test_the_same_prompt_gives_the_same_text_again(loaded: LoadedModel) -> None:
    first = run(loaded, GREEDY)
    run(loaded, GREEDY, prompt="something else")
    assert run(loaded, GREEDY) == first


def test_the_text_is_what_the_tokens_stand_for(loaded: LoadedModel) -> None:
    params = SamplingParams(temperature=2.0, seed=5, max_tokens=40)
    pieces = list(generate(loaded, loaded.tokenizer.encode("日本"), params))
    ids = [piece.token_id for piece in pieces if piece.token_id not in loaded.tokenizer.stop_ids]
    assert "".join(piece.text for piece in pieces) == decode(loaded.tokenizer, ids)


def test_max_tokens_ends_the_text(loaded: LoadedModel) -> None:
    pieces = list(generate(loaded, [5, 6], SamplingParams(max_tokens=1)))
    assert [piece.finish_reason for piece in pieces] == ["length"]


def test_a_stop_token_ends_the_text(loaded: LoadedModel) -> None:
    params = [SamplingParams(temperature=2.0, seed=seed, max_tokens=60) for seed in range(60)]
    for ending in (list(generate(loaded, [5, 6], each))[-1] for each in params):
        if ending.finish_reason == "stop":
            assert ending.token_id in loaded.tokenizer.stop_ids
            return
    pytest.fail("no seed led to a stop token")


def test_a_full_context_ends_the_text(loaded: LoadedModel) -> None:
    pieces = list(generate(loaded, [5] * 62, SamplingParams(max_tokens=50)))
    assert len(pieces) <= 3
    assert loaded.engine.position <= loaded.engine.context_tokens
    assert list(generate(loaded, [5] * 64, GREEDY))[-1].finish_reason


def test_a_prompt_that_does_not_fit_or_is_empty_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(EngineError, match="do not fit"):
        list(generate(loaded, [5] * 65, GREEDY))
    with pytest.raises(RecipeError, match="no tokens"):
        list(generate(loaded, [], GREEDY))


def test_any_stop_string_ends_the_text_wherever_the_token_borders_lie(
    loaded: LoadedModel,
) -> None:
    text, _ = run(loaded, GREEDY)
    for start in range(0, len(text) - 7, 5):
        stop = text[start : start + 7]
        params = SamplingParams(max_tokens=40, stop=("not in the text", stop))
        assert run(loaded, params) == (text[: text.find(stop)], "stop")


def test_a_closed_generator_computes_nothing_more(loaded: LoadedModel) -> None:
    pieces = generate(loaded, [5, 6, 7], GREEDY)
    next(pieces)
    pieces.close()
    assert loaded.engine.position == 3
    assert list(pieces) == []


def test_both_kinds_of_files_are_opened(tiny_gguf: Path, tiny_onnx: Path) -> None:
    names = {open_model(path, context_tokens=32).engine.name for path in (tiny_gguf, tiny_onnx)}
    assert names == {"llama.cpp", "onnxruntime"}

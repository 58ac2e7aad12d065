from pathlib import Path

import numpy as np
import pytest

from edgekd.errors import EngineError
from edgekd.runtime.loading import LoadedModel, open_model
from tests.conftest import TEXTS

MODELS = ["tiny_folder", "tiny_gguf", "tiny_onnx"]


@pytest.fixture(params=MODELS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return open_model(request.getfixturevalue(request.param), context_tokens=256, n_threads=1)


def test_last_logits_are_the_last_of_every_logit(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(TEXTS[0])
    every_TV = loaded.engine.forward(ids, every_logit=True)
    loaded.engine.rewind()
    assert every_TV.shape == (len(ids), loaded.engine.vocab_size)
    np.testing.assert_allclose(loaded.engine.forward(ids), every_TV[-1], atol=2e-3)


def test_one_by_one_gives_the_logits_of_one_pass(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(TEXTS[1])
    at_once_TV = loaded.engine.forward(ids, every_logit=True)
    loaded.engine.rewind()
    singly_TV = np.stack([loaded.engine.forward([token_id]) for token_id in ids])
    assert loaded.engine.position == len(ids)
    np.testing.assert_allclose(singly_TV, at_once_TV, atol=0.15)  # the KV cache is fp16


def test_rewind_forgets_only_what_comes_after(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer.encode(TEXTS[3])
    first_V = loaded.engine.forward(ids)
    loaded.engine.forward([5, 6, 7])
    loaded.engine.rewind(len(ids) - 1)
    np.testing.assert_allclose(loaded.engine.forward(ids[-1:]), first_V, atol=2e-2)


def test_a_full_context_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(EngineError, match="do not fit"):
        loaded.engine.forward([1] * 257)


@pytest.mark.parametrize("text", TEXTS)
def test_all_tokenizers_agree_and_decode_what_they_encoded(
    text: str, tiny_folder: Path, tiny_gguf: Path, tiny_onnx: Path
) -> None:
    tokenizers = [
        open_model(path, context_tokens=64).tokenizer
        for path in (tiny_folder, tiny_gguf, tiny_onnx)
    ]
    expected = tokenizers[0].encode(text)
    for tokenizer in tokenizers:
        assert tokenizer.encode(text) == expected
        assert b"".join(map(tokenizer.token_bytes, expected)).decode() == text
        assert tokenizer.stop_ids >= {2}

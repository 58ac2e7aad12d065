"""/v1/embeddings against torch's hidden states."""

import struct
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaModel

from tests.runtime.serving import Serving, refused, serving

ROUTE = "/v1/embeddings"


@pytest.fixture(scope="module")
def server(float_gguf: Path) -> Iterator[Serving]:
    with serving(float_gguf) as found:
        yield found


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    model = LlamaModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        mean_H = model(torch.tensor([ids])).last_hidden_state[0].mean(0).double()
    return np.asarray(mean_H / mean_H.norm())


def test_an_embedding_is_the_mean_hidden_state(server: Serving, tiny_folder: Path) -> None:
    # Longer than one batch of the embedder, so that what spans batches counts too.
    inputs = [[5, 9, 80, 200, 7], [20 + number % 300 for number in range(150)]]
    found = server.post(ROUTE, {"input": inputs}).json()
    assert [each["index"] for each in found["data"]] == [0, 1]
    assert found["usage"] == {"prompt_tokens": 155, "total_tokens": 155}
    for each, ids in zip(found["data"], inputs, strict=True):
        np.testing.assert_allclose(each["embedding"], expected(tiny_folder, ids), atol=2e-3)
        assert np.linalg.norm(each["embedding"]) == pytest.approx(1)


def test_texts_and_base64_give_the_same_vectors(server: Serving) -> None:
    text = "The quick brown fox"
    ids = server.post("/tokenize", {"content": text, "add_special": True}).json()["tokens"]
    numbers, other = server.post(ROUTE, {"input": [text, "def add"], "model": "tiny"}).json()[
        "data"
    ]
    (by_ids,) = server.post(ROUTE, {"input": ids, "encoding_format": "base64"}).json()["data"]
    raw = b64decode(by_ids["embedding"])
    np.testing.assert_allclose(struct.unpack("<64f", raw), numbers["embedding"], atol=1e-6)
    assert not np.allclose(numbers["embedding"], other["embedding"], atol=0.01)
    assert server.post(ROUTE, {"input": text, "dimensions": 64}).json()["data"][0] == numbers


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"input": "a", "dimensions": 32}, "invalid_value"),
        ({"input": ""}, "invalid_value"),
        ({"input": [10**6]}, "invalid_value"),
        ({"input": "fox " * 400}, "context_length_exceeded"),
        ({"input": []}, "invalid_request"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_request"),
    ],
)
def test_what_cannot_be_embedded_is_refused(server: Serving, asked: object, code: str) -> None:
    refused(server.post(ROUTE, asked), 400, code)
    assert server.engine.restarts == 0


def test_an_engine_without_hidden_states_says_so(float_onnx: Path) -> None:
    with serving(float_onnx) as server:
        answer = server.post(ROUTE, {"input": "a"})
        assert "gives no embeddings" in refused(answer, 422, "model_cannot")

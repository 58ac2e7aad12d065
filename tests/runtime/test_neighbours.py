"""No request's answer depends on what runs beside it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgekd.runtime.batch_engine import BatchEngine, EngineOptions, Work
from edgekd.runtime.llamacpp_batch import LlamaCppBatchEngine
from edgekd.runtime.onnx_batch import OnnxBatchEngine
from tests.runtime.serving import CHAT, HELLO, TEXT, Json, Serving, serving

ASKED: list[tuple[str, Json]] = [
    (TEXT, {"prompt": "The quick brown", "max_tokens": 40, "temperature": 0}),
    (TEXT, {"prompt": "def add(a, b):", "max_tokens": 40, "temperature": 1.3, "seed": 11}),
    (CHAT, HELLO | {"temperature": 0.7, "top_p": 0.9}),
    (TEXT, {"prompt": "A distribution " * 5, "max_tokens": 30, "seed": 3, "top_k": 7}),
    (TEXT, {"prompt": [44] * 60, "max_tokens": 20, "temperature": 0, "presence_penalty": 1}),
    (TEXT, {"prompt": "jumps", "max_tokens": 50, "seed": 9, "min_p": 0.1}),
    (CHAT, HELLO | {"response_format": {"type": "json_object"}, "seed": 5}),
    (TEXT, {"prompt": "1234", "max_tokens": 12, "temperature": 0, "logit_bias": {"50": 4}}),
]
MAX_KL = 1e-4
N_DECODED = 12


@pytest.fixture(params=["float_gguf", "float_onnx"])
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(request.getfixturevalue(request.param), n_slots=8) as found:
        yield found


def test_a_float_models_answers_are_those_it_gives_alone(server: Serving) -> None:
    def ask(asked: tuple[str, Json]) -> Json:
        found: Json = server.post(asked[0], asked[1] | {"cache_prompt": False}).json()["choices"][0]
        return found

    alone = [ask(each) for each in ASKED]
    for _ in range(3):
        with ThreadPoolExecutor(len(ASKED)) as pool:
            assert list(pool.map(ask, ASKED)) == alone


def log_softmax(logits_V: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    found: NDArray[np.float64] = shifted_V - np.log(np.exp(shifted_V).sum())
    return found


def decoded(engine: BatchEngine, texts: list[list[int]]) -> list[list[NDArray[np.float64]]]:
    """Return log-probabilities of each text after its prompt and after each token behind it."""
    for slot in range(engine.n_slots):
        engine.forget(slot)
    logits = engine.step([Work(slot, text[:-N_DECODED]) for slot, text in enumerate(texts)])
    found = [[log_softmax(each[-1])] for each in logits]
    for number in range(-N_DECODED, 0):
        logits = engine.step([Work(slot, [text[number]]) for slot, text in enumerate(texts)])
        for rows, each in zip(found, logits, strict=True):
            rows.append(log_softmax(each[-1]))
    return found


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_an_int4_models_distributions_stay_near_those_it_gives_alone(
    kind: str, tiny_gguf: Path, tiny_onnx: Path
) -> None:
    options = EngineOptions(context_tokens=96, n_slots=8)
    engine: BatchEngine
    if kind == "gguf":
        engine = LlamaCppBatchEngine(tiny_gguf, options)
    else:
        engine = OnnxBatchEngine(tiny_onnx, options)
    draw = np.random.default_rng(0)
    texts = [draw.integers(3, 390, 16 + 3 * number).tolist() for number in range(8)]
    alone = [decoded(engine, [text])[0] for text in texts]
    beside = decoded(engine, texts)
    engine.close()
    kls = [
        float((np.exp(p_V) * (p_V - q_V)).sum())
        for rows, others in zip(alone, beside, strict=True)
        for p_V, q_V in zip(rows, others, strict=True)
    ]
    print(f"{kind}: worst KL {max(kls):.2e}, mean {np.mean(kls):.2e}")
    assert max(kls) < MAX_KL

"""The cache that is copied at every step gives what the one that is written in place gives."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.runtime.onnx_copied_cache import CopiedCache
from edgekd.runtime.onnx_engine import OnnxEngine, allocate_cache, open_session


def _run(cache: CopiedCache, ids: list[int], n_past: int) -> NDArray[Any]:
    inputs = {
        "input_ids": np.asarray([ids], np.int64),
        "attention_mask": np.ones((1, n_past + len(ids)), np.int64),
        "logits_to_keep": np.asarray([1], np.int64),
    }
    logits: NDArray[Any] = cache.run(inputs, (1, 1, 405))[0, -1]
    return logits


def test_a_prompt_single_tokens_and_a_shortened_past_give_the_same(tiny_onnx: Path) -> None:
    session = open_session(tiny_onnx, 1)
    copied = CopiedCache(session, allocate_cache(session, 1, 0))
    engine = OnnxEngine(tiny_onnx, 64, 1)
    assert engine.vocab_size == 405
    steps: list[tuple[int, list[int]]] = [(0, [3, 4, 5, 6]), (4, [7]), (5, [8, 9]), (3, [10])]
    for n_past, ids in steps:
        engine.rewind(n_past)
        np.testing.assert_allclose(_run(copied, ids, n_past), engine.forward(ids), atol=1e-4)
    engine.close()

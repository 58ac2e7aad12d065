import weakref
from pathlib import Path

import numpy as np
import pytest

from edgekd.runtime.onnx_engine import OnnxEngine


@pytest.fixture
def engine(tiny_onnx: Path) -> OnnxEngine:
    return OnnxEngine(tiny_onnx, context_tokens=32, n_threads=1)


def test_logits_that_are_held_stay_as_they_are(engine: OnnxEngine) -> None:
    first = engine.forward([5, 6, 7])
    before = first.copy()
    part = engine.forward([8])[:10]
    part_before = part.copy()
    engine.forward([9])
    engine.forward([10])
    np.testing.assert_array_equal(first, before)
    np.testing.assert_array_equal(part, part_before)


def test_memory_that_nobody_holds_is_used_again(engine: OnnxEngine) -> None:
    memory = weakref.ref(engine.forward([5]).base)
    assert engine.forward([6]).base is memory() is not None
    held = engine.forward([7])
    assert engine.forward([8]).base is not held.base


def test_inputs_written_in_place_are_those_of_this_step(engine: OnnxEngine) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    together = engine.forward(ids, every_logit=True).copy()
    engine.rewind()
    for place, token_id in enumerate(ids):
        one_by_one = engine.forward([token_id])
        np.testing.assert_allclose(one_by_one, together[place], rtol=1e-4, atol=1e-4)
    engine.rewind(3)
    np.testing.assert_allclose(engine.forward(ids[3:]), together[-1], rtol=1e-4, atol=1e-4)

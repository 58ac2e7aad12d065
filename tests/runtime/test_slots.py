from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.batch_engine import BatchEngine, EngineOptions, Work
from edgekd.runtime.onnx_batch import OnnxBatchEngine
from edgekd.runtime.slots import Claim, Slots, common_prefix

IDS = st.lists(st.integers(0, 1), max_size=40)


@pytest.fixture
def engine(float_onnx: Path) -> Iterator[BatchEngine]:
    made = OnnxBatchEngine(float_onnx, EngineOptions(context_tokens=128, n_slots=3))
    yield made
    made.close()


def serve(engine: BatchEngine, slots: Slots, ids: list[int]) -> Claim:
    """Run the prompt ``ids`` and let its slot go."""
    claim = slots.claim(ids)
    assert claim
    rest = ids[claim.n_cached :]
    engine.step([Work(claim.slot, rest, 0)])
    slots.extend(claim.slot, rest)
    slots.release(claim.slot)
    return claim


@given(IDS, IDS, IDS)
def test_the_common_prefix_is_the_longest(start: list[int], one: list[int], two: list[int]) -> None:
    first, second = start + one, start + two
    n = common_prefix(first, second)
    assert first[:n] == second[:n] and n >= len(start)
    assert n == min(len(first), len(second)) or first[n] != second[n]


def test_the_slot_with_the_longest_prefix_is_taken_else_the_oldest(engine: BatchEngine) -> None:
    slots = Slots(engine)
    texts = [list(range(start, start + 20)) for start in (10, 40, 70)]
    assert [serve(engine, slots, text).slot for text in texts] == [0, 1, 2]
    assert serve(engine, slots, [*texts[1], 5]) == Claim(1, 20)
    assert serve(engine, slots, [200, 201]) == Claim(0, 0)
    assert serve(engine, slots, [202, 203]) == Claim(2, 0)


def test_a_short_shared_start_is_copied_and_the_long_text_kept(engine: BatchEngine) -> None:
    slots = Slots(engine)
    long = list(range(10, 70))
    serve(engine, slots, long)
    claim = serve(engine, slots, [*long[:10], 5, 6])
    assert claim == Claim(1, 10)
    assert [engine.length(slot) for slot in range(3)] == [60, 12, 0]
    assert serve(engine, slots, [*long, 7]) == Claim(0, 60)


def test_a_busy_slot_lends_its_prefix_but_is_never_taken(engine: BatchEngine) -> None:
    slots = Slots(engine)
    ids = list(range(10, 70))
    first = slots.claim(ids)
    assert first == Claim(0, 0)
    assert slots.claim([*ids, 1]) is None  # the tokens will be there soon
    assert slots.claim(ids, wanted=0) is None
    engine.step([Work(0, ids, 0)])
    slots.extend(0, ids)
    assert slots.claim([*ids, 1]) == Claim(1, 60)
    assert slots.free() == [2]
    assert slots.claim([300]) == Claim(2, 0)
    assert slots.claim([301]) is None


def test_new_texts_stand_beside_those_that_run(float_onnx: Path) -> None:
    engine = OnnxBatchEngine(float_onnx, EngineOptions(context_tokens=128, n_slots=6))
    slots = Slots(engine)
    for number in range(6):  # none is empty, slot 0 is the oldest
        assert serve(engine, slots, [10 * number + 20]).slot == number
    assert slots.claim([1, 2], wanted=4) == Claim(4, 0)
    found = [slots.claim([number, 9]) for number in (3, 5, 7)]
    assert found == [Claim(3, 0), Claim(2, 0), Claim(1, 0)]
    engine.close()


def test_a_cleared_engine_lends_nothing(engine: BatchEngine) -> None:
    slots = Slots(engine)
    serve(engine, slots, [5] * 20)
    slots.clear()
    assert engine.length(0) == slots.n_tokens(0) == 0
    assert serve(engine, slots, [5] * 20).n_cached == 0

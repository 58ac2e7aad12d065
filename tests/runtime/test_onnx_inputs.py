from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgekd.runtime.onnx_engine import OnnxEngine
from edgekd.runtime.onnx_inputs import Mask, StepInputs, make_inputs

NAMES = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "seqlens_k",
    "total_sequence_length",
    "logits_to_keep",
}
CONTEXT_TOKENS = 12


def rows_of_lengths(n_rows: int) -> st.SearchStrategy[list[list[int]]]:
    length = st.integers(0, CONTEXT_TOKENS - 1)
    return st.lists(st.lists(length, min_size=n_rows, max_size=n_rows), min_size=1, max_size=5)


@given(steps=st.integers(1, 4).flatmap(rows_of_lengths))
def test_arrays_that_stay_hold_what_new_ones_would(steps: Sequence[Sequence[int]]) -> None:
    kept = StepInputs(Mask(len(steps[0]), CONTEXT_TOKENS), NAMES)
    for number, lengths in enumerate(steps):
        ids = [number * 10 + row for row in range(len(lengths))]
        found = kept.fill(ids, lengths)
        made = make_inputs(np.asarray(ids)[:, None], lengths, 1, NAMES)
        width = made["attention_mask"].shape[1]
        assert found["attention_mask"].shape == (len(lengths), CONTEXT_TOKENS)
        assert not found["attention_mask"][:, :-width].any()
        np.testing.assert_array_equal(found["attention_mask"][:, -width:], made["attention_mask"])
        assert found["total_sequence_length"] == CONTEXT_TOKENS
        for name in NAMES - {"attention_mask", "total_sequence_length"}:
            np.testing.assert_array_equal(found[name], made[name])
            assert found[name].dtype == made[name].dtype


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 9)), max_size=9))
def test_runs_of_rows_share_one_mask(runs: Sequence[tuple[int, int, int]]) -> None:
    mask, counts = Mask(5, CONTEXT_TOKENS), [0] * 5
    for first, n_rows, length in runs:
        rows = slice(first, first + n_rows)
        lengths = [length + row for row in range(n_rows)]
        StepInputs(mask.part(rows), NAMES).fill([0] * n_rows, lengths)
        counts[rows] = [each + 1 for each in lengths]
        assert mask.ones_RC.sum(-1).tolist() == counts


def test_only_what_a_graph_takes_is_made() -> None:
    names = {"input_ids", "attention_mask"}
    assert StepInputs(Mask(2, CONTEXT_TOKENS), names).fill([1, 2], [3, 4]).keys() == names
    assert make_inputs(np.zeros((2, 3), np.int64), [0, 0], 1, names).keys() == names


def test_a_wider_mask_changes_no_bit_of_the_logits(tiny_onnx: Path) -> None:
    narrow, wide = (OnnxEngine(tiny_onnx, n_tokens, n_threads=1) for n_tokens in (6, 32))
    for ids in ([5], [6, 7, 8], [9], [10]):
        np.testing.assert_array_equal(narrow.forward(ids), wide.forward(ids))

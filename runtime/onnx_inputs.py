"""What a decoder's ONNX graph takes beside its KV cache, and the names it may have for it.

The mask has as many ones as a row has tokens, padding included, and they are on its right, so that
a graph that counts positions from it gets them right. Its width is taken for the longest row's
length, or for any larger one: GroupQueryAttention reads how far a row goes from the ones. A first
prompt alone is told by the width (as many columns as tokens), and a continued one gets its own too.
"""

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

# R rows, S tokens of a row, C context, T mask columns


def make_inputs(
    ids_RS: "NDArray[Any]", lengths: Sequence[int], n_kept: int, names: set[str]
) -> "Arrays":
    """Return the inputs of rows that hold ``lengths`` tokens; of all we know, those in ``names``.

    The graph returns logits after the last ``n_kept`` tokens of each row.
    """
    import numpy as np

    n_tokens = ids_RS.shape[1]
    past_R = np.asarray(lengths, np.int64)
    totals_R = past_R + n_tokens  # padding counts: queries are the last S of them
    width = int(totals_R.max())
    mask_RT = np.arange(width)[None] >= (width - totals_R)[:, None]
    arrays = {
        "input_ids": ids_RS,
        "attention_mask": mask_RT.astype(np.int64),
        "position_ids": past_R[:, None] + np.arange(n_tokens)[None],
        "seqlens_k": (totals_R - 1).astype(np.int32),
        "total_sequence_length": np.asarray(width, np.int32),
        "logits_to_keep": np.asarray([n_kept], np.int64),
    }
    return {name: array for name, array in arrays.items() if name in names}


class Mask:
    """A mask as wide as the context: one for all rows, however many of them a step takes."""

    def __init__(self, n_rows: int, context_tokens: int) -> None:
        """Begin without a one."""
        import numpy as np

        self.ones_RC = np.zeros((n_rows, context_tokens), np.int64)
        self._counts_R = np.zeros(n_rows, np.int64)

    def part(self, rows: slice) -> "Mask":
        """Return ``rows`` of it, in the same memory."""
        part = copy(self)
        part.ones_RC, part._counts_R = self.ones_RC[rows], self._counts_R[rows]
        return part

    def mark(self, row: int, count: int) -> None:
        """Have ``count`` ones on the right of ``row``."""
        width, before = self.ones_RC.shape[1], int(self._counts_R[row])
        if count > before:
            self.ones_RC[row, width - count : width - before] = 1
        else:
            self.ones_RC[row, width - before : width - count] = 0
        self._counts_R[row] = count


class StepInputs:
    """The same for one token in each row, in arrays that stay where they are.

    After each step the processor's caches hold weights, and every object that is made and bound
    anew is read from memory: of 7 ms for a step, 0.1 went into the mask alone.
    """

    def __init__(self, mask: Mask, names: set[str]) -> None:
        """Make the arrays of those ``names`` that we know; only ``mask`` may be others' too."""
        import numpy as np

        n_rows, context_tokens = mask.ones_RC.shape
        self._mask = mask
        self._ids_R1 = np.zeros((n_rows, 1), np.int64)
        self._arrays = make_inputs(self._ids_R1, [0] * n_rows, 1, names)
        self._arrays |= {"attention_mask": mask.ones_RC}
        self._positions_R1 = self._arrays.get("position_ids")
        self._last_R = self._arrays.get("seqlens_k")
        if "total_sequence_length" in self._arrays:
            self._arrays["total_sequence_length"].fill(context_tokens)

    def fill(self, ids: Sequence[int], lengths: Sequence[int]) -> "Arrays":
        """Return the inputs of rows that hold ``lengths`` tokens and get one of ``ids`` each."""
        self._ids_R1[:, 0] = ids
        for row, length in enumerate(lengths):
            self._mask.mark(row, length + 1)
        if self._positions_R1 is not None:
            self._positions_R1[:, 0] = lengths
        if self._last_R is not None:
            self._last_R[:] = lengths
        return self._arrays

"""Cut a model into parts of consecutive layers, each small enough for a context binary of its own.

A binary is loaded whole into a process domain of the chip, which has 32-bit addresses. So the
layers are dealt out over the fewest binaries that each keep to a limit, evenly; the head goes with
the last layer.

    for part in cut_into_parts(checkpoint, plan, MAX_BINARY_BYTES):
        print(part.layers, part.has_head, part.expected_bytes)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from edgekd.errors import ExportError
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.grid_rows import BLOCK_BYTES, BLOCK_SIZE
from edgekd.export.plan import Plan
from edgekd.units import format_bytes

MAX_BINARY_BYTES = 1_000_000_000
"""Unless the user says otherwise: 3.5 GB do not fit into a process domain any more
(https://github.com/microsoft/onnxruntime/pull/20930). It has room for two binaries of this size, a
part's for prompts and for single tokens, with the cache and what they calculate."""
_ADDED_SHARE = 0.05
"""Of the weights, which QNN adds: up to 4.3 % in benchmarks/results/npu_sm8*.json."""
_ADDED_BYTES = 128_000
"""For a layer or the head, whatever its size: a layer of 21 kB became a binary of 111 kB."""
_FP16_BYTES = 2
_EMBEDDING = "model.embed_tokens."
_HEAD = "lm_head."
_NORM = "model.norm."
_LAYER = "model.layers."


@dataclass(frozen=True)
class Part:
    """What one file of a graph holds."""

    layers: range
    has_head: bool
    expected_bytes: int
    """Of its binary, at most."""

    def describe(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "layers": list(self.layers),
            "has_head": self.has_head,
            "expected_bytes": self.expected_bytes,
        }


def cut_into_parts(checkpoint: Checkpoint, plan: Plan, limit_bytes: int) -> list[Part]:
    """Return the parts in which every graph of ``checkpoint`` is written, in running order.

    Raises:
        ExportError: a layer or the head alone is beyond ``limit_bytes``.
    """
    sizes = piece_bytes(checkpoint, plan)
    _check_pieces(sizes, limit_bytes)
    if sizes[-2] + sizes[-1] <= limit_bytes:
        sizes[-2:] = [sizes[-2] + sizes[-1]]
    return [
        Part(
            layers=range(pieces.start, min(pieces.stop, checkpoint.n_layers)),
            has_head=pieces.stop == len(sizes),
            expected_bytes=sum(sizes[piece] for piece in pieces),
        )
        for pieces in cut_evenly(sizes, limit_bytes)
    ]


def cut_evenly(sizes_bytes: Sequence[int], limit_bytes: int) -> list[range]:
    """Return the fewest runs of pieces whose sums keep to ``limit_bytes``, as even as can be.

    Even means the least sum of squares. No piece may be beyond the limit.
    """
    ends = [0, *accumulate(sizes_bytes)]
    # Of the pieces before each end: number of runs, squares of their sums, where they stop.
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]
    for stop in range(1, len(ends)):
        choices = []
        for start, (n_runs, squares, stops) in enumerate(best):
            if (filled := ends[stop] - ends[start]) <= limit_bytes:
                choices.append((n_runs + 1, squares + filled**2, (*stops, stop)))
        best.append(min(choices))
    stops = best[-1][-1]
    return [range(start, stop) for start, stop in zip((0, *stops), stops, strict=False)]


def piece_bytes(checkpoint: Checkpoint, plan: Plan) -> list[int]:
    """Return what each layer, and behind them the head, takes in a binary, at most."""
    head = (_EMBEDDING if checkpoint.is_tied else _HEAD, _NORM)
    prefixes = [(f"{_LAYER}{layer}.",) for layer in range(checkpoint.n_layers)]
    return [
        _ADDED_BYTES + math.ceil((1 + _ADDED_SHARE) * _stored_bytes(checkpoint, plan, prefix))
        for prefix in (*prefixes, head)
    ]


def _stored_bytes(checkpoint: Checkpoint, plan: Plan, prefixes: tuple[str, ...]) -> int:
    """Return the bytes of the tensors whose names begin so; floats are fp16 on the chip."""
    total = 0
    for name in plan.types:
        if name.startswith(prefixes):
            n_values, grid = math.prod(checkpoint.shape(name)), plan.grid_of(name)
            total += (
                n_values * _FP16_BYTES
                if grid is None
                else n_values // BLOCK_SIZE * BLOCK_BYTES[grid]
            )
    return total


def _check_pieces(sizes_bytes: Sequence[int], limit_bytes: int) -> None:
    for piece, size_bytes in enumerate(sizes_bytes):
        if size_bytes > limit_bytes:
            is_head = piece == len(sizes_bytes) - 1
            name = "the head" if is_head else f"layer {piece}"
            smaller = "--head q4_0" if is_head else "--quant q4_0"
            raise ExportError(
                f"{name} alone takes up to {format_bytes(size_bytes)} of a binary, and "
                f"--max-binary allows {format_bytes(limit_bytes)}: allow more, or store it in "
                f"less, as with {smaller}"
            )

"""One tensor as GGUF stores it: read, rounded and packed some rows at a time, on all processors.

What is in memory is the packed tensor and a few rows as float32 for each processor. Bytes do not
depend on how many there are: rows are rounded one by one.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edgekd.export.architectures import interleave_rows
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.grid_rows import round_to_rows
from edgekd.export.k_quants import quantize_rows
from edgekd.export.plan import Plan
from edgekd.runtime.loading import default_threads

_CHUNK_VALUES = 1 << 18  # 1 MiB as float32: it stays in a processor's cache
# numpy has no bfloat16; its bits travel as uint16.
FLOATS: dict[str, type[np.generic]] = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def stored_tensor(checkpoint: Checkpoint, name: str, plan: Plan) -> NDArray[Any]:
    """Return the tensor ``name`` as the file holds it, with the rows in llama.cpp's order."""
    rows = plan.kept.rows(name) if plan.kept is not None else None
    if rows is None:
        rows = _rounded(checkpoint, name, plan)
    n_heads, n_kv_heads = checkpoint.config["num_attention_heads"], checkpoint.n_kv_heads
    if n_rotated := checkpoint.architecture.rotated_heads(name, n_heads, n_kv_heads):
        return interleave_rows(rows, n_rotated)
    return rows


def stored_shape(checkpoint: Checkpoint, name: str, stored: str) -> tuple[tuple[int, ...], Any]:
    """Return shape and numpy type of the tensor ``name`` where it is ``stored``, e.g. as q4_0."""
    shape = checkpoint.shape(name)
    if stored in FLOATS:
        return shape, np.dtype(FLOATS[stored])
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.upper()]]
    return (shape[0], shape[1] // block * block_bytes), np.dtype(np.uint8)


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return ``values`` rounded to bfloat16, halves to even, as ggml's ``ggml_fp32_to_bf16``."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    quiet = bits >> 16 | 64
    is_nan = bits & 0x7FFFFFFF > 0x7F800000
    return np.where(is_nan, quiet, rounded).astype(np.uint16)


def _rounded(checkpoint: Checkpoint, name: str, plan: Plan) -> NDArray[Any]:
    convert = _converter(checkpoint, name, plan)
    rows = np.empty(*stored_shape(checkpoint, name, plan.types[name]))
    step = max(1, _CHUNK_VALUES // max(1, math.prod(checkpoint.shape(name)[1:])))

    def fill(start: int) -> None:
        stop = min(start + step, len(rows))
        rows[start:stop] = convert(checkpoint.rows(name, start, stop))

    with ThreadPoolExecutor(default_threads()) as pool:
        list(pool.map(fill, range(0, len(rows), step)))
    return rows


def _converter(
    checkpoint: Checkpoint, name: str, plan: Plan
) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    """Return what turns rows of float32 into rows of the file."""
    if (grid := plan.grid_of(name)) is not None:
        return lambda rows: round_to_rows(rows, grid)
    if (kind := plan.k_types().get(name)) is not None:
        return lambda rows: quantize_rows(rows, kind)
    offset = checkpoint.architecture.norm_offset if checkpoint.architecture.is_norm(name) else 0.0
    stored = plan.types[name]

    def as_float(rows: NDArray[np.float32]) -> NDArray[Any]:
        shifted = rows + np.float32(offset) if offset else rows
        return bf16_bits(shifted) if stored == "bf16" else shifted.astype(FLOATS[stored])

    return as_float

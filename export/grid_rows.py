"""The grid without torch: float32 matrices to GGUF rows, in numpy.

Equal bit for bit to :mod:`edgekd.export.blocks`, where the grid is described and which training
uses; an artifact written here is checked against blocks rounded there. A process that has loaded
torch takes more memory than everything that writing a small model needs.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

# N rows (outputs), K columns (inputs), M blocks = N * K / 32

GridName = Literal["q4_0", "q4_1", "q8_0"]
BLOCK_SIZE = 32
BITS: dict[GridName, int] = {"q4_0": 4, "q4_1": 4, "q8_0": 8}
BLOCK_BYTES: dict[GridName, int] = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
_UNDEFINED = 8  # code of a block so small that 1 / scale overflows: what torch makes of NaN


def round_to_rows(weight_NK: NDArray[np.float32], grid: GridName) -> NDArray[np.uint8]:
    """Return ``weight_NK`` [N, K] as GGUF rows [N, K / 32 * block bytes] on ``grid``.

    K must be a multiple of the block size.
    """
    blocks_MK = weight_NK.reshape(-1, BLOCK_SIZE)
    # Out of range: an infinite fp16 scale, or a reciprocal of a denormal one; as in C.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        packed = _ROUND[grid](blocks_MK)
    return packed.reshape(len(weight_NK), -1)


def _round_q4_0(blocks_MK: NDArray[np.float32]) -> NDArray[np.uint8]:
    index_M1 = np.abs(blocks_MK).argmax(-1)[:, None]
    # C starts from +0, so a block of zeros of either sign has the scale -0.
    scale_M1 = (np.take_along_axis(blocks_MK, index_M1, -1) + np.float32(0)) / np.float32(-8)
    codes_MK = blocks_MK * _reciprocal(scale_M1)
    codes_MK += np.float32(8.5)
    return _packed([scale_M1], _nibbles(codes_MK, _UNDEFINED))


def _round_q4_1(blocks_MK: NDArray[np.float32]) -> NDArray[np.uint8]:
    min_M1 = np.take_along_axis(blocks_MK, blocks_MK.argmin(-1)[:, None], -1)
    range_M1 = blocks_MK.max(-1, keepdims=True) - min_M1 + np.float32(0)  # never -0
    scale_M1 = range_M1 / np.float32(15)
    codes_MK = (blocks_MK - min_M1) * _reciprocal(scale_M1)
    codes_MK += np.float32(0.5)
    return _packed([scale_M1, min_M1], _nibbles(codes_MK, 0))


def _round_q8_0(blocks_MK: NDArray[np.float32]) -> NDArray[np.uint8]:
    scale_M1 = np.abs(blocks_MK).max(-1, keepdims=True) / np.float32(127)
    scaled_MK = blocks_MK * _reciprocal(scale_M1)
    magnitude_MK = np.abs(scaled_MK)
    whole_MK = np.floor(magnitude_MK)
    whole_MK += magnitude_MK - whole_MK >= 0.5  # halves away from zero, as C's roundf
    np.copysign(whole_MK, scaled_MK, out=whole_MK)
    return _packed([scale_M1], whole_MK.astype(np.int8).view(np.uint8))


_ROUND = {"q4_0": _round_q4_0, "q4_1": _round_q4_1, "q8_0": _round_q8_0}


def _reciprocal(scale_M1: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(scale_M1 == 0, np.float32(0), np.float32(1) / scale_M1)


def _nibbles(codes_MK: NDArray[np.float32], undefined: int) -> NDArray[np.uint8]:
    """Return codes 0..15, cut off to whole numbers, as bytes of two: code j below code j + 16."""
    np.clip(codes_MK, 0, 15, out=codes_MK)
    if np.isnan(codes_MK.sum()):
        np.nan_to_num(codes_MK, copy=False, nan=undefined)
    whole_MK = codes_MK.astype(np.uint8)
    high = np.left_shift(whole_MK[:, BLOCK_SIZE // 2 :], 4)
    return np.bitwise_or(high, whole_MK[:, : BLOCK_SIZE // 2], out=high)


def _packed(halves: list[NDArray[np.float32]], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return blocks as bytes: the ``halves`` rounded to fp16, then the ``codes``."""
    head = np.concatenate([half.astype(np.float16) for half in halves], -1).view(np.uint8)
    return np.concatenate([head, codes], -1)

"""The grid: Q4_0 and Q8_0 blocks, the one function that rounds to them, and their two packings.

A block is 32 neighbouring weights of a row and one fp16 scale; a weight is ``code * scale`` with
a signed integer code. GGUF and ONNX ``MatMulNBits`` store the same codes and scales, packed
differently, so a weight rounded here is one and the same number in both files and in training.

    Q4_0   codes -8..7      GGUF 18 bytes: fp16, then code j and code j+16 share a byte
    Q8_0   codes -127..127  GGUF 34 bytes: fp16, then int8
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.errors import ExportError

# N rows (outputs), K columns (inputs), B blocks in a row = K / 32

GridName = Literal["q4_0", "q8_0"]
BLOCK_SIZE = 32
BITS: dict[GridName, int] = {"q4_0": 4, "q8_0": 8}


@dataclass(frozen=True)
class Blocks:
    """A matrix on a grid."""

    grid: GridName
    codes_NBK: torch.Tensor
    """int8 [N, B, 32]."""
    scales_NB: torch.Tensor
    """float16 [N, B]."""


def quantize(weight_NK: torch.Tensor, grid: GridName) -> Blocks:
    """Return ``weight_NK`` [N, K] rounded to ``grid``.

    Equal bit for bit to ggml's ``quantize_row_q4_0_ref`` and ``quantize_row_q8_0_ref``. The
    arithmetic is float32 whatever the type of the weight, as in C.

    Raises:
        ExportError: rows are no multiple of the block size.
    """
    if weight_NK.dim() != 2 or weight_NK.shape[1] % BLOCK_SIZE:
        raise ExportError(
            f"a matrix of shape {tuple(weight_NK.shape)} has no {grid} form: rows must be a "
            f"multiple of {BLOCK_SIZE}; export it as f16"
        )
    n_rows = weight_NK.shape[0]
    blocks_NBK = weight_NK.detach().float().reshape(n_rows, -1, BLOCK_SIZE)
    codes_NBK, scales_NB1 = (_round_q4_0 if grid == "q4_0" else _round_q8_0)(blocks_NBK)
    return Blocks(grid, codes_NBK.to(torch.int8), scales_NB1.squeeze(-1).half())


def dequantize(blocks: Blocks) -> torch.Tensor:
    """Return the float32 matrix [N, K] that ``blocks`` stand for."""
    scales_NB1 = blocks.scales_NB.float().unsqueeze(-1)
    return (blocks.codes_NBK.float() * scales_NB1).flatten(1)


def fake_quantize(weight_NK: torch.Tensor, grid: GridName) -> torch.Tensor:
    """Return ``weight_NK`` as the runtimes will see it once it is exported on ``grid``."""
    return dequantize(quantize(weight_NK, grid))


def pack_gguf(blocks: Blocks) -> NDArray[np.uint8]:
    """Return the GGUF rows of ``blocks``, uint8 [N, B * 18] for Q4_0 or [N, B * 34] for Q8_0."""
    codes_NBK = blocks.codes_NBK.numpy()
    scales = np.ascontiguousarray(blocks.scales_NB.numpy()[..., None]).view(np.uint8)
    packed: NDArray[np.uint8] = codes_NBK.view(np.uint8)
    if blocks.grid == "q4_0":
        unsigned: NDArray[np.uint8] = (codes_NBK + 8).astype(np.uint8)
        packed = (unsigned[..., :16] | unsigned[..., 16:] << 4).astype(np.uint8)
    return np.concatenate([scales, packed], axis=-1).reshape(len(codes_NBK), -1)


def unpack_gguf(rows: NDArray[np.uint8], grid: GridName) -> Blocks:
    """Return the blocks in GGUF ``rows``, the inverse of :func:`pack_gguf`."""
    block_bytes = 2 + BLOCK_SIZE * BITS[grid] // 8
    blocks = rows.reshape(len(rows), -1, block_bytes)
    scales_NB = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    packed = np.ascontiguousarray(blocks[..., 2:])
    if grid == "q8_0":
        codes_NBK = packed.view(np.int8)
    else:
        codes_NBK = np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.int8) - 8
    return Blocks(grid, torch.from_numpy(codes_NBK.copy()), torch.from_numpy(scales_NB.copy()))


def pack_matmul_nbits(blocks: Blocks) -> NDArray[np.uint8]:
    """Return input ``B`` of ``MatMulNBits``: uint8 [N, B, 16] for Q4_0, [N, B, 32] for Q8_0.

    Neighbours share a byte. The zero point is half the range: code -8 (or -128) is stored as 0.
    """
    if blocks.grid == "q8_0":
        return (blocks.codes_NBK.numpy().astype(np.int16) + 128).astype(np.uint8)
    unsigned = (blocks.codes_NBK.numpy() + 8).astype(np.uint8)
    return (unsigned[..., 0::2] | unsigned[..., 1::2] << 4).astype(np.uint8)


def unpack_matmul_nbits(
    packed: NDArray[np.uint8], scales_NB: NDArray[np.float16], grid: GridName
) -> Blocks:
    """Return the blocks in the inputs of ``MatMulNBits``, the inverse of the packing above."""
    if grid == "q8_0":
        codes_NBK = (packed.astype(np.int16) - 128).astype(np.int8)
    else:
        pairs = np.stack([packed & 15, packed >> 4], axis=-1)
        codes_NBK = pairs.reshape(*packed.shape[:2], BLOCK_SIZE).astype(np.int8) - 8
    return Blocks(grid, torch.from_numpy(codes_NBK), torch.from_numpy(scales_NB.copy()))


def _round_q4_0(blocks_NBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of largest magnitude maps to -8; codes use the scale before it becomes fp16."""
    index = blocks_NBK.abs().argmax(-1, keepdim=True)
    scale_NB1 = blocks_NBK.gather(-1, index) / -8
    unsigned = (blocks_NBK * _reciprocal(scale_NB1)).add_(8.5).trunc_().clamp_(0, 15)
    return unsigned.sub_(8), scale_NB1


def _round_q8_0(blocks_NBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude maps to 127; halves round away from zero, as C's roundf."""
    scale_NB1 = blocks_NBK.abs().amax(-1, keepdim=True) / 127
    scaled = blocks_NBK * _reciprocal(scale_NB1)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    rounded = whole + (magnitude - whole >= 0.5)
    return torch.copysign(rounded, scaled), scale_NB1


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)

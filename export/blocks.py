"""The grid: Q4_0, Q4_1 and Q8_0 blocks, the one function that rounds to them, and their packings.

A block is 32 neighbouring weights of a row and one fp16 scale; a weight is ``code * scale`` with
a signed integer code, in Q4_1 ``code * scale + min``. GGUF and ONNX ``MatMulNBits`` store the same
codes and scales, packed differently, so a weight rounded here is one and the same number in both
files and in training.

    Q4_0   codes -8..7      GGUF 18 bytes: fp16, then code j and code j+16 share a byte
    Q4_1   codes 0..15      GGUF 20 bytes: fp16, fp16 minimum, then as Q4_0
    Q8_0   codes -127..127  GGUF 34 bytes: fp16, then int8

ONNX has no minimum but a zero point, a whole number of scales: few Q4_1 matrices have that form.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.errors import ExportError
from edgekd.export.grid_rows import BITS as BITS
from edgekd.export.grid_rows import BLOCK_SIZE as BLOCK_SIZE
from edgekd.export.grid_rows import GridName as GridName

# N rows (outputs), K columns (inputs), B blocks in a row = K / 32


@dataclass(frozen=True)
class Blocks:
    """A matrix on a grid."""

    grid: GridName
    codes_NBK: torch.Tensor
    """int8 [N, B, 32]."""
    scales_NB: torch.Tensor
    """float16 [N, B]."""
    mins_NB: torch.Tensor | None = None
    """float16 [N, B], the value of code 0; of Q4_1 alone."""


def quantize(weight_NK: torch.Tensor, grid: GridName) -> Blocks:
    """Return ``weight_NK`` [N, K] rounded to ``grid``.

    Equal bit for bit to ggml's ``quantize_row_q4_0_ref`` and its siblings. The arithmetic is
    float32 whatever the type of the weight, as in C.

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
    if grid == "q4_1":
        return _round_q4_1(blocks_NBK)
    codes_NBK, scales_NB1 = (_round_q4_0 if grid == "q4_0" else _round_q8_0)(blocks_NBK)
    return Blocks(grid, codes_NBK.to(torch.int8), scales_NB1.squeeze(-1).half())


def quantize_with_scales(weight_NK: torch.Tensor, scales_NB: torch.Tensor) -> Blocks:
    """Return ``weight_NK`` [N, K] on Q4_0 with the float16 ``scales_NB`` that are given.

    Codes are the nearest ones, halves to even. A block whose scale is 0 is 0.
    """
    scales_NB1 = scales_NB.float().unsqueeze(-1)
    blocks_NBK = weight_NK.detach().float().reshape(*scales_NB.shape, BLOCK_SIZE)
    codes_NBK = torch.where(scales_NB1 == 0, 0.0, blocks_NBK / scales_NB1).round().clamp(-8, 7)
    return Blocks("q4_0", codes_NBK.to(torch.int8), scales_NB)


def dequantize(blocks: Blocks) -> torch.Tensor:
    """Return the float32 matrix [N, K] that ``blocks`` stand for."""
    scales_NB1 = blocks.scales_NB.float().unsqueeze(-1)
    values_NBK = blocks.codes_NBK.float() * scales_NB1
    if blocks.mins_NB is not None:
        values_NBK += blocks.mins_NB.float().unsqueeze(-1)
    return values_NBK.flatten(1)


def fake_quantize(weight_NK: torch.Tensor, grid: GridName) -> torch.Tensor:
    """Return ``weight_NK`` as the runtimes will see it once it is exported on ``grid``."""
    return dequantize(quantize(weight_NK, grid))


def pack_gguf(blocks: Blocks) -> NDArray[np.uint8]:
    """Return the GGUF rows of ``blocks``, uint8 [N, B * 18], * 20 for Q4_1, * 34 for Q8_0."""
    halves = [blocks.scales_NB] if blocks.mins_NB is None else [blocks.scales_NB, blocks.mins_NB]
    head = torch.stack(halves, -1).numpy().view(np.uint8)
    packed: NDArray[np.uint8] = blocks.codes_NBK.numpy().view(np.uint8)
    if BITS[blocks.grid] == 4:
        unsigned = _unsigned_codes(blocks)
        packed = (unsigned[..., :16] | unsigned[..., 16:] << 4).astype(np.uint8)
    return np.concatenate([head, packed], axis=-1).reshape(len(packed), -1)


def unpack_gguf(rows: NDArray[np.uint8], grid: GridName) -> Blocks:
    """Return the blocks in GGUF ``rows``, the inverse of :func:`pack_gguf`."""
    head_bytes = 4 if grid == "q4_1" else 2
    blocks = rows.reshape(len(rows), -1, head_bytes + BLOCK_SIZE * BITS[grid] // 8)
    halves = torch.from_numpy(blocks[..., :head_bytes].copy().view(np.float16))
    packed = np.ascontiguousarray(blocks[..., head_bytes:])
    if grid == "q8_0":
        codes_NBK = packed.view(np.int8).copy()
    else:
        nibbles = np.concatenate([packed & 15, packed >> 4], axis=-1)
        codes_NBK = nibbles.astype(np.int8) - _zero_code(grid)
    mins_NB = halves[..., 1].contiguous() if grid == "q4_1" else None
    return Blocks(grid, torch.from_numpy(codes_NBK), halves[..., 0].contiguous(), mins_NB)


def pack_matmul_nbits(blocks: Blocks) -> NDArray[np.uint8]:
    """Return input ``B`` of ``MatMulNBits``: uint8 [N, B, 16] for 4 bits, [N, B, 32] for Q8_0.

    Neighbours share a byte. The zero point is half the range: code -8 (or -128) is stored as 0; of
    Q4_1 it is an input of its own, :func:`zero_points`.
    """
    if blocks.grid == "q8_0":
        return (blocks.codes_NBK.numpy().astype(np.int16) + 128).astype(np.uint8)
    unsigned = _unsigned_codes(blocks)
    return (unsigned[..., 0::2] | unsigned[..., 1::2] << 4).astype(np.uint8)


def zero_points(blocks: Blocks) -> NDArray[np.uint8]:
    """Return the code that stands for zero in each block of a Q4_1 matrix, uint8 [N, B].

    Raises:
        ExportError: in some block zero is no code, so that the values would change.
    """
    assert blocks.mins_NB is not None
    scales_NB, mins_NB = blocks.scales_NB.float(), blocks.mins_NB.float()
    points_NB = torch.where(scales_NB == 0, 0.0, -mins_NB / scales_NB).round().clamp(0, 15)
    is_exact_NB = -points_NB * scales_NB == mins_NB  # four bits times eleven: no rounding here
    if not is_exact_NB.all():
        share = 1 - float(is_exact_NB.float().mean())
        raise ExportError(
            f"a q4_1 matrix has no exact ONNX form: in {share:.0%} of its blocks the minimum is no "
            "whole number of scales; export it as q4_0, or as GGUF"
        )
    return points_NB.to(torch.uint8).numpy()


def pack_zero_points(points_NB: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return input ``zero_points`` of ``MatMulNBits``: uint8 [N, (B + 1) // 2], low nibbles first.

    The last nibble of an odd number of blocks is 8, as ONNX Runtime leaves it.
    """
    padded = np.pad(points_NB, ((0, 0), (0, points_NB.shape[1] % 2)), constant_values=8)
    return (padded[:, 0::2] | padded[:, 1::2] << 4).astype(np.uint8)


def unpack_matmul_nbits(
    packed: NDArray[np.uint8],
    scales_NB: NDArray[np.float16],
    grid: GridName,
    packed_points: NDArray[np.uint8] | None = None,
) -> Blocks:
    """Return the blocks in the inputs of ``MatMulNBits``, the inverse of the packings above."""
    scales = torch.from_numpy(scales_NB.copy())
    if grid == "q8_0":
        return Blocks(
            grid, torch.from_numpy((packed.astype(np.int16) - 128).astype(np.int8)), scales
        )
    pairs = np.stack([packed & 15, packed >> 4], axis=-1)
    codes_NBK = pairs.reshape(*packed.shape[:2], BLOCK_SIZE).astype(np.int8) - _zero_code(grid)
    mins_NB = None
    if packed_points is not None:
        points = np.stack([packed_points & 15, packed_points >> 4], axis=-1).reshape(
            len(packed), -1
        )
        mins_NB = scales * -torch.from_numpy(points[:, : packed.shape[1]].astype(np.float16))
    return Blocks(grid, torch.from_numpy(codes_NBK), scales, mins_NB)


def _unsigned_codes(blocks: Blocks) -> NDArray[np.uint8]:
    return (blocks.codes_NBK.numpy() + _zero_code(blocks.grid)).astype(np.uint8)


def _zero_code(grid: GridName) -> np.int8:
    """Return what is added to a code of 4 bits where it is stored."""
    return np.int8(8 if grid == "q4_0" else 0)


def _round_q4_1(blocks_NBK: torch.Tensor) -> Blocks:
    """Codes 0 and 15 are the ends of the block; they use scale and minimum before fp16."""
    # By index, as C: of equal values, which may be zeros of either sign, the first.
    min_NB1 = blocks_NBK.gather(-1, blocks_NBK.argmin(-1, keepdim=True))
    range_NB1 = blocks_NBK.amax(-1, keepdim=True) - min_NB1 + 0.0  # never -0
    scale_NB1 = range_NB1 / 15
    codes_NBK = ((blocks_NBK - min_NB1) * _reciprocal(scale_NB1)).add_(0.5).trunc_().clamp_(0, 15)
    scales_NB, mins_NB = scale_NB1.squeeze(-1).half(), min_NB1.squeeze(-1).half()
    return Blocks("q4_1", codes_NBK.to(torch.int8), scales_NB, mins_NB)


def _round_q4_0(blocks_NBK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of largest magnitude maps to -8; codes use the scale before it becomes fp16."""
    index = blocks_NBK.abs().argmax(-1, keepdim=True)
    # C starts from +0, so a block of zeros of either sign has the scale -0.
    scale_NB1 = (blocks_NBK.gather(-1, index) + 0.0) / -8
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

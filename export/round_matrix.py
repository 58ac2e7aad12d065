"""One matrix as its plan asks for it: rounded now, or taken from what calibration kept."""

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.export.blocks import Blocks, GridName, dequantize, quantize, unpack_gguf
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.k_quants import KType, dequantize_rows, quantize_rows
from edgekd.export.kept_rows import KeptRows


def matrix_blocks(
    checkpoint: Checkpoint, name: str, grid: GridName, kept: KeptRows | None
) -> Blocks:
    """Return the matrix ``name`` on ``grid``."""
    if kept is not None and (rows := kept.rows(name)) is not None:
        return unpack_gguf(rows, grid)
    return quantize(checkpoint.tensor(name), grid)


def matrix_rows(
    checkpoint: Checkpoint, name: str, kind: KType, kept: KeptRows | None
) -> NDArray[np.uint8]:
    """Return the matrix ``name`` as rows [N, bytes] of ggml's type ``kind``."""
    if kept is not None and (rows := kept.rows(name)) is not None:
        return rows
    return quantize_rows(checkpoint.tensor(name), kind)


def rounded_values(
    checkpoint: Checkpoint, name: str, stored: GridName | KType, kept: KeptRows | None
) -> torch.Tensor:
    """Return the float32 values [N, K] that the runtimes will see."""
    if stored == "q4_0" or stored == "q4_1" or stored == "q8_0":
        return dequantize(matrix_blocks(checkpoint, name, stored, kept))
    return dequantize_rows(matrix_rows(checkpoint, name, stored, kept), stored)

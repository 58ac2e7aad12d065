"""Read the int4 and int8 blocks back out of an artifact, independently of what wrote them.

GGUF goes through our header reader and plain file reads, ONNX through the onnx package.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgekd.export.architectures import deinterleave_rows
from edgekd.export.blocks import BITS, Blocks, GridName, pack_gguf, unpack_gguf, unpack_matmul_nbits
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.k_quants import K_TYPES
from edgekd.export.to_onnx import MODEL_FILE
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.model_kind import ModelKind, detect_kind


def read_gguf_blocks(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, Blocks]]:
    """Yield checkpoint name and blocks of every tensor on a grid in the GGUF file at ``path``.

    Rows of q and k come in the checkpoint's order.
    """
    for name, stored, rows in _gguf_rows(path, checkpoint):
        if (grid := next((grid for grid in BITS if grid == stored), None)) is not None:
            yield name, unpack_gguf(rows, grid)


def read_gguf_rows(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield checkpoint name and bytes [N, row] of every tensor of another type than the grid's."""
    for name, stored, rows in _gguf_rows(path, checkpoint):
        if stored in K_TYPES:
            yield name, rows


def read_onnx_blocks(folder: Path) -> Iterator[tuple[str, Blocks]]:
    """Yield checkpoint name and blocks of every quantized matrix in the ONNX ``folder``."""
    model = onnx.load(str(folder / MODEL_FILE))
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        bits = next(a.i for a in node.attribute if a.name == "bits")
        name = node.input[1].removesuffix(".codes")
        packed = onnx.numpy_helper.to_array(arrays[f"{name}.codes"])
        scales_NB = onnx.numpy_helper.to_array(arrays[f"{name}.scales"])
        points = arrays.get(f"{name}.zero_points")
        packed_points = None if points is None else onnx.numpy_helper.to_array(points)
        grid: GridName = "q8_0" if bits == 8 else "q4_0" if points is None else "q4_1"
        yield name, unpack_matmul_nbits(packed, scales_NB, grid, packed_points)


def read_rows(artifact: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield checkpoint name and GGUF rows of every quantized matrix in a GGUF or ONNX artifact.

    Rows come in the checkpoint's order, so that both containers of one model give the same.
    """
    if detect_kind(artifact) is ModelKind.ONNX:
        found = read_onnx_blocks(artifact)
    else:
        found = read_gguf_blocks(artifact, checkpoint)
        yield from read_gguf_rows(artifact, checkpoint)
    for name, blocks in found:
        yield name, pack_gguf(blocks)


def _gguf_rows(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Yield checkpoint name, type and bytes [N, row] of every quantized tensor."""
    architecture = checkpoint.architecture
    n_heads, n_groups = checkpoint.config["num_attention_heads"], checkpoint.n_kv_heads
    for entry in read_gguf_header(path).tensors:
        name, stored = architecture.to_hf_name(entry.name), entry.type_name.lower()
        if name is None or stored not in (*BITS, *K_TYPES):
            continue
        raw = np.fromfile(path, np.uint8, entry.size_bytes, offset=entry.offset_bytes)
        rows = torch.from_numpy(raw.reshape(entry.shape[1], -1))
        if n_rotated := architecture.rotated_heads(name, n_heads, n_groups):
            rows = deinterleave_rows(rows, n_rotated)
        yield name, stored, rows.numpy()

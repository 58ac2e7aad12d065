"""Read the int4 and int8 blocks back out of an artifact, independently of what wrote them.

GGUF goes through our header reader and plain file reads, ONNX through the onnx package.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from edgekd.errors import VerificationError
from edgekd.export.architectures import deinterleave_rows
from edgekd.export.blocks import Blocks, GridName, unpack_gguf, unpack_matmul_nbits
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.k_quants import K_TYPES
from edgekd.export.onnx_matrices import ROWS_KEY
from edgekd.export.to_onnx import MODEL_FILE
from edgekd.runtime.gguf_header import read_gguf_header


def read_gguf_blocks(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, Blocks]]:
    """Yield checkpoint name and blocks of every Q4_0 or Q8_0 tensor in the GGUF file at ``path``.

    Rows of q and k come in the checkpoint's order.
    """
    architecture = checkpoint.architecture
    for entry in read_gguf_header(path).tensors:
        name = architecture.to_hf_name(entry.name)
        if name is None or entry.type_name not in ("Q4_0", "Q8_0"):
            continue
        raw = np.fromfile(path, np.uint8, entry.size_bytes, offset=entry.offset_bytes)
        grid: GridName = "q4_0" if entry.type_name == "Q4_0" else "q8_0"
        blocks = unpack_gguf(raw.reshape(entry.shape[1], -1), grid)
        n_rotated = architecture.rotated_heads(
            name, checkpoint.config["num_attention_heads"], checkpoint.n_kv_heads
        )
        if n_rotated:
            blocks = Blocks(
                grid,
                deinterleave_rows(blocks.codes_NBK, n_rotated),
                deinterleave_rows(blocks.scales_NB, n_rotated),
            )
        yield name, blocks


def read_gguf_rows(path: Path, checkpoint: Checkpoint) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield checkpoint name and bytes [N, row] of every tensor of another type than the grid's."""
    architecture = checkpoint.architecture
    n_heads, n_groups = checkpoint.config["num_attention_heads"], checkpoint.n_kv_heads
    for entry in read_gguf_header(path).tensors:
        name = architecture.to_hf_name(entry.name)
        if name is None or entry.type_name.lower() not in K_TYPES:
            continue
        raw = np.fromfile(path, np.uint8, entry.size_bytes, offset=entry.offset_bytes)
        rows = torch.from_numpy(raw.reshape(entry.shape[1], -1))
        if n_rotated := architecture.rotated_heads(name, n_heads, n_groups):
            rows = deinterleave_rows(rows, n_rotated)
        yield name, rows.numpy()


def read_onnx_blocks(folder: Path) -> Iterator[tuple[str, Blocks]]:
    """Yield checkpoint name and blocks of every quantized matrix in the ONNX ``folder``.

    A matrix of several is cut into its parts, by the rows noted in the model.

    Raises:
        VerificationError: the noted rows are not those that the file holds.
    """
    model = onnx.load(str(folder / MODEL_FILE))
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    rows = json.loads(metadata.get(ROWS_KEY, "{}"))
    for stored, bits in _quantized_matrices(model).items():
        packed = onnx.numpy_helper.to_array(arrays[f"{stored}.codes"])
        scales_NB = onnx.numpy_helper.to_array(arrays[f"{stored}.scales"])
        blocks = unpack_matmul_nbits(packed, scales_NB, "q4_0" if bits == 4 else "q8_0")
        yield from _parts(blocks, rows.get(stored) or {stored: len(packed)})


def _quantized_matrices(model: onnx.ModelProto) -> dict[str, int]:
    """Return name and bits of every matrix that is multiplied by or looked up in."""
    codes_input = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
    found = {}
    for node in model.graph.node:
        if node.op_type in codes_input:
            name = node.input[codes_input[node.op_type]].removesuffix(".codes")
            found[name] = next(a.i for a in node.attribute if a.name == "bits")
    return found


def _parts(blocks: Blocks, rows: dict[str, int]) -> Iterator[tuple[str, Blocks]]:
    if sum(rows.values()) != len(blocks.codes_NBK):
        raise VerificationError(
            f"a matrix of {len(blocks.codes_NBK)} rows is said to hold {rows}; export it again"
        )
    end = 0
    for name, n_rows in rows.items():
        start, end = end, end + n_rows
        yield name, Blocks(blocks.grid, blocks.codes_NBK[start:end], blocks.scales_NB[start:end])

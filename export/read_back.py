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
from edgekd.export.blocks import BITS, Blocks, GridName, pack_gguf, unpack_gguf, unpack_matmul_nbits
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.k_quants import K_TYPES
from edgekd.export.onnx_graph import ROWS_KEY
from edgekd.export.to_onnx import MODEL_FILE
from edgekd.runtime.gguf_header import read_gguf_header
from edgekd.runtime.model_kind import ModelKind, detect_kind
from edgekd.runtime.onnx_check import check_onnx
from edgekd.runtime.static_model import HOST_GRAPH, is_static, read_static


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
    """Yield checkpoint name and blocks of every quantized matrix in the ONNX ``folder``.

    Of a folder with several graphs every graph is read, and what they share is yielded by each.

    Raises:
        VerificationError: the noted rows are not those that the file holds.
    """
    files = [MODEL_FILE]
    if is_static(folder):
        files = [*(f"{part}.onnx" for part in read_static(folder).all_parts()), HOST_GRAPH]
    for name in files:
        yield from read_graph_blocks(folder / name)


def read_graph_blocks(path: Path) -> Iterator[tuple[str, Blocks]]:
    """Yield checkpoint name and blocks of every quantized matrix in the graph at ``path``.

    A matrix of several is cut into its parts, by the rows noted in the model.

    Raises:
        VerificationError: the noted rows are not those that the file holds.
        ModelError: the file is not sound.
    """
    check_onnx(path)
    model = onnx.load(str(path))
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    rows = json.loads(metadata.get(ROWS_KEY, "{}"))
    for stored, bits in _quantized_matrices(model).items():
        packed = onnx.numpy_helper.to_array(arrays[f"{stored}.codes"])
        scales_NB = onnx.numpy_helper.to_array(arrays[f"{stored}.scales"])
        points = arrays.get(f"{stored}.zero_points")
        packed_points = None if points is None else onnx.numpy_helper.to_array(points)
        grid: GridName = "q8_0" if bits == 8 else "q4_0" if points is None else "q4_1"
        blocks = unpack_matmul_nbits(packed, scales_NB, grid, packed_points)
        yield from _parts(blocks, rows.get(stored) or {stored: len(packed)})


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
        part = slice(end, end + n_rows)
        mins_NB = None if blocks.mins_NB is None else blocks.mins_NB[part]
        yield name, Blocks(blocks.grid, blocks.codes_NBK[part], blocks.scales_NB[part], mins_NB)
        end += n_rows

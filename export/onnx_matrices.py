"""The matrices of an ONNX decoder: how they are stored, multiplied by and looked up in.

On a grid a matrix is the codes and fp16 scales of the GGUF file, read by ``MatMulNBits`` and, for
the embedding, by ``GatherBlockQuantized``. Both want scales of the activations' type: the fp16
ones stand behind a Cast that ONNX Runtime folds when it loads the model, so the file keeps 4.5
bits per weight where fp32 scales would make it 5.
Operators of com.microsoft: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekd.errors import ExportError
from edgekd.export.blocks import (
    BITS,
    BLOCK_SIZE,
    Blocks,
    GridName,
    pack_matmul_nbits,
    pack_zero_points,
    zero_points,
)
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.onnx_graph import ROWS_KEY, FloatType, GraphBuilder
from edgekd.export.plan import Plan
from edgekd.export.round_matrix import matrix_blocks

# B blocks in a row, K columns, N rows

# Multiply in int8 where the processor can, as llama.cpp does; 1 would be fp32 throughout.
_ACCURACY_LEVEL = 4
_FLOAT_LEVEL = 1


class Matrices:
    """Puts matrices of a checkpoint into a graph, each of them once."""

    def __init__(
        self, builder: GraphBuilder, checkpoint: Checkpoint, plan: Plan, *, is_plain: bool = False
    ) -> None:
        """Add nodes to ``builder``, with weights of ``checkpoint`` stored as ``plan`` says.

        If ``is_plain``, nothing is asked of ``MatMulNBits`` that NPUs do not know: biases are
        added by a node of their own, and activations stay floats on the CPU too.
        """
        self._b = builder
        self._is_plain = is_plain
        self._checkpoint = checkpoint
        self._plan = plan
        self._rows: dict[str, dict[str, int]] = {}

    def multiply(self, hidden: str, names: Sequence[str], output: str) -> str:
        """Multiply by the matrices ``names``, one below the other, and add their biases.

        Those that are stored alike become one matrix; results of others are put side by side.
        """
        if len(names) > 1 and not self._are_alike(names):
            parts = [self.multiply(hidden, [name], f"{output}.{name}") for name in names]
            return self._b.node("Concat", parts, output, axis=-1)
        grid = self._plan.grid_of(f"{names[0]}.weight")
        if grid is None:
            return self._multiply_floats(hidden, names, output)
        return self._multiply_blocks(hidden, names, output, grid)

    def look_up(self, name: str, ids: str, output: str) -> str:
        """Return the rows ``ids`` [batch, sequence] of the matrix ``name``."""
        b = self._b
        grid = self._plan.grid_of(f"{name}.weight")
        if grid is None:
            table, stored_type = self._store_floats([name])
            return b.as_floats(b.node("Gather", [table, ids], output), stored_type)
        codes, scales, _ = self._store_blocks([name], grid)
        shape = self._checkpoint.shape(f"{name}.weight")
        by_block = np.array([shape[0], shape[1] // BLOCK_SIZE, 1], np.int64)
        shape_name = b.constant(f"{name}.scales_shape", by_block)
        blocks, *_ = b.microsoft_node(
            "GatherBlockQuantized",
            [
                codes,
                ids,
                b.node("Reshape", [scales, shape_name], f"{scales}.by_block"),
                self._points_by_block(name, shape_name, grid),
            ],
            [f"{output}.blocks"],
            bits=BITS[grid],
            block_size=BLOCK_SIZE,
            gather_axis=0,
            quantize_axis=2,
        )
        flat = b.constant("shape_flat", np.array([0, 0, -1], np.int64))
        return b.node("Reshape", [blocks, flat], output)

    def save_rows(self) -> None:
        """Note in the model which rows of which matrix are whose, for who reads it back."""
        self._b.add_metadata(ROWS_KEY, json.dumps(self._rows))

    def _are_alike(self, names: Sequence[str]) -> bool:
        types = self._plan.types
        return len({(types[f"{n}.weight"], f"{n}.bias" in types) for n in names}) == 1

    def _multiply_blocks(
        self, hidden: str, names: Sequence[str], output: str, grid: GridName
    ) -> str:
        codes, scales, points = self._store_blocks(names, grid)
        shapes = [self._checkpoint.shape(f"{name}.weight") for name in names]
        inputs = [hidden, codes, scales]
        bias = self._bias(names)
        added_apart = bias if self._is_plain else None
        if points or (bias and not added_apart):
            inputs += [points, "", "" if added_apart else bias or ""]  # no group index
        product, *_ = self._b.microsoft_node(
            "MatMulNBits",
            inputs,
            [f"{output}.product" if added_apart else output],
            K=shapes[0][1],
            N=sum(n_rows for n_rows, _ in shapes),
            bits=BITS[grid],
            block_size=BLOCK_SIZE,
            accuracy_level=_FLOAT_LEVEL if self._is_plain else _ACCURACY_LEVEL,
        )
        return self._b.node("Add", [product, added_apart], output) if added_apart else product

    def _multiply_floats(self, hidden: str, names: Sequence[str], output: str) -> str:
        """Multiply by floats; nodes that loading folds convert and transpose what is stored."""
        b = self._b
        weight, stored_type = self._store_floats(names)
        transposed = f"{weight}.transposed"
        if not b.has(transposed):
            b.node("Transpose", [b.as_floats(weight, stored_type)], transposed, perm=[1, 0])
        bias = self._bias(names)
        product = b.node("MatMul", [hidden, transposed], f"{output}.product" if bias else output)
        return b.node("Add", [product, bias], output) if bias else product

    def _store_blocks(self, names: Sequence[str], grid: GridName) -> tuple[str, str, str]:
        """Return the names of codes, of scales as the activations' type, and of zero points.

        Only Q4_1 has zero points of its own; the name is empty for the others.
        """
        b, stored = self._b, self._stored_name(names)
        codes, scales = f"{stored}.codes", f"{stored}.scales"
        points = f"{stored}.zero_points" if grid == "q4_1" else ""
        if not b.has(codes):
            parts = [self._blocks(name, grid) for name in names]
            b.weight(codes, _stack([pack_matmul_nbits(part) for part in parts]))
            b.weight(scales, _stack([part.scales_NB.numpy() for part in parts]))
            if points:
                b.weight(points, _stack([pack_zero_points(zero_points(part)) for part in parts]))
        return codes, b.as_floats(scales, np.float16), points

    def _store_floats(self, names: Sequence[str]) -> tuple[str, FloatType]:
        """Return the name of the matrix and the type that it is stored as."""
        stored, is_half = self._stored_name(names), self._plan.types[f"{names[0]}.weight"] == "f16"
        if not self._b.has(stored):
            parts = [self._checkpoint.tensor(f"{name}.weight").numpy() for name in names]
            weight_NK = _stack(parts)
            self._b.weight(stored, _to_fp16(weight_NK, stored) if is_half else weight_NK)
        return stored, np.float16 if is_half else np.float32

    def _stored_name(self, names: Sequence[str]) -> str:
        """Return what a matrix is called in the file; of several their rows are noted."""
        if len(names) == 1:
            return f"{names[0]}.weight"
        prefix = names[0].rpartition(".")[0]
        stored = f"{prefix}.{'_'.join(name.rpartition('.')[2] for name in names)}.weight"
        rows = {f"{name}.weight": self._checkpoint.shape(f"{name}.weight")[0] for name in names}
        self._rows[stored] = rows
        return stored

    def _bias(self, names: Sequence[str]) -> str | None:
        if f"{names[0]}.bias" not in self._plan.types:
            return None
        biases = [self._checkpoint.tensor(f"{name}.bias").numpy() for name in names]
        stored = self._stored_name(names).removesuffix("weight") + "bias"
        return self._b.float_weight(stored, _stack(biases))

    def _points_by_block(self, name: str, shape: str, grid: GridName) -> str:
        """Return the stored codes that mean 0, one byte a block, as a lookup wants them.

        Left out they mean the same to ONNX Runtime on a CPU, but not on every other device. Where
        all are alike they are made by a node that loading folds.
        """
        output = f"{name}.points_by_block"
        if grid == "q4_1":
            return self._b.weight(output, zero_points(self._blocks(name, grid))[..., None])
        code = 0x88 if BITS[grid] == 4 else 0x80
        value = helper.make_tensor("value", TensorProto.UINT8, [1], [code])
        return self._b.node("ConstantOfShape", [shape], output, value=value)

    def _blocks(self, name: str, grid: GridName) -> Blocks:
        return matrix_blocks(self._checkpoint, f"{name}.weight", grid, self._plan.kept)


def _stack(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _to_fp16(weight_NK: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Round to fp16.

    Raises:
        ExportError: a weight is too large for it.
    """
    half = torch.from_numpy(weight_NK).half()
    if not torch.isfinite(half).all():
        raise ExportError(f"{name} has weights beyond 65504, the largest of fp16; export as f32")
    rounded: NDArray[np.float16] = half.numpy()
    return rounded

"""Write a checkpoint as an ONNX folder for plain ONNX Runtime (profile ``cpu``).

The graph is ours, node by node: ``MatMulNBits`` with the very blocks of the GGUF file,
``GroupQueryAttention`` over one shared past/present buffer, and standard operators between.
Operators of com.microsoft: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md

Scales are stored as fp16, as in GGUF, behind a Cast that ONNX Runtime folds when it loads the
model: the file keeps 4.5 bits per weight, where fp32 scales would make it 5.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from edgekd.errors import ExportError
from edgekd.export.architectures import attention_scale
from edgekd.export.blocks import (
    BITS,
    BLOCK_SIZE,
    Blocks,
    pack_matmul_nbits,
    pack_zero_points,
    zero_points,
)
from edgekd.export.checkpoint import TOKENIZER_FILES, Checkpoint
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.plan import Plan
from edgekd.export.rope import rope_inv_freq, rotary_dim
from edgekd.export.round_matrix import matrix_blocks

# B batch, S new tokens, P past tokens, H hidden, K blocks in a row

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
_OPSET = 23  # the first with RMSNormalization
# Multiply in int8 where the processor can, as llama.cpp does; 1 would be fp32 throughout.
_ACCURACY_LEVEL = 4
_MAX_ROTARY_POSITIONS = 32_768  # 17 MB of tables at head_dim 128


def write_onnx(checkpoint: Checkpoint, plan: Plan, folder: Path) -> None:
    """Write ``checkpoint`` into the empty ``folder`` with the types of ``plan``.

    Raises:
        ExportError: the plan asks for a type that the graph does not have, or for Q4_1 of a matrix
            that has no zero points, or the config for rotary frequencies that depend on the length
            of the text.
    """
    if plan.quant not in ("f32", *BITS):
        raise ExportError(
            f"ONNX export knows f32, {', '.join(BITS)}; {plan.quant} has no kernels on the CPU"
        )
    rope_inv_freq(checkpoint.config)  # refuses before a file is opened
    builder = GraphBuilder(folder / DATA_FILE)
    try:
        _Emitter(builder, checkpoint, plan).emit()
        builder.save(folder / MODEL_FILE, "edgekd", _OPSET)
    finally:
        builder.close()
    config = {**checkpoint.config, "max_position_embeddings": _n_positions(checkpoint)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)


class _Emitter:
    """Walks the model from input ids to logits."""

    def __init__(self, builder: GraphBuilder, checkpoint: Checkpoint, plan: Plan) -> None:
        self.b = builder
        self.checkpoint = checkpoint
        self.plan = plan
        config = checkpoint.config
        self.n_heads = config["num_attention_heads"]
        self.n_kv_heads = checkpoint.n_kv_heads
        self.head_dim = checkpoint.head_dim
        self.eps = float(config["rms_norm_eps"])
        self.architecture = checkpoint.architecture

    def emit(self) -> None:
        b = self.b
        b.add_input("input_ids", TensorProto.INT64, ["batch", "sequence"])
        b.add_input("attention_mask", TensorProto.INT64, ["batch", "total"])
        b.add_input("logits_to_keep", TensorProto.INT64, [1])
        self._lengths()
        self._rotary_tables()
        hidden = self._embedding()
        for layer in range(self.checkpoint.n_layers):
            hidden = self._layer(hidden, layer)
        hidden = self._last_positions(self._norm(hidden, "model.norm"))
        self._head(hidden)
        vocab_size = self.checkpoint.config["vocab_size"]
        b.add_output("logits", TensorProto.FLOAT, ["batch", "kept", vocab_size])

    def _lengths(self) -> None:
        """Derive GroupQueryAttention's lengths from the attention mask."""
        b = self.b
        one = b.constant("one", np.array([1], np.int64))
        total = b.node("ReduceSum", ["attention_mask", one], "mask_sum", keepdims=0)
        b.node("Cast", [b.node("Sub", [total, one], "last_index")], "seqlens_k", to=6)
        shape = b.node("Shape", ["attention_mask"], "mask_shape")
        axis = b.constant("axis_1", np.array(1, np.int64))
        b.node("Cast", [b.node("Gather", [shape, axis], "mask_length")], "total_length", to=6)

    def _head(self, hidden: str) -> None:
        """Multiply by the head, and cap the logits where the model does."""
        b = self.b
        head = "model.embed_tokens" if self.checkpoint.is_tied else "lm_head"
        softcap = self.checkpoint.config.get("final_logit_softcapping")
        if softcap is None:
            self._linear(hidden, head, "logits")
            return
        plain = self._linear(hidden, head, "logits_uncapped")
        cap = b.constant("softcap", np.array(softcap, np.float32))
        bounded = b.node("Tanh", [b.node("Div", [plain, cap], "logits_scaled")], "logits_bounded")
        b.node("Mul", [bounded, cap], "logits")

    def _rotary_tables(self) -> None:
        """Store cosines and sines of every base: layers with a window may have their own."""
        for is_windowed in {False, bool(self.architecture.global_every)}:
            inv_freq = rope_inv_freq(self.checkpoint.config, is_windowed=is_windowed).numpy()
            angles = np.outer(np.arange(_n_positions(self.checkpoint)), inv_freq)
            cosines, sines = _rotary_names(is_windowed)
            self.b.weight(cosines, np.cos(angles).astype(np.float32))
            self.b.weight(sines, np.sin(angles).astype(np.float32))

    def _embedding(self) -> str:
        """Look the tokens up; Gemma multiplies by the root of the hidden size."""
        if not self.architecture.scales_embedding:
            return self._lookup()
        root = np.array(self.checkpoint.config["hidden_size"] ** 0.5, np.float32)
        scale = self.b.constant("embedding_scale", root)
        return self.b.node("Mul", [self._lookup(), scale], "embedding_scaled")

    def _lookup(self) -> str:
        b, name = self.b, "model.embed_tokens.weight"
        grid = self.plan.grid_of(name)
        if grid is None:
            table = b.weight(name, self.checkpoint.tensor(name).numpy())
            return b.node("Gather", [table, "input_ids"], "embedding")
        codes, scales, *_ = self._block_weights(name)
        picked = b.node("Gather", [codes, "input_ids"], "embedding_codes")  # [B, S, K, 16 or 32]
        if BITS[grid] == 4:
            picked = self._unpack_pairs(picked)
        codes_f32 = b.node("Cast", [picked], "embedding_codes_f32", to=TensorProto.FLOAT)
        zero_point = b.constant("zero_point", np.array(1 << (BITS[grid] - 1), np.float32))
        signed = b.node("Sub", [codes_f32, zero_point], "embedding_signed")
        picked_scales = b.node("Gather", [scales, "input_ids"], "embedding_scales")  # [B, S, K]
        last = b.constant("axis_last", np.array([-1], np.int64))
        column = b.node("Unsqueeze", [picked_scales, last], "embedding_scale_column")
        blocks = b.node("Mul", [signed, column], "embedding_blocks")
        shape = b.constant("embedding_shape", np.array([0, 0, -1], np.int64))
        return b.node("Reshape", [blocks, shape], "embedding")

    def _unpack_pairs(self, packed: str) -> str:
        """Return the two codes of every byte side by side."""
        b = self.b
        mask = b.constant("low_nibble", np.array(15, np.uint8))
        four = b.constant("four_bits", np.array(4, np.uint8))
        low = b.node("BitwiseAnd", [packed, mask], "embedding_low")
        high = b.node("BitShift", [packed, four], "embedding_high", direction="RIGHT")
        last = b.constant("axis_last", np.array([-1], np.int64))
        columns = [b.node("Unsqueeze", [half, last], f"{half}_column") for half in (low, high)]
        pairs = b.node("Concat", columns, "embedding_pairs", axis=-1)
        shape = b.constant("shape_of_blocks", np.array([0, 0, 0, BLOCK_SIZE], np.int64))
        return b.node("Reshape", [pairs, shape], "embedding_unpacked")

    def _layer(self, hidden: str, layer: int) -> str:
        b, prefix, has_post_norms = (
            self.b,
            f"model.layers.{layer}",
            self.architecture.has_post_norms,
        )
        normed = self._norm(hidden, f"{prefix}.input_layernorm")
        attended = self._attention(normed, layer)
        before_mlp = "post_attention_layernorm"
        if has_post_norms:
            attended = self._norm(attended, f"{prefix}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        hidden = b.node("Add", [hidden, attended], f"{prefix}.after_attention")
        fed = self._mlp(self._norm(hidden, f"{prefix}.{before_mlp}"), f"{prefix}.mlp")
        if has_post_norms:
            fed = self._norm(fed, f"{prefix}.post_feedforward_layernorm")
        return b.node("Add", [hidden, fed], f"{prefix}.output")

    def _attention(self, normed: str, layer: int) -> str:
        prefix = f"model.layers.{layer}.self_attn"
        queries, keys, values = self._queries_keys_values(normed, prefix)
        window = self.architecture.window(layer, self.checkpoint.config)
        cosines, sines = _rotary_names(window is not None)
        does_rotate = self.architecture.has_rope(layer)
        is_partial = does_rotate and rotary_dim(self.checkpoint.config) < self.head_dim
        if is_partial:
            queries = self._rotate(queries, self.n_heads, f"{prefix}.q_rotated", cosines, sines)
            keys = self._rotate(keys, self.n_kv_heads, f"{prefix}.k_rotated", cosines, sines)
        cache = {}
        for side in ("key", "value"):
            past, present = f"past_key_values.{layer}.{side}", f"present.{layer}.{side}"
            heads: list[str | int] = [self.n_kv_heads, "past", self.head_dim]
            self.b.add_input(past, TensorProto.FLOAT, ["batch", *heads])
            self.b.add_output(present, TensorProto.FLOAT, ["batch", *heads])
            cache[past] = present
        in_attention = does_rotate and not is_partial
        inputs = [queries, keys, values, *cache, "seqlens_k", "total_length"]
        attended, *_ = self.b.microsoft_node(
            "GroupQueryAttention",
            [*inputs, cosines, sines] if in_attention else inputs,
            [f"{prefix}.attended", *cache.values()],
            num_heads=self.n_heads,
            kv_num_heads=self.n_kv_heads,
            scale=attention_scale(self.checkpoint.config, self.head_dim),
            do_rotary=int(in_attention),
            rotary_interleaved=0,
            local_window_size=-1 if window is None else window,
        )
        return self._linear(attended, f"{prefix}.o_proj", f"{prefix}.output")

    def _queries_keys_values(self, normed: str, prefix: str) -> tuple[str, str, str]:
        """Return the three projections, normalized per head where the model does."""
        if self.architecture.has_fused_weights:
            together = self._linear(normed, f"{prefix}.qkv_proj", f"{prefix}.qkv")
            sizes = [self.n_heads * self.head_dim, *[self.n_kv_heads * self.head_dim] * 2]
            queries, keys, values = self._split(together, sizes, f"{prefix}.qkv")
            return queries, keys, values
        queries, keys, values = (
            self._linear(normed, f"{prefix}.{name}_proj", f"{prefix}.{name}") for name in "qkv"
        )
        if self.architecture.has_qk_norms:
            queries = self._head_norm(queries, f"{prefix}.q_norm")
            keys = self._head_norm(keys, f"{prefix}.k_norm")
        return queries, keys, values

    def _head_norm(self, packed: str, name: str) -> str:
        """Normalize every head of [B, S, heads * head_dim] by itself."""
        b = self.b
        by_head = b.constant("shape_by_head", np.array([0, 0, -1, self.head_dim], np.int64))
        heads = b.node("Reshape", [packed, by_head], f"{name}.heads")
        flat = b.constant("shape_flat", np.array([0, 0, -1], np.int64))
        return b.node("Reshape", [self._norm(heads, name), flat], f"{name}.flat")

    def _rotate(self, packed: str, n_heads: int, name: str, cosines: str, sines: str) -> str:
        """Rotate the first channels of every head; GroupQueryAttention would rotate all."""
        rotated, *_ = self.b.microsoft_node(
            "RotaryEmbedding",
            [packed, self._positions(), cosines, sines],
            [name],
            num_heads=n_heads,
            rotary_embedding_dim=rotary_dim(self.checkpoint.config),
            interleaved=0,
        )
        return rotated

    def _positions(self) -> str:
        """Return the place of each new token [B, S], from the attention mask."""
        b = self.b
        if not b.has("position_ids"):
            axis = b.constant("axis_one", np.array(1, np.int64))
            seen = b.node("CumSum", ["attention_mask", axis], "mask_cumsum")
            one = b.constant("one", np.array([1], np.int64))
            places = b.node("Sub", [seen, one], "all_positions")
            shape = b.node("Shape", ["input_ids"], "ids_shape")
            n_new = b.node("Gather", [shape, one], "n_new")
            start = b.node("Neg", [n_new], "first_new")
            end = b.constant("no_end", np.array([np.iinfo(np.int64).max], np.int64))
            b.node("Slice", [places, start, end, one], "position_ids")
        return "position_ids"

    def _split(self, together: str, sizes: list[int], prefix: str) -> list[str]:
        parts = [f"{prefix}.part_{index}" for index in range(len(sizes))]
        lengths = self.b.constant(f"{prefix}.sizes", np.array(sizes, np.int64))
        return self.b.split(together, lengths, parts)

    def _mlp(self, normed: str, prefix: str) -> str:
        b = self.b
        if self.architecture.has_fused_weights:
            together = self._linear(normed, f"{prefix}.gate_up_proj", f"{prefix}.gate_up")
            size = self.checkpoint.config["intermediate_size"]
            gate, up = self._split(together, [size, size], f"{prefix}.gate_up")
        else:
            gate = self._linear(normed, f"{prefix}.gate_proj", f"{prefix}.gate")
            up = self._linear(normed, f"{prefix}.up_proj", f"{prefix}.up")
        gated = b.node("Mul", [self._activate(gate, prefix), up], f"{prefix}.gated")
        return self._linear(gated, f"{prefix}.down_proj", f"{prefix}.output")

    def _activate(self, gate: str, prefix: str) -> str:
        b = self.b
        if self.architecture.activation == "gelu_tanh":
            return b.node("Gelu", [gate], f"{prefix}.gelu", approximate="tanh")
        sigmoid = b.node("Sigmoid", [gate], f"{prefix}.sigmoid")
        return b.node("Mul", [gate, sigmoid], f"{prefix}.silu")

    def _norm(self, hidden: str, name: str) -> str:
        """RMSNorm; ONNX Runtime fuses it with the residual before it."""
        offset = np.float32(self.architecture.norm_offset)
        weight = self.b.weight(f"{name}.weight", self._float(f"{name}.weight") + offset)
        return self.b.node(
            "RMSNormalization",
            [hidden, weight],
            f"{name}.output",
            axis=-1,
            epsilon=self.eps,
            stash_type=1,
        )

    def _linear(self, hidden: str, name: str, output: str) -> str:
        """Multiply by the matrix ``name``, add its bias if it has one, and call it ``output``."""
        has_bias = f"{name}.bias" in self.plan.types
        product = f"{output}.product" if has_bias else output
        if self.plan.grid_of(f"{name}.weight"):
            self._matmul_nbits(hidden, f"{name}.weight", product)
        else:
            self._matmul(hidden, f"{name}.weight", product)
        if has_bias:
            bias = self.b.weight(f"{name}.bias", self._float(f"{name}.bias"))
            self.b.node("Add", [product, bias], output)
        return output

    def _matmul_nbits(self, hidden: str, name: str, output: str) -> None:
        inputs = self._block_weights(name)
        n_rows, n_columns = self.checkpoint.shape(name)
        grid = self.plan.grid_of(name)
        assert grid is not None
        self.b.microsoft_node(
            "MatMulNBits",
            [hidden, *inputs],
            [output],
            K=n_columns,
            N=n_rows,
            bits=BITS[grid],
            block_size=BLOCK_SIZE,
            accuracy_level=_ACCURACY_LEVEL,
        )

    def _matmul(self, hidden: str, name: str, output: str) -> None:
        """Multiply in fp32; the stored matrix is transposed by a node that loading folds."""
        weight = self.b.weight(name, self._float(name))
        transposed = f"{name}.transposed"
        if not self.b.has(transposed):
            self.b.node("Transpose", [weight], transposed, perm=[1, 0])
        self.b.node("MatMul", [hidden, transposed], output)

    def _block_weights(self, name: str) -> list[str]:
        """Store the blocks of matrix ``name`` once; return what ``MatMulNBits`` takes of them.

        That is codes, fp32 scales and, of Q4_1, zero points.
        """
        codes, scales, points = f"{name}.codes", f"{name}.scales", f"{name}.zero_points"
        if not self.b.has(codes):
            blocks = self._blocks(name)
            self.b.weight(codes, pack_matmul_nbits(blocks))
            self.b.weight(scales, blocks.scales_NB.numpy())
            self.b.node("Cast", [scales], f"{scales}_f32", to=TensorProto.FLOAT)
            if blocks.grid == "q4_1":
                self.b.weight(points, pack_zero_points(zero_points(blocks)))
        inputs = [codes, f"{scales}_f32"]
        return [*inputs, points] if self.plan.grid_of(name) == "q4_1" else inputs

    def _blocks(self, name: str) -> Blocks:
        grid = self.plan.grid_of(name)
        assert grid is not None
        return matrix_blocks(self.checkpoint, name, grid, self.plan.kept)

    def _last_positions(self, hidden: str) -> str:
        """Keep the last ``logits_to_keep`` positions, so that prefill skips most of the head."""
        b = self.b
        start = b.node("Neg", ["logits_to_keep"], "first_kept")
        end = b.constant("no_end", np.array([np.iinfo(np.int64).max], np.int64))
        axis = b.constant("axis_sequence", np.array([1], np.int64))
        return b.node("Slice", [hidden, start, end, axis], "kept_hidden")

    def _float(self, name: str) -> NDArray[np.float32]:
        array: NDArray[np.float32] = self.checkpoint.tensor(name).to(torch.float32).numpy()
        return array


def _rotary_names(is_windowed: bool) -> tuple[str, str]:
    prefix = "local_" if is_windowed else ""
    return f"{prefix}cos_cache", f"{prefix}sin_cache"


def _n_positions(checkpoint: Checkpoint) -> int:
    """Return how many positions the rotary tables cover."""
    return min(int(checkpoint.config["max_position_embeddings"]), _MAX_ROTARY_POSITIONS)

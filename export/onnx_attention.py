"""Self-attention of an ONNX decoder: one ``GroupQueryAttention`` over a shared past/present buffer.

Queries, keys and values arrive side by side from one multiplication, as the operator takes them;
only models that normalize them per head take them apart before.
"""

import numpy as np
from onnx import TensorProto

from edgekd.errors import ExportError
from edgekd.export.architectures import attention_scale
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.onnx_matrices import Matrices
from edgekd.export.onnx_norms import Norms
from edgekd.export.rope import rope_inv_freq, rotary_dim

# B batch, S new tokens

_ROTARY_MULTIPLE = 16
_MAX_ROTARY_POSITIONS = 32_768  # 17 MB of tables at head_dim 128


def n_positions(checkpoint: Checkpoint) -> int:
    """Return how many positions the rotary tables cover."""
    return min(int(checkpoint.config["max_position_embeddings"]), _MAX_ROTARY_POSITIONS)


class Attention:
    """Adds the attention of each layer; lengths and rotary tables are shared by all."""

    def __init__(
        self, builder: GraphBuilder, checkpoint: Checkpoint, matrices: Matrices, norms: Norms
    ) -> None:
        """Add lengths and tables to ``builder``, which has an input ``attention_mask``."""
        self._b = builder
        self._checkpoint = checkpoint
        self._matrices = matrices
        self._norms = norms
        self._architecture = checkpoint.architecture
        self._head_dim = checkpoint.head_dim
        self._n_heads = int(checkpoint.config["num_attention_heads"])
        self._n_kv_heads = checkpoint.n_kv_heads
        self._add_lengths()
        self._add_rotary_tables()

    def add(self, normed: str, layer: int) -> str:
        """Attend from ``normed`` [B, S, hidden] to the cache and itself."""
        prefix = f"model.layers.{layer}.self_attn"
        window = self._architecture.window(layer, self._checkpoint.config)
        does_rotate = self._architecture.has_rope(layer)
        attended, *_ = self._b.microsoft_node(
            "GroupQueryAttention",
            [
                *self._queries_keys_values(normed, prefix),
                *self._past(layer),
                "seqlens_k",
                "total_length",
                *(_rotary_names(window is not None) if does_rotate else ()),
            ],
            [f"{prefix}.attended", *self._present(layer)],
            num_heads=self._n_heads,
            kv_num_heads=self._n_kv_heads,
            scale=attention_scale(self._checkpoint.config, self._head_dim),
            do_rotary=int(does_rotate),
            rotary_interleaved=0,
            local_window_size=-1 if window is None else window,
        )
        return self._matrices.multiply(attended, [f"{prefix}.o_proj"], f"{prefix}.output")

    def _queries_keys_values(self, normed: str, prefix: str) -> list[str]:
        """Return the three inputs of the operator: all in the first, or each by itself."""
        is_stored_together = self._architecture.has_fused_weights
        names = ("qkv_proj",) if is_stored_together else ("q_proj", "k_proj", "v_proj")
        together = self._matrices.multiply(
            normed, [f"{prefix}.{name}" for name in names], f"{prefix}.qkv"
        )
        if not self._architecture.has_qk_norms:
            return [together, "", ""]
        sizes = np.array([self._n_heads, self._n_kv_heads, self._n_kv_heads]) * self._head_dim
        parts = [f"{prefix}.{side}" for side in ("queries", "keys", "values")]
        lengths = self._b.constant("qkv_sizes", sizes.astype(np.int64))
        queries, keys, values = self._b.split(together, lengths, parts)
        return [
            self._head_norm(queries, f"{prefix}.q_norm"),
            self._head_norm(keys, f"{prefix}.k_norm"),
            values,
        ]

    def _head_norm(self, packed: str, name: str) -> str:
        """Normalize every head of [B, S, heads * head_dim] by itself."""
        b = self._b
        by_head = b.constant("shape_by_head", np.array([0, 0, -1, self._head_dim], np.int64))
        heads = b.node("Reshape", [packed, by_head], f"{name}.heads")
        flat = b.constant("shape_flat", np.array([0, 0, -1], np.int64))
        return b.node("Reshape", [self._norms.norm(heads, name), flat], f"{name}.flat")

    def _past(self, layer: int) -> list[str]:
        names = [f"past_key_values.{layer}.{side}" for side in ("key", "value")]
        for name in names:
            self._b.add_input(name, self._b.float_type, self._cache_shape("past"))
        return names

    def _present(self, layer: int) -> list[str]:
        names = [f"present.{layer}.{side}" for side in ("key", "value")]
        for name in names:
            self._b.add_output(name, self._b.float_type, self._cache_shape("total"))
        return names

    def _cache_shape(self, length: str) -> list[str | int]:
        return ["batch", self._n_kv_heads, length, self._head_dim]

    def _add_lengths(self) -> None:
        """Derive the operator's lengths from the attention mask."""
        b = self._b
        one = b.constant("one", np.array([1], np.int64))
        total = b.node("ReduceSum", ["attention_mask", one], "mask_sum", keepdims=0)
        last = b.node("Sub", [total, one], "last_index")
        b.node("Cast", [last], "seqlens_k", to=TensorProto.INT32)
        shape = b.node("Shape", ["attention_mask"], "mask_shape")
        axis = b.constant("axis_1", np.array(1, np.int64))
        length = b.node("Gather", [shape, axis], "mask_length")
        b.node("Cast", [length], "total_length", to=TensorProto.INT32)

    def _add_rotary_tables(self) -> None:
        """Store cosines and sines of every base: layers with a window may have their own.

        Raises:
            ExportError: the operator cannot rotate that many channels.
        """
        if (n_rotated := rotary_dim(self._checkpoint.config)) % _ROTARY_MULTIPLE:
            raise ExportError(
                f"heads rotate {n_rotated} channels, GroupQueryAttention rotates a multiple of "
                f"{_ROTARY_MULTIPLE}; use --format gguf"
            )
        for is_windowed in {False, bool(self._architecture.global_every)}:
            inv_freq = rope_inv_freq(self._checkpoint.config, is_windowed=is_windowed).numpy()
            angles = np.outer(np.arange(n_positions(self._checkpoint)), inv_freq)
            cosines, sines = _rotary_names(is_windowed)
            self._b.float_weight(cosines, np.cos(angles))
            self._b.float_weight(sines, np.sin(angles))


def _rotary_names(is_windowed: bool) -> tuple[str, str]:
    prefix = "local_" if is_windowed else ""
    return f"{prefix}cos_cache", f"{prefix}sin_cache"

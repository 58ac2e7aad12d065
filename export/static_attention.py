"""Self-attention for NPUs: fixed shapes, standard operators, no repeated keys.

Every graph sees the whole cache, ``C`` slots of which a mask hides those that hold nothing yet,
and hands out the keys and values of its own tokens; the host writes them into their slots. So one
cache serves graphs of every length, and no slot ever moves. Heads that share keys are laid side by
side as further queries, which costs no copy of the cache. Keys lie transposed, as products with
them want them.
"""

from dataclasses import dataclass

import numpy as np

from edgekd.export.architectures import attention_scale
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.onnx_matrices import Matrices
from edgekd.export.onnx_norms import Norms
from edgekd.export.rope import rotary_dim

# S new tokens, C slots of the cache, D head size


@dataclass(frozen=True)
class StaticShape:
    """The sizes that a graph is compiled for."""

    n_tokens: int
    """New tokens in each run."""
    context_tokens: int
    """Slots of the cache."""


class StaticAttention:
    """Adds the attention of each layer; mask and rotary tables are inputs shared by all."""

    def __init__(
        self,
        builder: GraphBuilder,
        checkpoint: Checkpoint,
        matrices: Matrices,
        norms: Norms,
        shape: StaticShape,
        layers: range,
    ) -> None:
        """Declare what all ``layers`` of the graph share as inputs of ``builder``."""
        self._b = builder
        self._matrices = matrices
        self._norms = norms
        self._checkpoint = checkpoint
        self._architecture = checkpoint.architecture
        self._shape = shape
        self._head_dim = checkpoint.head_dim
        self._n_heads = int(checkpoint.config["num_attention_heads"])
        self._n_kv_heads = checkpoint.n_kv_heads
        self._rotary_dim = rotary_dim(checkpoint.config)
        self._declare_shared_inputs(layers)

    def add(self, normed: str, layer: int) -> str:
        """Attend from ``normed`` [1, S, hidden] to the cache and to the tokens before each."""
        prefix = f"model.layers.{layer}.self_attn"
        queries, keys, values = self._new(normed, layer, prefix)
        b = self._b
        keys = b.node("Transpose", [keys], f"new_key_values.{layer}.key", perm=[0, 1, 3, 2])
        values = b.node("Identity", [values], f"new_key_values.{layer}.value")
        all_keys = self._with_past(keys, layer, "key", axis=3)
        all_values = self._with_past(values, layer, "value", axis=2)
        scores = b.node("MatMul", [self._grouped(queries, prefix), all_keys], f"{prefix}.scores")
        weights = self._softmax(scores, layer, prefix)
        attended = b.node("MatMul", [weights, all_values], f"{prefix}.attended")
        return self._matrices.multiply(
            self._flat(attended, prefix), [f"{prefix}.o_proj"], f"{prefix}.output"
        )

    def _new(self, normed: str, layer: int, prefix: str) -> list[str]:
        """Return queries, keys and values [1, heads, S, D] of the new tokens, rotated."""
        together = self._architecture.has_fused_weights
        names = ("qkv_proj",) if together else ("q_proj", "k_proj", "v_proj")
        packed = self._matrices.multiply(
            normed, [f"{prefix}.{name}" for name in names], f"{prefix}.qkv"
        )
        heads = [self._n_heads, self._n_kv_heads, self._n_kv_heads]
        sizes = self._b.constant("qkv_sizes", np.array(heads, np.int64) * self._head_dim)
        parts = [f"{prefix}.{side}" for side in ("queries", "keys", "values")]
        self._b.split(packed, sizes, parts)
        queries, keys, values = (
            self._by_head(part, n, f"{prefix}.{norm}_norm" if norm else None)
            for part, n, norm in zip(parts, heads, ("q", "k", None), strict=True)
        )
        return [self._rotated(queries, layer), self._rotated(keys, layer), values]

    def _by_head(self, packed: str, n_heads: int, norm: str | None) -> str:
        """Return [1, S, heads * D] as [1, heads, S, D], each head normed where the model does."""
        b = self._b
        shape = self._reshape_to([1, self._shape.n_tokens, n_heads, self._head_dim])
        apart = b.node("Reshape", [packed, shape], f"{packed}.apart")
        if norm is not None and self._architecture.has_qk_norms:
            apart = self._norms.norm(apart, norm)
        return b.node("Transpose", [apart], f"{packed}.by_head", perm=[0, 2, 1, 3])

    def _rotated(self, by_head: str, layer: int) -> str:
        if not self._architecture.has_rope(layer):
            return by_head
        return self._b.node(
            "RotaryEmbedding",
            [by_head, *(f"{self._kind(layer)}{table}" for table in ("cos", "sin"))],
            f"{by_head}.rotated",
            interleaved=0,
            rotary_embedding_dim=0 if self._rotary_dim == self._head_dim else self._rotary_dim,
        )

    def _with_past(self, new: str, layer: int, side: str, axis: int) -> str:
        """Put the cache before ``new``; both become part of the graph's interface."""
        b, n_slots, n_new = self._b, self._shape.context_tokens, self._shape.n_tokens
        past = b.add_input(
            f"past_key_values.{layer}.{side}", b.float_type, self._cache_shape(side, n_slots)
        )
        b.add_output(new, b.float_type, self._cache_shape(side, n_new))
        return b.node("Concat", [past, new], f"{past}.all", axis=axis)

    def _cache_shape(self, side: str, length: int) -> list[str | int]:
        head: list[str | int] = [1, self._n_kv_heads]
        return [*head, self._head_dim, length] if side == "key" else [*head, length, self._head_dim]

    def _grouped(self, queries: str, prefix: str) -> str:
        """Scale, and lay queries that share a key below each other [1, kv heads, G * S, D]."""
        b = self._b
        scale = attention_scale(self._checkpoint.config, self._head_dim)
        scaled = b.node(
            "Mul",
            [queries, b.constant("attention_scale", np.array(scale, b.floats))],
            f"{prefix}.scaled",
        )
        shape = self._reshape_to([1, self._n_kv_heads, -1, self._head_dim])
        return b.node("Reshape", [scaled, shape], f"{prefix}.grouped")

    def _softmax(self, scores: str, layer: int, prefix: str) -> str:
        b, n_new = self._b, self._shape.n_tokens
        n_all = self._shape.context_tokens + n_new
        by_head = self._reshape_to([1, self._n_heads, n_new, n_all])
        apart = b.node("Reshape", [scores, by_head], f"{prefix}.scores_by_head")
        masked = b.node("Add", [apart, f"{self._kind(layer)}mask"], f"{prefix}.masked")
        weights = b.node("Softmax", [masked], f"{prefix}.weights", axis=-1)
        grouped = self._reshape_to([1, self._n_kv_heads, -1, n_all])
        return b.node("Reshape", [weights, grouped], f"{prefix}.weights_grouped")

    def _flat(self, attended: str, prefix: str) -> str:
        """Return [1, kv heads, G * S, D] as [1, S, heads * D]."""
        b, n_new = self._b, self._shape.n_tokens
        by_head = self._reshape_to([1, self._n_heads, n_new, self._head_dim])
        apart = b.node("Reshape", [attended, by_head], f"{prefix}.attended_by_head")
        by_token = b.node("Transpose", [apart], f"{prefix}.by_token", perm=[0, 2, 1, 3])
        flat = self._reshape_to([1, n_new, self._n_heads * self._head_dim])
        return b.node("Reshape", [by_token, flat], f"{prefix}.flat")

    def _reshape_to(self, shape: list[int]) -> str:
        return self._b.constant(f"shape_{'_'.join(map(str, shape))}", np.array(shape, np.int64))

    def _kind(self, layer: int) -> str:
        """Return how inputs of a layer with a window begin."""
        is_windowed = self._architecture.window(layer, self._checkpoint.config) is not None
        return "local_" if is_windowed else ""

    def _declare_shared_inputs(self, layers: range) -> None:
        b, n_new = self._b, self._shape.n_tokens
        rotated = {self._kind(layer) for layer in layers if self._architecture.has_rope(layer)}
        for kind in sorted({self._kind(layer) for layer in layers}):
            n_all = self._shape.context_tokens + n_new
            b.add_input(f"{kind}mask", b.float_type, [1, 1, n_new, n_all])
            for table in ("cos", "sin") if kind in rotated else ():
                b.add_input(f"{kind}{table}", b.float_type, [1, n_new, self._rotary_dim // 2])

"""The ONNX graph of a decoder, node by node from token ids to logits."""

from typing import Protocol

import numpy as np
from onnx import TensorProto

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.onnx_attention import Attention
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.onnx_matrices import Matrices
from edgekd.export.onnx_norms import Norms
from edgekd.export.plan import Plan

# B batch, S new tokens, H hidden

_EMBEDDING = "model.embed_tokens"
_ALL = np.iinfo(np.int64).max


class LayerAttention(Protocol):
    """The self-attention of each layer, as a kind of graph has it."""

    def add(self, normed: str, layer: int) -> str:
        """Return what ``layer`` adds to the residual stream, from its normed input."""


def add_decoder(builder: GraphBuilder, checkpoint: Checkpoint, plan: Plan) -> None:
    """Add inputs, nodes, weights and outputs of ``checkpoint`` to the empty ``builder``."""
    b = builder
    b.add_input("input_ids", TensorProto.INT64, ["batch", "sequence"])
    b.add_input("attention_mask", TensorProto.INT64, ["batch", "total"])
    b.add_optional_input("logits_to_keep", np.array([_ALL], np.int64))
    matrices, norms = Matrices(b, checkpoint, plan), Norms(b, checkpoint)
    attention = Attention(b, checkpoint, matrices, norms)
    layers = Layers(b, checkpoint, matrices, norms)
    normed = layers.add(attention, add_embedding(b, checkpoint, matrices))
    layers.add_head(_last_positions(b, normed))
    b.add_output("logits", b.float_type, ["batch", "kept", checkpoint.config["vocab_size"]])
    matrices.save_rows()


def add_embedding(b: GraphBuilder, checkpoint: Checkpoint, matrices: Matrices) -> str:
    """Look ``input_ids`` up; Gemma multiplies by the root of the hidden size."""
    looked_up = matrices.look_up(_EMBEDDING, "input_ids", "embedding")
    if not checkpoint.architecture.scales_embedding:
        return looked_up
    root = np.array(checkpoint.config["hidden_size"] ** 0.5, b.floats)
    scale = b.constant("embedding_scale", root)
    return b.node("Mul", [looked_up, scale], "embedding_scaled")


def _last_positions(b: GraphBuilder, hidden: str) -> str:
    """Keep the last ``logits_to_keep`` positions, so that prefill skips most of the head."""
    start = b.node("Neg", ["logits_to_keep"], "first_kept")
    end = b.constant("no_end", np.array([_ALL], np.int64))
    axis = b.constant("axis_sequence", np.array([1], np.int64))
    return b.node("Slice", [hidden, start, end, axis], "kept_hidden")


class Layers:
    """Adds the layers of a decoder and its head, which every kind of graph has alike."""

    def __init__(
        self, builder: GraphBuilder, checkpoint: Checkpoint, matrices: Matrices, norms: Norms
    ) -> None:
        """Add nodes to ``builder``."""
        self._b = builder
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._architecture = checkpoint.architecture
        self._matrices = matrices
        self._norms = norms

    def add(self, attention: LayerAttention, embedded: str) -> str:
        """Return the normed output of the last layer."""
        residual, added = self.add_some(attention, embedded, range(self._checkpoint.n_layers))
        return self.norm_last(residual, added)

    def add_some(
        self, attention: LayerAttention, residual: str, layers: range
    ) -> tuple[str, str | None]:
        """Add ``layers``; return the residual stream and what is still to be added to it."""
        added = None
        for layer in layers:
            residual, added = self._layer(attention, residual, added, layer)
        return residual, added

    def norm_last(self, residual: str, added: str | None) -> str:
        """Return the norm before the head."""
        normed, _ = self._norms.norm_sum(residual, added, "model.norm")
        return normed

    def _layer(
        self, attention: LayerAttention, residual: str, added: str | None, layer: int
    ) -> tuple[str, str]:
        """Return the residual stream and what is still to be added to it."""
        prefix, has_post_norms = f"model.layers.{layer}", self._architecture.has_post_norms
        normed, residual = self._norms.norm_sum(residual, added, f"{prefix}.input_layernorm")
        attended = attention.add(normed, layer)
        before_mlp = "post_attention_layernorm"
        if has_post_norms:
            attended = self._norms.norm(attended, f"{prefix}.post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        normed, residual = self._norms.norm_sum(residual, attended, f"{prefix}.{before_mlp}")
        fed = self._mlp(normed, f"{prefix}.mlp")
        if has_post_norms:
            fed = self._norms.norm(fed, f"{prefix}.post_feedforward_layernorm")
        return residual, fed

    def _mlp(self, normed: str, prefix: str) -> str:
        b, multiply = self._b, self._matrices.multiply
        is_stored_together = self._architecture.has_fused_weights
        names = ("gate_up_proj",) if is_stored_together else ("gate_proj", "up_proj")
        together = multiply(normed, [f"{prefix}.{name}" for name in names], f"{prefix}.gate_up")
        sizes = b.constant("mlp_sizes", np.array([self._config["intermediate_size"]] * 2))
        gate, up = b.split(together, sizes, [f"{prefix}.gate", f"{prefix}.up"])
        gated = b.node("Mul", [self._activate(gate, prefix), up], f"{prefix}.gated")
        return multiply(gated, [f"{prefix}.down_proj"], f"{prefix}.output")

    def _activate(self, gate: str, prefix: str) -> str:
        b = self._b
        if self._architecture.activation == "gelu_tanh":
            return b.node("Gelu", [gate], f"{prefix}.gelu", approximate="tanh")
        sigmoid = b.node("Sigmoid", [gate], f"{prefix}.sigmoid")
        return b.node("Mul", [gate, sigmoid], f"{prefix}.silu")

    def add_head(self, hidden: str) -> None:
        """Multiply by the head into ``logits``, and cap them where the model does."""
        b = self._b
        head = _EMBEDDING if self._checkpoint.is_tied else "lm_head"
        softcap = self._config.get("final_logit_softcapping")
        if softcap is None:
            self._matrices.multiply(hidden, [head], "logits")
            return
        plain = self._matrices.multiply(hidden, [head], "logits_uncapped")
        cap = b.constant("softcap", np.array(softcap, b.floats))
        bounded = b.node("Tanh", [b.node("Div", [plain, cap], "logits_scaled")], "logits_bounded")
        b.node("Mul", [bounded, cap], "logits")

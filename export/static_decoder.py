"""The graphs of a decoder for NPUs: what the host prepares, and layers of fixed shapes.

An NPU's compiler takes no dynamic dimension and no lookup in blocks. So a small graph for the CPU
looks up embeddings and rotary tables, and the rest is compiled for prompts (``prefill``, a fixed
number of tokens) and for single tokens (``decode``), with the same weights. Each of the two is one
graph or several parts, which hand on the sum that the next one begins with.
"""

import numpy as np
from onnx import TensorProto

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.npu_parts import Part
from edgekd.export.onnx_decoder import Layers, add_embedding
from edgekd.export.onnx_graph import GraphBuilder
from edgekd.export.onnx_matrices import Matrices
from edgekd.export.onnx_norms import Norms, sum_name
from edgekd.export.plan import Plan
from edgekd.export.rope import rope_inv_freq
from edgekd.export.static_attention import StaticAttention, StaticShape

# S new tokens, C slots of the cache


def add_static_decoder(
    b: GraphBuilder, checkpoint: Checkpoint, plan: Plan, shape: StaticShape, part: Part
) -> None:
    """Add the layers and the head of ``part`` for exactly ``shape.n_tokens`` tokens to ``b``.

    ``b`` is empty. A part without the head has the sum before the next layer as its output.
    """
    hidden_shape: list[str | int] = [1, shape.n_tokens, int(checkpoint.config["hidden_size"])]
    begun = b.add_input(_handed_on(part.layers.start, checkpoint), b.float_type, hidden_shape)
    matrices = Matrices(b, checkpoint, plan, is_plain=True)
    norms = Norms(b, checkpoint, is_fused=False)
    attention = StaticAttention(b, checkpoint, matrices, norms, shape, part.layers)
    layers = Layers(b, checkpoint, matrices, norms)
    residual, added = layers.add_some(attention, begun, part.layers)
    if part.has_head:
        layers.add_head(layers.norm_last(residual, added))
        vocab_size = int(checkpoint.config["vocab_size"])
        b.add_output("logits", b.float_type, [1, shape.n_tokens, vocab_size])
    else:
        assert added is not None, "only the head is alone"
        total = b.node("Add", [residual, added], _handed_on(part.layers.stop, checkpoint))
        b.add_output(total, b.float_type, hidden_shape)
    matrices.save_rows()


def _handed_on(layer: int, checkpoint: Checkpoint) -> str:
    """Return what goes into ``layer``, or into the head behind the last one, is called.

    In an uncut graph it is the sum of that name.
    """
    if layer == 0:
        return "hidden"
    is_head = layer == checkpoint.n_layers
    return sum_name("model.norm" if is_head else f"model.layers.{layer}.input_layernorm")


def add_host_graph(
    b: GraphBuilder, checkpoint: Checkpoint, plan: Plan, context_tokens: int
) -> None:
    """Add what the host prepares of ``input_ids`` and ``position_ids`` [1, S] to the empty ``b``.

    Outputs are called as the inputs of the layers' graphs: hidden, cos, sin, and for layers with a
    window local_cos and local_sin.
    """
    for name in ("input_ids", "position_ids"):
        b.add_input(name, TensorProto.INT64, [1, "sequence"])
    matrices = Matrices(b, checkpoint, plan, is_plain=True)
    b.node("Identity", [add_embedding(b, checkpoint, matrices)], "hidden")
    b.add_output("hidden", b.float_type, [1, "sequence", int(checkpoint.config["hidden_size"])])
    for is_windowed in {False, bool(checkpoint.architecture.global_every)}:
        inv_freq = rope_inv_freq(checkpoint.config, is_windowed=is_windowed).numpy()
        angles = np.outer(np.arange(context_tokens), inv_freq)
        for table, values in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            name = f"local_{table}" if is_windowed else table
            rows = b.float_weight(f"{name}_table", values)
            b.node("Gather", [rows, "position_ids"], name)
            b.add_output(name, b.float_type, [1, "sequence", len(inv_freq)])
    matrices.save_rows()

"""Decoder layers compiled: what is cheap is made again for backward instead of being kept.

torch chooses by operator what is too dear for that. Attention on a CPU is not on its list, so it
would be computed twice, to save some 5 % of the activations; here it is marked as to be kept.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

_MEMORY_BUDGET = 0.9
"""Of what backward would keep if nothing were made again."""


class _KeepAttention(CustomGraphPass):
    def __call__(self, graph: torch.fx.Graph) -> None:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        for node in graph.nodes:
            if node.target is attention:
                for each in (node, *node.users):
                    each.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        """Return what tells compiled layers on disk from those of another pass."""
        return "edgekd: keep attention, 1"


def compile_layers(model: Any) -> None:
    """Compile each decoder layer of ``model``: one compilation serves all of them."""
    torch._functorch.config.activation_memory_budget = _MEMORY_BUDGET
    torch._inductor.config.joint_custom_pre_pass = _KeepAttention()
    for layer in model.get_decoder().layers:
        layer.compile()

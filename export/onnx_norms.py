"""The norms of an ONNX decoder, by themselves and together with the sum before them."""

import numpy as np

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.onnx_graph import GraphBuilder


def sum_name(norm: str) -> str:
    """Return what the sum before ``norm`` is called."""
    return f"{norm}.sum"


class Norms:
    """Adds root mean square norms with the weights of a checkpoint."""

    def __init__(
        self, builder: GraphBuilder, checkpoint: Checkpoint, *, is_fused: bool = True
    ) -> None:
        """Add nodes to ``builder``; unless ``is_fused`` they are the ONNX standard's."""
        self._b = builder
        self._is_fused = is_fused
        self._checkpoint = checkpoint
        self._epsilon = float(checkpoint.config["rms_norm_eps"])
        self._offset = np.float32(checkpoint.architecture.norm_offset)

    def norm(self, values: str, name: str) -> str:
        """Normalize the last axis of ``values`` with the weight ``name``."""
        return self._b.node(
            "RMSNormalization",
            [values, self._weight(name)],
            f"{name}.output",
            axis=-1,
            epsilon=self._epsilon,
            stash_type=1,
        )

    def norm_sum(self, residual: str, added: str | None, name: str) -> tuple[str, str]:
        """Return the norm of ``residual + added``, and that sum; fused, it is one operator."""
        if added is None:
            return self.norm(residual, name), residual
        if not self._is_fused:
            total = self._b.node("Add", [residual, added], sum_name(name))
            return self.norm(total, name), total
        normed, *_, total = self._b.microsoft_node(
            "SkipSimplifiedLayerNormalization",
            [residual, added, self._weight(name)],
            [f"{name}.output", "", "", sum_name(name)],
            epsilon=self._epsilon,
        )
        return normed, total

    def _weight(self, name: str) -> str:
        weight = self._checkpoint.tensor(f"{name}.weight").numpy()
        return self._b.float_weight(f"{name}.weight", weight + self._offset)

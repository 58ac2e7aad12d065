"""From hidden states to logits, as each model family does it, in the precision asked for."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

# C tokens of one chunk, H hidden, V common vocabulary

HeadPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class HeadShape:
    """What a model does to its logits after the matrix product: cap tanh(scale x / cap)."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the product is the logit."""
        return self.scale == 1.0 and self.softcap is None

    def shape(self, product_CV: torch.Tensor) -> torch.Tensor:
        """Return the logits [C, V]."""
        logits_CV = product_CV if self.scale == 1.0 else product_CV * self.scale
        return (
            logits_CV
            if self.softcap is None
            else self.softcap * torch.tanh(logits_CV / self.softcap)
        )

    def unshape(self, grad_CV: torch.Tensor, logits_CV: torch.Tensor) -> torch.Tensor:
        """Return the gradient with respect to the product, given that of the logits."""
        if self.softcap is not None:
            grad_CV = grad_CV * (1 - (logits_CV / self.softcap) ** 2)
        return grad_CV if self.scale == 1.0 else grad_CV * self.scale


def head_shape(config: Any) -> HeadShape:
    """Return how the model with transformers' ``config`` shapes its logits.

    Gemma 2 caps them, Cohere multiplies, Granite divides, Falcon-H1 multiplies by another name.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadShape(scale, None if softcap is None else float(softcap))


def matmul_fp32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product as float32 (float64 stays), whatever the inputs' precision.

    On CUDA bf16 inputs are summed and returned as float32. On a CPU the product of bf16 inputs is
    rounded to bf16 first: that is what ``--head-precision bf16`` costs there.
    """
    if left.dtype == torch.bfloat16 and left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    product = left @ right
    return product.float() if product.dtype == torch.bfloat16 else product


class Buffers:
    """One [C, V] buffer for the products of all chunks: fresh pages cost time."""

    def __init__(self) -> None:
        """Begin without a buffer."""
        self._buffer: torch.Tensor | None = None

    def product(self, hidden_CH: torch.Tensor, head_HV: torch.Tensor) -> torch.Tensor:
        """Return the product in the buffer, which the next call overwrites.

        It has the inputs' precision, but for bf16 on CUDA, where it is float32.
        """
        if hidden_CH.dtype == torch.bfloat16 and hidden_CH.is_cuda:
            return matmul_fp32(hidden_CH, head_HV)
        n_rows, n_columns = len(hidden_CH), head_HV.shape[1]
        if self._buffer is None or len(self._buffer) < n_rows:
            self._buffer = torch.empty(
                n_rows, n_columns, dtype=hidden_CH.dtype, device=hidden_CH.device
            )
        with torch.no_grad():
            return torch.mm(hidden_CH, head_HV, out=self._buffer[:n_rows])


def as_float(product_CV: torch.Tensor) -> torch.Tensor:
    """Return float32 of bf16; all else as it is."""
    return product_CV.float() if product_CV.dtype == torch.bfloat16 else product_CV

"""Scales of Q4_0 blocks that are trained beside the weights (LSQ: arXiv:1902.08153).

A weight is ``clamp(round(w / s), -8, 7) * s``. With rounding passed straight through, ``dL/ds`` of
a block is the sum over its weights of ``dL/dw`` times ``round(w / s) - w / s`` where ``w / s`` lies
in the range, else times the end of the range; weights out of the range get no gradient.

What is trained is an offset to the scale that plain rounding gives, in units of the matrix's
average weight: a step of the optimizer then moves a scale by the share by which it moves an average
weight, whatever the matrix, and no offset means plain rounding's scale.
"""

from collections.abc import Iterable

import torch
from torch import nn

from edgekd.export.blocks import BLOCK_SIZE, Blocks, quantize, quantize_with_scales

# N rows (outputs), K columns (inputs), B blocks in a row = K / 32

_LOWEST, _HIGHEST = -8, 7  # codes
# Of the scale at the start: it never changes its sign, nor leaves what its block can need.
_LEAST_FACTOR, _MOST_FACTOR = 1 / 8, 4.0


class LearnedScales(nn.Module):
    """The scales of the Q4_0 matrices of a student."""

    def __init__(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Begin with the scales that plain rounding gives ``weights``, each [N, K] with a name."""
        super().__init__()
        self.offsets = nn.ParameterList()
        self.starts = nn.ParameterList()
        self._index_of: dict[str, int] = {}
        self._sizes: list[float] = []
        for index, (name, weight_NK) in enumerate(weights):
            size = float(weight_NK.detach().float().square().mean().sqrt()) or 1.0
            start_NB = quantize(weight_NK, "q4_0").scales_NB.float()
            # A block of zeros has no scale to learn from.
            start_NB = torch.where(start_NB == 0, size / -_LOWEST, start_NB)
            self._index_of[name] = index
            self._sizes.append(size)
            self.starts.append(nn.Parameter(start_NB, requires_grad=False))
            self.offsets.append(nn.Parameter(torch.zeros_like(start_NB)))

    @property
    def names(self) -> list[str]:
        """The matrices."""
        return list(self._index_of)

    @torch.no_grad()
    def scales(self, name: str) -> torch.Tensor:
        """Return the scales of the matrix ``name`` as the files hold them, float16 [N, B]."""
        index = self._index_of[name]
        factor_NB = 1 + self.offsets[index] / self._sizes[index]
        scales_NB: torch.Tensor = self.starts[index] * factor_NB.clamp(_LEAST_FACTOR, _MOST_FACTOR)
        return scales_NB.half()

    @torch.no_grad()
    def blocks(self, name: str, weight_NK: torch.Tensor) -> Blocks:
        """Return ``weight_NK``, the matrix ``name``, rounded with its learned scales."""
        return quantize_with_scales(weight_NK, self.scales(name).to(weight_NK.device))

    @torch.no_grad()
    def take_gradient(self, name: str, weight: nn.Parameter) -> None:
        """Turn the gradient of the rounded matrix into those of its ``weight`` and its scales."""
        assert weight.grad is not None
        index = self._index_of[name]
        by_scale_NB, inside_NK = scale_gradient(weight, weight.grad, self.scales(name))
        self.offsets[index].grad = by_scale_NB * self.starts[index] / self._sizes[index]
        weight.grad.mul_(inside_NK)


def scale_gradient(
    weight_NK: torch.Tensor, gradient_NK: torch.Tensor, scales_NB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``dL/ds`` [N, B] of rounding ``weight_NK``, and which weights [N, K] get a gradient.

    ``gradient_NK`` is ``dL/dw`` of the rounded matrix.
    """
    shape_NBK = (len(weight_NK), -1, BLOCK_SIZE)
    scaled_NBK = weight_NK.reshape(shape_NBK) / scales_NB.to(weight_NK.dtype).unsqueeze(-1)
    inside_NBK = (scaled_NBK >= _LOWEST) & (scaled_NBK <= _HIGHEST)
    codes_NBK = scaled_NBK.round().clamp(_LOWEST, _HIGHEST)
    by_code_NBK = torch.where(inside_NBK, codes_NBK - scaled_NBK, codes_NBK)
    by_scale_NB = (gradient_NK.reshape(shape_NBK) * by_code_NBK).sum(-1)
    return by_scale_NB, inside_NBK.reshape(weight_NK.shape)

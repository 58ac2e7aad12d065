"""What a student's matrices are multiplied by, rounded to int8 as llama.cpp does while it runs.

Its matrix products take both sides in blocks: beside Q4_0 and Q8_0 weights, activations are Q8_0
(``quantize_row_q8_0`` of ggml-cpu). That is not the rounding of weights: the reciprocal is divided
from the largest magnitude itself, and halves go to even. ONNX Runtime (accuracy level 4) rounds the
same blocks and keeps their scale as float32.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import nn

from edgekd.errors import RecipeError
from edgekd.export.blocks import BLOCK_SIZE, Blocks, dequantize

# N tokens, K channels, B blocks of a token = K / 32


def quantize_activations(input_NK: torch.Tensor) -> Blocks:
    """Return ``input_NK`` [N, K] as the Q8_0 blocks that llama.cpp multiplies by.

    Equal bit for bit to ``quantize_row_q8_0`` on x86 with AVX; on ARM the reciprocal may differ in
    its last bit.
    """
    blocks_NBK = input_NK.float().reshape(len(input_NK), -1, BLOCK_SIZE)
    most_NB1 = blocks_NBK.abs().amax(-1, keepdim=True)
    # Divided tensor by tensor: torch turns a number by a tensor into a product.
    reciprocal_NB1 = torch.full_like(most_NB1, 127) / most_NB1
    reciprocal_NB1 = torch.where(most_NB1 == 0, 0.0, reciprocal_NB1)
    codes_NBK = (blocks_NBK * reciprocal_NB1).round()
    scales_NB = (most_NB1 / torch.full_like(most_NB1, 127)).squeeze(-1).half()
    return Blocks("q8_0", codes_NBK.to(torch.int8), scales_NB)


def round_activations(input_: torch.Tensor) -> torch.Tensor:
    """Return ``input_`` [..., K] as the runtimes see it; gradients pass straight through."""
    with torch.no_grad():
        rounded = dequantize(quantize_activations(input_.reshape(-1, input_.shape[-1])))
        rounded = rounded.reshape(input_.shape).to(input_.dtype)
    return rounded + (input_ - input_.detach())  # the bracket is 0, with a gradient of 1


def round_inputs(student: nn.Module, names: Container[str]) -> None:
    """Have every matrix of ``student`` whose weight is in ``names`` round what it is given.

    Raises:
        RecipeError: rows of one are no multiple of the block size.
    """
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear) or f"{name}.weight" not in names:
            continue
        if module.in_features % BLOCK_SIZE:
            raise RecipeError(
                f"{name} takes {module.in_features} channels, int8 activations a multiple of "
                f"{BLOCK_SIZE}; leave --grid-activations out"
            )
        module.register_forward_pre_hook(_round_input)


def _round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_activations(inputs[0]), *inputs[1:])

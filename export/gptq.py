"""GPTQ on the Q4_0 grid: round a matrix so that its outputs, not its weights, stay close.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323, algorithm 1: columns are rounded from left to
right, and what one rounding loses is made up for by the columns that are still to come. The scale
of a block is chosen when its turn comes, from the weights as they are by then. The result is plain
Q4_0, in both containers.
"""

import torch

from edgekd.export.blocks import BLOCK_SIZE, Blocks

# N rows (outputs), K columns (inputs), B blocks in a row, J columns of one block (32)

_DAMPING = 0.01  # of the mean diagonal, as in the paper
# Codes to which the largest weight of a block may go, before rounding. ggml's search with an
# importance matrix (make_qx_quants) has -7.1 to -8.9; +7 leaves -8 for the other side. -8 is one of
# them, so that weights which were trained on the grid stay what they are.
_LEVELS = tuple(sign * (8 + 0.15 * step) for step in range(-8, 12) for sign in (-1, 1))


def round_q4_0_by_gptq(weight_NK: torch.Tensor, gram_KK: torch.Tensor) -> Blocks:
    """Return ``weight_NK`` on Q4_0, close in ``x @ weight.T`` for the inputs behind ``gram_KK``.

    ``gram_KK`` is the sum of ``x.T @ x`` over calibration tokens; its scale does not matter.
    """
    rest_NK = weight_NK.detach().float().clone()
    factor_KK = _inverse_factor(gram_KK)
    codes, scales = [], []
    for start in range(0, rest_NK.shape[1], BLOCK_SIZE):
        end = start + BLOCK_SIZE
        factor_JJ = factor_KK[start:end, start:end]
        importance_J = factor_JJ.diagonal().square().reciprocal()
        scale_N = choose_scales(rest_NK[:, start:end], importance_J)
        codes_NJ, errors_NJ = _round_block(rest_NK[:, start:end], scale_N, factor_JJ)
        rest_NK[:, end:] -= errors_NJ @ factor_KK[start:end, end:]
        codes.append(codes_NJ)
        scales.append(scale_N)
    codes_NBJ = torch.stack(codes, 1).to(torch.int8)
    return Blocks("q4_0", codes_NBJ, torch.stack(scales, 1).half())


def choose_scales(block_NJ: torch.Tensor, importance_J: torch.Tensor) -> torch.Tensor:
    """Return the scale [N] of each row that rounds ``block_NJ`` with the least weighted error.

    Values are those of fp16 already, in float32.
    """
    index_N1 = block_NJ.abs().argmax(-1, keepdim=True)
    largest_N = block_NJ.gather(-1, index_N1).squeeze(-1)
    best_N = torch.zeros_like(largest_N)
    least_N = torch.full_like(largest_N, torch.inf)
    for level in _LEVELS:
        scale_N = (largest_N / level).half().float()
        error_NJ = _nearest(block_NJ, scale_N) * scale_N.unsqueeze(-1) - block_NJ
        error_N = error_NJ.square() @ importance_J
        best_N = torch.where(error_N < least_N, scale_N, best_N)
        least_N = torch.minimum(least_N, error_N)
    return best_N


def _inverse_factor(gram_KK: torch.Tensor) -> torch.Tensor:
    """Return the upper triangular U with U.T @ U the inverse of the damped Gram matrix."""
    damped_KK = gram_KK.double()
    diagonal_K = damped_KK.diagonal()
    mean = diagonal_K.mean()
    # A column that the text never reached stays as it is and takes no part.
    diagonal_K.add_(torch.where(diagonal_K > 0, 0.0, mean.clamp_min(1e-30)) + _DAMPING * mean)
    inverse_KK = torch.cholesky_inverse(torch.linalg.cholesky(damped_KK))
    factor_KK: torch.Tensor = torch.linalg.cholesky(inverse_KK, upper=True)
    return factor_KK.float()


def _round_block(
    block_NJ: torch.Tensor, scale_N: torch.Tensor, factor_JJ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [N, J] of a block, and what each column leaves to the columns after it [N, J].

    ``block_NJ`` is changed on the way.
    """
    codes_NJ, errors_NJ = torch.empty_like(block_NJ), torch.empty_like(block_NJ)
    for column in range(block_NJ.shape[1]):
        weight_N = block_NJ[:, column]
        code_N = _nearest(weight_N.unsqueeze(-1), scale_N).squeeze(-1)
        error_N = (weight_N - code_N * scale_N) / factor_JJ[column, column]
        block_NJ[:, column + 1 :] -= error_N.outer(factor_JJ[column, column + 1 :])
        codes_NJ[:, column], errors_NJ[:, column] = code_N, error_N
    return codes_NJ, errors_NJ


def _nearest(block_NJ: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
    scale_N1 = scale_N.unsqueeze(-1)
    return torch.where(scale_N1 == 0, 0.0, block_NJ / scale_N1).round_().clamp_(-8, 7)

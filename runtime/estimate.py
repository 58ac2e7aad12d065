"""Figures with their standard errors, by a bootstrap over blocks of neighbouring positions.

What a model finds hard comes in stretches, so positions of one text are no independent samples:
whole blocks are drawn with replacement and each figure is computed again (Carlstein, "The Use of
Subseries Values for Estimating the Variance", Annals of Statistics 14, 1986). The same draws
serve every figure.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgekd.runtime.estimated import Estimate

__all__ = ["METHOD", "N_RESAMPLES", "Blocks", "Estimate", "blocks_of_sizes", "share"]

# S positions, B blocks, R resamples, P percentiles

N_RESAMPLES = 1000
_N_PERCENTILE_RESAMPLES = 200  # each of them walks over all positions
_SEED = 0
METHOD = f"bootstrap over windows, {N_RESAMPLES} resamples"

Floats = NDArray[np.float64]


class Blocks:
    """Positions in blocks, and the resamples of them."""

    def __init__(self, block_of_S: NDArray[np.int64]) -> None:
        """Take the number of each position's block; blocks count from 0 without a gap."""
        self._block_of_S = block_of_S
        self._sizes_B = np.bincount(block_of_S).astype(np.float64)
        n_blocks = len(self._sizes_B)
        shares_B = np.full(n_blocks, 1 / n_blocks)
        self._draws_RB = np.random.default_rng(_SEED).multinomial(n_blocks, shares_B, N_RESAMPLES)

    def mean(
        self, values_S: Floats, transform: Callable[[Floats], Floats] = lambda mean: mean
    ) -> Estimate:
        """Return ``transform`` of the mean over all positions, such as exp for a perplexity."""
        sums_B = np.bincount(self._block_of_S, weights=values_S)
        means_R = (self._draws_RB @ sums_B) / (self._draws_RB @ self._sizes_B)
        value = float(transform(np.asarray(values_S.mean())))
        return Estimate(value, self._spread(transform(means_R)))

    def sizes(self) -> list[int]:
        """Return how many positions each block has."""
        return [int(size) for size in self._sizes_B]

    def block_means(self, values_S: Floats) -> list[float]:
        """Return the mean of each block; with ``of_block_means`` it stands for its positions."""
        sums_B = np.bincount(self._block_of_S, weights=values_S)
        return [float(mean) for mean in sums_B / self._sizes_B]

    def of_block_means(
        self, means_B: Sequence[float], transform: Callable[[Floats], Floats] = lambda mean: mean
    ) -> Estimate:
        """Return what ``mean`` would of positions with these block means."""
        return self.mean(np.asarray(means_B, np.float64)[self._block_of_S], transform)

    def percentiles(self, values_S: Floats, percents: Sequence[float]) -> list[Estimate]:
        """Return percentiles, between two positions by linear interpolation."""
        order_S = np.argsort(values_S)
        sorted_S, blocks_S = values_S[order_S], self._block_of_S[order_S]
        shares_P = np.array(percents) / 100
        drawn_RP = np.empty((_N_PERCENTILE_RESAMPLES, len(percents)))
        for i, draws_B in enumerate(self._draws_RB[:_N_PERCENTILE_RESAMPLES]):
            seen_S = np.cumsum(draws_B[blocks_S])
            drawn_RP[i] = sorted_S[np.searchsorted(seen_S, shares_P * seen_S[-1])]
        values_P = np.percentile(sorted_S, percents)
        return [
            Estimate(float(value), self._spread(drawn_R))
            for value, drawn_R in zip(values_P, drawn_RP.T, strict=True)
        ]

    def _spread(self, figures_R: Floats) -> float | None:
        n_blocks = len(self._sizes_B)
        if n_blocks < 2:
            return None
        # A bootstrap of n blocks finds (n - 1) / n of the variance.
        return float(figures_R.std(ddof=1)) * math.sqrt(n_blocks / (n_blocks - 1))


def blocks_of_sizes(sizes_B: Sequence[int]) -> Blocks:
    """Return blocks of so many positions each, the same draws as for the positions themselves."""
    return Blocks(np.repeat(np.arange(len(sizes_B)), sizes_B))


def share(n_right: int, n: int) -> Estimate:
    """Return the share of ``n`` independent trials that went right.

    Its standard error is the sample's deviation over the root of ``n``.
    """
    value = n_right / n
    return Estimate(value, math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None)

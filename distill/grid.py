"""Training on the grid that ships: what a step rounds, and what it moves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from edgekd.distill.learned_scales import LearnedScales
from edgekd.export.blocks import GridName, dequantize, fake_quantize


class GridCallback(TrainerCallback):  # type: ignore[misc]
    """Trains on the grid that ships: rounded weights in forward and backward, exact masters.

    The straight-through estimator in its plainest form: the gradient of the rounded weight is
    applied to the weight it was rounded from. Rounding happens once per optimizer step.
    """

    def __init__(
        self, student: Any, grids: dict[str, GridName], scales: LearnedScales | None = None
    ) -> None:
        """Round the parameters of ``student`` in ``grids``, some with learned ``scales``."""
        parameters = dict(student.named_parameters())
        self._parameters = [(name, parameters[name], grid) for name, grid in grids.items()]
        self._scales = scales
        self._learned = set(scales.names) if scales else set()
        self._masters: list[torch.Tensor] = []

    @torch.no_grad()
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Put rounded weights in place."""
        self._masters = [parameter.clone() for _, parameter, _ in self._parameters]
        for name, parameter, grid in self._parameters:
            parameter.copy_(self._rounded(name, parameter, grid))

    @torch.no_grad()
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Put the masters back, for the optimizer to move, and the scales with them."""
        self._put_masters_back()
        for name, parameter, _ in self._parameters:
            if self._scales is not None and name in self._learned:
                self._scales.take_gradient(name, parameter)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Hold rounded weights in place between two steps, to measure or to write with them."""
        self.on_step_begin()
        try:
            yield
        finally:
            self._put_masters_back()

    @torch.no_grad()
    def _put_masters_back(self) -> None:
        for (_, parameter, _), master in zip(self._parameters, self._masters, strict=True):
            parameter.copy_(master)
        self._masters = []

    def _rounded(self, name: str, parameter: torch.Tensor, grid: GridName) -> torch.Tensor:
        if self._scales is not None and name in self._learned:
            return dequantize(self._scales.blocks(name, parameter))
        return fake_quantize(parameter, grid)

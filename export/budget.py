"""Spend a size where it helps most: which matrices get 8 bits, which stay at 4.

Both types exist in both containers, so one choice serves GGUF and ONNX. What a matrix costs at 4
bits is measured: it alone is rounded plainly, and the KL to the float model's logits is taken on
calibration text. Then matrices go to 8 bits in the order of KL saved per byte, while the budget
lasts. The costs are added up as if they were independent, which they are not quite; the KL of the
whole is in the export's report.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgekd.errors import ExportError
from edgekd.export.blocks import BITS, BLOCK_SIZE, GridName, fake_quantize
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_options import Budget
from edgekd.export.plan import Plan
from edgekd.progress import Progress, Silence
from edgekd.runtime.torch_engine import load_causal_lm
from edgekd.units import format_bytes

# B chunks of text, T tokens in a chunk, V vocabulary

N_TOKENS = 512
_CHUNK_TOKENS = 256
_SCALE_BITS = 16


def plan_within(
    checkpoint: Checkpoint,
    plan: Plan,
    budget: Budget,
    overhead_bytes: int,
    costs_nats: dict[str, float],
) -> Plan:
    """Return ``plan`` with Q8_0 for the matrices whose rounding costs most, within ``budget``.

    ``overhead_bytes`` is what the file holds besides matrices, ``costs_nats`` the KL that each
    matrix adds at Q4_0.

    Raises:
        ExportError: not even Q4_0 throughout fits.
    """
    sizes = {name: math.prod(checkpoint.shape(name)) for name in costs_nats}
    limit_bytes = _limit_bytes(budget, sum(sizes.values()), overhead_bytes)
    types: dict[str, GridName] = dict.fromkeys(costs_nats, "q4_0")
    used_bytes = sum(_grid_bytes(size, "q4_0") for size in sizes.values())
    if used_bytes > limit_bytes:
        raise ExportError(
            f"q4_0 throughout takes {format_bytes(used_bytes + overhead_bytes)} with everything, "
            f"the budget leaves {format_bytes(max(limit_bytes, 0))} for matrices; raise it, or use "
            "a smaller model"
        )
    for name in sorted(costs_nats, key=lambda name: costs_nats[name] / sizes[name], reverse=True):
        added_bytes = _grid_bytes(sizes[name], "q8_0") - _grid_bytes(sizes[name], "q4_0")
        if used_bytes + added_bytes <= limit_bytes:
            types[name] = "q8_0"
            used_bytes += added_bytes
    chosen = {
        "limit_bytes": limit_bytes,
        "matrix_bytes": used_bytes,
        "bits_per_weight": 8 * used_bytes / sum(sizes.values()),
        "cost_nats": costs_nats,
    }
    return replace(plan, types={**plan.types, **types}, budget=chosen)


def measure_costs(
    checkpoint: Checkpoint, plan: Plan, ids: Sequence[int], progress: Progress | None = None
) -> dict[str, float]:
    """Return the KL in nats per token that each matrix on a grid adds when it alone is Q4_0."""
    model = load_causal_lm(checkpoint.folder, torch.float32).eval()
    parameters = dict(model.named_parameters())
    n_rows = max(1, len(ids) // _CHUNK_TOKENS)
    ids_BT = torch.tensor(ids[: n_rows * _CHUNK_TOKENS]).reshape(n_rows, -1)
    names = list(plan.grids())
    costs_nats = {}
    with (
        torch.inference_mode(),
        (progress or Silence()).track("measuring what 4 bits cost", len(names)) as advance,
    ):
        exact_BTV = _log_probabilities(model, ids_BT)
        for number, name in enumerate(names, 1):
            costs_nats[name] = _cost_nats(model, parameters[name], ids_BT, exact_BTV)
            advance(number, "matrices")
    return costs_nats


def _cost_nats(
    model: Any, weight: nn.Parameter, ids_BT: torch.Tensor, exact_BTV: torch.Tensor
) -> float:
    kept = weight.detach().clone()
    weight.copy_(fake_quantize(kept, "q4_0"))
    rounded_BTV = _log_probabilities(model, ids_BT)
    weight.copy_(kept)
    kl_BT = (exact_BTV.exp() * (exact_BTV - rounded_BTV)).sum(-1, dtype=torch.float64)
    return max(0.0, float(kl_BT.mean()))


def _log_probabilities(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(ids_BT, use_cache=False).logits
    return logits_BTV.float().log_softmax(-1)


def _limit_bytes(budget: Budget, n_weights: int, overhead_bytes: int) -> int:
    if (budget.file_bytes is None) == (budget.bits_per_weight is None):
        raise ExportError("give the budget as a file size or as bits per weight, one of the two")
    if budget.file_bytes is not None:
        return budget.file_bytes - overhead_bytes
    assert budget.bits_per_weight is not None
    return int(budget.bits_per_weight * n_weights / 8)


def _grid_bytes(n_weights: int, grid: GridName) -> int:
    return n_weights * (BITS[grid] * BLOCK_SIZE + _SCALE_BITS) // BLOCK_SIZE // 8

"""A checkpoint in torch with its matrices rounded: what every artifact is held against."""

from typing import Any

import torch

from edgekd.export.checkpoint import Checkpoint
from edgekd.export.plan import Plan
from edgekd.export.round_matrix import rounded_values
from edgekd.runtime.torch_engine import load_causal_lm

_HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def rounded_model(checkpoint: Checkpoint, plan: Plan) -> Any:
    """Return the checkpoint in torch, float32, with every matrix rounded as ``plan`` says."""
    model = load_causal_lm(checkpoint.folder, torch.float32)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, stored in {**plan.grids(), **plan.k_types()}.items():
            parameters[name].copy_(rounded_values(checkpoint, name, stored, plan.kept))
        for name, kind in plan.types.items():
            if kind in _HALVES:
                parameters[name].copy_(parameters[name].to(_HALVES[kind]))
    return model

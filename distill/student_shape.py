"""How large a student is to be: from the user's targets to what is kept of each kind.

Sizes go in steps of 32, the block of the int4 grid. A smaller model of the teacher's family, where
there is one, is usually the better student.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from edgekd.distill.importance import Importance
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint

Way = Literal["depth", "width", "both"]

_STEP = 32


@dataclass(frozen=True)
class Sizes:
    """The four numbers that decide how many parameters a Llama has."""

    layers: int
    hidden: int
    neurons: int
    groups: int
    """Key-value heads, each with its query heads."""
    heads_per_group: int


@dataclass(frozen=True)
class Kept:
    """What stays of a model; None keeps all."""

    layers: list[int]
    hidden: list[int] | None = None
    neurons: list[list[int]] | None = None
    """For each layer of the original."""
    groups: list[list[int]] | None = None


Cost = Callable[[Checkpoint, Sizes], int]


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """Return the sizes of a model."""
    config = checkpoint.config
    return Sizes(
        checkpoint.n_layers,
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        checkpoint.n_kv_heads,
        int(config["num_attention_heads"]) // checkpoint.n_kv_heads,
    )


def count_parameters(checkpoint: Checkpoint, sizes: Sizes) -> int:
    """Return how many parameters ``checkpoint`` has once it is cut to ``sizes``."""
    full = sizes_of(checkpoint)
    n_parameters = 0
    for name in checkpoint.shard_of:
        shape = checkpoint.shape(name)
        if name.startswith("model.layers."):
            # Layers are alike: count the first one for all.
            if not name.startswith("model.layers.0."):
                continue
            factor = sizes.layers
        else:
            factor = 1
        n_parameters += factor * math.prod(_cut(name, shape, full, sizes))
    return n_parameters


def sizes_within(
    checkpoint: Checkpoint, budget: int, way: Way, cost: Cost = count_parameters
) -> Sizes:
    """Return the largest sizes that cost at most ``budget``, by depth, width or both.

    Raises:
        RecipeError: nothing is left at that size.
    """
    full = sizes_of(checkpoint)
    for thousandth in range(1000, 0, -1):
        sizes = _scaled(full, thousandth / 1000, way)
        if cost(checkpoint, sizes) <= budget:
            return _filled(sizes, full, way, lambda wanted: cost(checkpoint, wanted) <= budget)
    smallest = _scaled(full, 0.001, way)
    raise RecipeError(
        f"too small a target: pruned by {way} at least {count_parameters(checkpoint, smallest)} "
        f"parameters are left, {cost(checkpoint, smallest) / max(1, budget):.1f} times what it "
        "allows; prune both ways, or trim the vocabulary"
    )


def choose(importance: Importance, sizes: Sizes) -> Kept:
    """Return the most important parts that fit ``sizes``, in their order.

    Raises:
        RecipeError: more is to be kept than there is, or nothing.
    """
    if sizes.hidden % (n_heads := sizes.groups * sizes.heads_per_group):
        raise RecipeError(
            f"{sizes.hidden} hidden channels are no multiple of {n_heads} attention heads, as "
            "transformers wants them; choose others"
        )
    layers = choose_layers(importance.layers_L, sizes.layers)
    n_neurons, n_groups = importance.neurons_LI.shape[1], importance.groups_LG.shape[1]
    return Kept(
        layers,
        _largest(importance.hidden_H, sizes.hidden, "hidden channels"),
        None
        if sizes.neurons == n_neurons
        else [_largest(row, sizes.neurons, "MLP neurons") or [] for row in importance.neurons_LI],
        None
        if sizes.groups == n_groups
        else [_largest(row, sizes.groups, "key-value heads") or [] for row in importance.groups_LG],
    )


def choose_layers(influence: Sequence[float], n_keep: int) -> list[int]:
    """Return the ``n_keep`` layers of most influence, in their order.

    Raises:
        RecipeError: that many layers cannot be kept.
    """
    if not 1 <= n_keep <= len(influence):
        raise RecipeError(f"cannot keep {n_keep} of {len(influence)} layers")
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])
    return sorted(ranked[:n_keep])


def _largest(values: torch.Tensor, n_keep: int, what: str) -> list[int] | None:
    if n_keep == len(values):
        return None
    if not 1 <= n_keep < len(values):
        raise RecipeError(f"cannot keep {n_keep} of {len(values)} {what}")
    return sorted(values.topk(n_keep).indices.tolist())


def _filled(sizes: Sizes, full: Sizes, way: Way, fits: Callable[[Sizes], bool]) -> Sizes:
    """Return ``sizes`` with layers and neurons added while they fit, the scarcer first.

    Hidden channels and heads go in coarse steps, which leave room.
    """
    while True:
        wider = replace(sizes, neurons=min(sizes.neurons + _STEP, full.neurons))
        deeper = replace(sizes, layers=min(sizes.layers + 1, full.layers))
        tried = {"depth": [deeper], "width": [wider], "both": [deeper, wider]}[way]
        if way == "both" and sizes.layers / full.layers > sizes.neurons / full.neurons:
            tried.reverse()
        grown = next((larger for larger in tried if larger != sizes and fits(larger)), None)
        if grown is None:
            return sizes
        sizes = grown


def _scaled(full: Sizes, factor: float, way: Way) -> Sizes:
    """Return ``full`` made smaller: depth and width share a common factor of the parameters."""
    depth = {"depth": factor, "width": 1.0, "both": factor**0.5}[way]
    width = {"depth": 1.0, "width": factor**0.5, "both": factor**0.25}[way]
    groups = max(1, round(full.groups * width))
    # transformers wants the hidden size to be a multiple of the heads, whatever their width.
    step = math.lcm(_STEP, groups * full.heads_per_group)
    hidden = full.hidden if width == 1 else max(step, round(full.hidden * width / step) * step)
    return replace(
        full,
        layers=max(1, round(full.layers * depth)),
        hidden=min(hidden, full.hidden),
        neurons=max(_STEP, round(full.neurons * width / _STEP) * _STEP),
        groups=groups,
    )


def _cut(name: str, shape: tuple[int, ...], full: Sizes, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of the tensor ``name`` after cutting."""
    return tuple(
        round(size * kept / whole)
        for size, (kept, whole) in zip(shape, _axes(name, len(shape), full, sizes), strict=True)
    )


def _axes(name: str, n_axes: int, full: Sizes, sizes: Sizes) -> list[tuple[int, int]]:
    """Return kept and whole size of what each axis of the tensor counts."""
    pairs = {
        "hidden": (sizes.hidden, full.hidden),
        "neurons": (sizes.neurons, full.neurons),
        "groups": (sizes.groups, full.groups),
        "": (1, 1),
    }
    return [pairs[kind] for kind in axis_kinds(name, n_axes)]


def axis_kinds(name: str, n_axes: int) -> list[str]:
    """Return what each axis of the tensor ``name`` counts: hidden, neurons, groups or nothing."""
    part = name.split(".")[-2]
    rows = {"q_proj": "groups", "k_proj": "groups", "v_proj": "groups"}
    rows |= {"qkv_proj": "groups", "gate_up_proj": "neurons"}  # Phi-3's: several in one
    rows |= {"gate_proj": "neurons", "up_proj": "neurons", "embed_tokens": "", "lm_head": ""}
    columns = {"o_proj": "groups", "down_proj": "neurons"}
    if part in ("q_norm", "k_norm"):
        return [""] * n_axes
    return [rows.get(part, "hidden"), columns.get(part, "hidden")][:n_axes]

"""``edgekd prune``: a student carved out of a teacher, in depth, in width, or in both.

Kept weights are copied as they are; nothing is trained here. What goes is chosen by
edgekd.distill.importance, how much by edgekd.distill.student_shape.
"""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgekd.distill.student_shape import Kept, axis_kinds
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import TOKENIZER_FILES, Checkpoint, read_licence
from edgekd.files import atomic_folder
from edgekd.manifest import NAME, Manifest, describe_files, write_manifest

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def write_pruned(checkpoint: Checkpoint, kept: Kept, out: Path) -> None:
    """Write the student that has only what is ``kept`` of ``checkpoint`` to ``out``.

    Raises:
        RecipeError: a layer does not exist or is named twice.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    _check_layers(kept.layers, checkpoint.n_layers)
    with atomic_folder(out) as partial:
        save_file(_kept_weights(checkpoint, kept), partial / "model.safetensors", {"format": "pt"})
        config = json.dumps(_pruned_config(checkpoint, kept), indent=2)
        (partial / "config.json").write_text(config + "\n", "utf-8")
        copy_tokenizer(checkpoint.folder, partial)
        write_prune_manifest(checkpoint, partial, {"verb": "prune", "kept": asdict(kept)})


def write_prune_manifest(source: Checkpoint, folder: Path, recipe: dict[str, Any]) -> None:
    """Write the manifest of what was cut out of ``source`` into ``folder``."""
    manifest = Manifest(
        kind="checkpoint",
        files=describe_files(path for path in folder.iterdir() if path.is_file()),
        made_from=[
            {
                "role": "teacher",
                "name": source.folder.name,
                "weights_sha256": source.weights_sha256(),
            }
        ],
        recipe=recipe,
        licence=read_licence(source.folder),
    )
    write_manifest(folder / NAME, manifest)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files of one checkpoint folder into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_layers(layers: list[int], n_layers: int) -> None:
    is_ascending = sorted(set(layers)) == layers
    if not layers or not is_ascending or layers[0] < 0 or layers[-1] >= n_layers:
        raise RecipeError(f"layers {layers} are no ascending choice of {n_layers}")


def _kept_weights(checkpoint: Checkpoint, kept: Kept) -> dict[str, torch.Tensor]:
    position = {layer: index for index, layer in enumerate(kept.layers)}
    weights = {}
    for name in checkpoint.shard_of:
        match = _LAYER.match(name)
        layer = int(match[1]) if match else None
        if layer is not None and layer not in position:
            continue
        fused = checkpoint.tensor(name)
        parts = torch.split(fused, _fused_rows(name, len(fused), checkpoint))
        tensor = torch.cat([_cut(part, name, layer, kept, checkpoint.n_kv_heads) for part in parts])
        if match and layer is not None:
            name = name.replace(match[0], f"model.layers.{position[layer]}.", 1)
        weights[name] = tensor
    return weights


def _fused_rows(name: str, n_rows: int, checkpoint: Checkpoint) -> list[int]:
    """Return the rows of each matrix that lies in the tensor ``name``: of most there is one."""
    part = name.split(".")[-2]
    if part == "qkv_proj":
        n_keys = checkpoint.n_kv_heads * checkpoint.head_dim
        return [n_rows - 2 * n_keys, n_keys, n_keys]
    return [n_rows // 2] * 2 if part == "gate_up_proj" else [n_rows]


def _cut(
    tensor: torch.Tensor, name: str, layer: int | None, kept: Kept, n_groups: int
) -> torch.Tensor:
    """Return the kept part of one weight."""
    for axis, kind in enumerate(axis_kinds(name, tensor.dim())):
        if kind == "hidden" and kept.hidden is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept.hidden))
        elif kind == "neurons" and kept.neurons is not None and layer is not None:
            tensor = tensor.index_select(axis, torch.tensor(kept.neurons[layer]))
        elif kind == "groups" and kept.groups is not None and layer is not None:
            shape = tensor.shape
            by_group = tensor.reshape(*shape[:axis], n_groups, -1, *shape[axis + 1 :])
            chosen = by_group.index_select(axis, torch.tensor(kept.groups[layer]))
            tensor = chosen.flatten(axis, axis + 1)
    return tensor.contiguous()


def _pruned_config(checkpoint: Checkpoint, kept: Kept) -> dict[str, Any]:
    config = {**checkpoint.config, "num_hidden_layers": len(kept.layers), "dtype": "float32"}
    config["head_dim"] = checkpoint.head_dim  # no longer hidden size over heads
    if types := config.get("layer_types"):
        config["layer_types"] = [types[layer] for layer in kept.layers]
    if kept.hidden is not None:
        config["hidden_size"] = len(kept.hidden)
    if kept.neurons is not None:
        config["intermediate_size"] = len(kept.neurons[0])
    if kept.groups is not None:
        per_group = config["num_attention_heads"] // checkpoint.n_kv_heads
        config["num_key_value_heads"] = len(kept.groups[0])
        config["num_attention_heads"] = per_group * len(kept.groups[0])
    return config

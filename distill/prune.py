"""``edgekd prune``: a shallower student carved out of a teacher.

Layers that change the hidden state least go first: block influence, 1 - cosine of a layer's
input and output, averaged over calibration tokens (ShortGPT, arXiv 2403.03853).
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from edgekd.distill.data import Document
from edgekd.errors import ModelError, RecipeError
from edgekd.export.checkpoint import TOKENIZER_FILES, Checkpoint, read_licence
from edgekd.files import atomic_folder
from edgekd.manifest import NAME, Manifest, describe_files, write_manifest
from edgekd.progress import Progress, Silence
from edgekd.runtime.torch_engine import load_causal_lm

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_CALIBRATION_TOKENS = 512  # per document; longer ones are cut


def block_influence(
    checkpoint: Checkpoint, documents: Sequence[Document], progress: Progress | None = None
) -> list[float]:
    """Return each layer's influence, 1 - cosine of its input and output, over ``documents``."""
    model = load_causal_lm(checkpoint.folder, torch.float32).eval()
    sums = torch.zeros(checkpoint.n_layers, dtype=torch.float64)
    n_tokens = 0
    with (progress or Silence()).track("calibration", len(documents)) as advance:
        for number, document in enumerate(documents, 1):
            ids = torch.tensor([document.ids[:_CALIBRATION_TOKENS]])
            with torch.inference_mode():
                inputs_and_outputs = _layer_states(model, ids)
            for layer, (before, after) in enumerate(inputs_and_outputs):
                sums[layer] += F.cosine_similarity(before, after, dim=-1).sum().item()
            n_tokens += ids.shape[1]
            advance(number, f"{n_tokens} tokens")
    return [float(value) for value in 1 - sums / n_tokens]


def choose_layers(influence: Sequence[float], n_keep: int) -> list[int]:
    """Return the ``n_keep`` layers of most influence, in their order.

    Raises:
        RecipeError: that many layers cannot be kept.
    """
    if not 1 <= n_keep <= len(influence):
        raise RecipeError(f"cannot keep {n_keep} of {len(influence)} layers")
    ranked = sorted(range(len(influence)), key=lambda layer: -influence[layer])
    return sorted(ranked[:n_keep])


def layers_within(checkpoint: Checkpoint, max_params: int) -> int:
    """Return how many layers fit when the student may have ``max_params`` parameters.

    Raises:
        RecipeError: not even one fits.
    """
    sizes = {name: _numel(checkpoint.shape(name)) for name in checkpoint.shard_of}
    outer = sum(size for name, size in sizes.items() if not _LAYER.match(name))
    per_layer = (sum(sizes.values()) - outer) // checkpoint.n_layers
    n_keep = min((max_params - outer) // per_layer, checkpoint.n_layers)
    if n_keep < 1:
        raise RecipeError(
            f"{max_params} parameters hold no layer: embedding and norms alone have {outer}, "
            f"a layer {per_layer}"
        )
    return n_keep


def write_pruned(checkpoint: Checkpoint, keep: Sequence[int], out: Path) -> None:
    """Write the student that has only the layers ``keep`` of ``checkpoint`` to ``out``.

    Raises:
        RecipeError: a layer does not exist or is named twice.
        OutputError: ``out`` cannot be written; it is as it was.
    """
    if (
        sorted(set(keep)) != list(keep)
        or not keep
        or keep[-1] >= checkpoint.n_layers
        or keep[0] < 0
    ):
        raise RecipeError(f"layers {list(keep)} are no ascending choice of {checkpoint.n_layers}")
    with atomic_folder(out) as partial:
        save_file(_kept_weights(checkpoint, keep), partial / "model.safetensors", {"format": "pt"})
        config = json.dumps(_pruned_config(checkpoint, keep), indent=2)
        (partial / "config.json").write_text(config + "\n", "utf-8")
        copy_tokenizer(checkpoint.folder, partial)
        manifest = Manifest(
            kind="checkpoint",
            files=describe_files(path for path in partial.iterdir() if path.is_file()),
            made_from=[
                {
                    "role": "teacher",
                    "name": checkpoint.folder.name,
                    "weights_sha256": checkpoint.weights_sha256(),
                }
            ],
            recipe={"verb": "prune", "kept_layers": list(keep)},
            licence=read_licence(checkpoint.folder),
        )
        write_manifest(partial / NAME, manifest)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer and generation files of one checkpoint folder into another."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _layer_states(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return input and output [1, T, H] of each decoder layer.

    Hooks, not ``output_hidden_states``: its last entry comes after the final norm.
    """
    states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        states.append((before, output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in _layers(model)]
    try:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _layers(model: Any) -> Any:
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder layers to prune")
    return layers


def _kept_weights(checkpoint: Checkpoint, keep: Sequence[int]) -> dict[str, torch.Tensor]:
    position = {layer: index for index, layer in enumerate(keep)}
    weights = {}
    for name in checkpoint.shard_of:
        match = _LAYER.match(name)
        if match is None:
            weights[name] = checkpoint.tensor(name)
        elif (layer := int(match[1])) in position:
            renamed = name.replace(match[0], f"model.layers.{position[layer]}.", 1)
            weights[renamed] = checkpoint.tensor(name)
    return weights


def _pruned_config(checkpoint: Checkpoint, keep: Sequence[int]) -> dict[str, Any]:
    config = {**checkpoint.config, "num_hidden_layers": len(keep), "dtype": "float32"}
    if types := config.get("layer_types"):
        config["layer_types"] = [types[layer] for layer in keep]
    return config


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product

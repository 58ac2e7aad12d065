"""What a model can do without, measured on calibration text.

* layers by block influence: 1 - cosine of input and output (ShortGPT, arXiv 2403.03853);
* hidden channels, MLP neurons and groups of attention heads by the mean size of their activations
  (Minitron, arXiv 2407.14679).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from edgekd.distill.data import Document
from edgekd.errors import ModelError
from edgekd.export.checkpoint import Checkpoint
from edgekd.progress import Progress, Silence
from edgekd.runtime.torch_engine import load_causal_lm

# L layers, H hidden, I MLP neurons, G key-value groups, T tokens

_CALIBRATION_TOKENS = 512  # per document; longer ones are cut

_Hook = Callable[[Any, Any, Any], None]


@dataclass(frozen=True)
class Importance:
    """One number for everything that could go; larger is more important."""

    layers_L: list[float]
    hidden_H: torch.Tensor
    neurons_LI: torch.Tensor
    groups_LG: torch.Tensor


def measure_importance(
    checkpoint: Checkpoint, documents: Sequence[Document], progress: Progress | None = None
) -> Importance:
    """Return the importance of every part of ``checkpoint``, over ``documents``.

    Raises:
        ModelError: its layers are not built like Llama's.
    """
    model = load_causal_lm(checkpoint.folder, torch.float32).eval()
    n_layers, n_groups = checkpoint.n_layers, checkpoint.n_kv_heads
    sums = _Sums(
        cosine_L=torch.zeros(n_layers, dtype=torch.float64),
        hidden_H=torch.zeros(checkpoint.config["hidden_size"], dtype=torch.float64),
        neurons_LI=torch.zeros(
            n_layers, checkpoint.config["intermediate_size"], dtype=torch.float64
        ),
        groups_LG=torch.zeros(n_layers, n_groups, dtype=torch.float64),
    )
    n_tokens = 0
    with (
        (progress or Silence()).track("calibration", len(documents)) as advance,
        _watching(_layers(model), sums),
        torch.inference_mode(),
    ):
        for number, document in enumerate(documents, 1):
            ids = torch.tensor([document.ids[:_CALIBRATION_TOKENS]])
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            n_tokens += ids.shape[1]
            advance(number, f"{n_tokens} tokens")
    return Importance(
        [float(value) for value in 1 - sums.cosine_L / n_tokens],
        sums.hidden_H / n_tokens,
        sums.neurons_LI / n_tokens,
        sums.groups_LG / n_tokens,
    )


@dataclass(frozen=True)
class _Sums:
    cosine_L: torch.Tensor
    hidden_H: torch.Tensor
    neurons_LI: torch.Tensor
    groups_LG: torch.Tensor


@contextmanager
def _watching(layers: Any, sums: _Sums) -> Iterator[None]:
    """Add up activations while the model runs."""
    handles = []
    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_hook(_watch_block(sums, number), with_kwargs=True),
            layer.input_layernorm.register_forward_hook(_watch_hidden(sums)),
            layer.post_attention_layernorm.register_forward_hook(_watch_hidden(sums)),
            layer.mlp.down_proj.register_forward_hook(_watch_neurons(sums, number)),
            layer.self_attn.o_proj.register_forward_hook(_watch_groups(sums, number)),
        ]
    yield
    for handle in handles:
        handle.remove()


def _watch_block(sums: _Sums, number: int) -> Any:
    # Hooks, not ``output_hidden_states``: its last entry comes after the final norm.
    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        sums.cosine_L[number] += F.cosine_similarity(before, after, dim=-1).sum().item()

    return watch


def _watch_hidden(sums: _Sums) -> _Hook:
    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        sums.hidden_H.add_(output.abs().sum((0, 1)))

    return watch


def _watch_neurons(sums: _Sums, number: int) -> _Hook:
    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        sums.neurons_LI[number] += args[0].abs().sum((0, 1))

    return watch


def _watch_groups(sums: _Sums, number: int) -> _Hook:
    def watch(module: Any, args: Any, output: torch.Tensor) -> None:
        n_groups = sums.groups_LG.shape[1]
        by_group = args[0].unflatten(-1, (n_groups, -1))
        sums.groups_LG[number] += by_group.norm(dim=-1).sum((0, 1))

    return watch


def _layers(model: Any) -> Any:
    layers = getattr(model.get_decoder(), "layers", None)
    parts = ("input_layernorm", "post_attention_layernorm", "mlp", "self_attn")
    if layers is None or not all(hasattr(layers[0], part) for part in parts):
        raise ModelError(f"{type(model).__name__} is not built of Llama's layers; cannot prune it")
    return layers

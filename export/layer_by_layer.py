"""Run a checkpoint over text one layer at a time, rounding each layer on the way.

One call of the decoder carries all tokens through all layers. A layer's weights are read when its
turn comes, and are let go before the next: memory holds one layer and the hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from edgekd.export.checkpoint import Checkpoint
from edgekd.progress import Progress, Silence

# B chunks of text, T tokens in a chunk, H hidden, K columns (inputs) of a matrix

Grams = dict[str, torch.Tensor]
"""Checkpoint tensor name to the sum of x.T @ x over all tokens [K, K]."""
RoundLayer = Callable[[dict[str, nn.Linear], Grams], None]
"""Changes the weights of a layer's matrices, by name."""
_CHUNKS_AT_ONCE = 4


def round_layer_by_layer(
    checkpoint: Checkpoint,
    ids_BT: torch.Tensor,
    embedding: torch.Tensor,
    round_layer: RoundLayer,
    progress: Progress | None = None,
) -> None:
    """Show ``round_layer`` every layer with its inputs' Gram matrices, first to last.

    Inputs are those that the layers before, as rounded, put out. ``embedding`` [V, H] is what the
    tokens are looked up in.
    """
    decoder = _empty_decoder(checkpoint, embedding)
    layers = decoder.layers
    with (
        torch.inference_mode(),
        (progress or Silence()).track("calibrating", len(layers)) as advance,
    ):
        for index, layer in enumerate(layers):
            step = partial(_step, checkpoint, index, layer, layer.forward, round_layer)
            layer.forward = step
            layer.register_forward_hook(lambda *_, done=index + 1: advance(done, "layers"))
        decoder(input_ids=ids_BT, use_cache=False)


def _step(
    checkpoint: Checkpoint,
    index: int,
    layer: nn.Module,
    run: Any,
    round_layer: RoundLayer,
    hidden_BTH: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """Load a layer, round it, and return what it then puts out; nothing new after the last."""
    prefix = f"model.layers.{index}."
    _load(checkpoint, layer, prefix)
    matrices = {
        f"{prefix}{name}.weight": module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    with _watching(matrices) as grams:
        for _ in _run_in_parts(run, hidden_BTH, options):
            pass
    round_layer(matrices, grams)
    if index + 1 < checkpoint.n_layers:
        hidden_BTH = torch.cat(list(_run_in_parts(run, hidden_BTH, options)))
    layer.to("meta")
    return hidden_BTH


def _run_in_parts(
    run: Any, hidden_BTH: torch.Tensor, options: dict[str, Any]
) -> Iterator[torch.Tensor]:
    n_chunks = len(hidden_BTH)
    for start in range(0, n_chunks, _CHUNKS_AT_ONCE):
        part = slice(start, start + _CHUNKS_AT_ONCE)
        sliced = {
            name: value[part]
            if isinstance(value, torch.Tensor) and n_chunks > 1 and len(value) == n_chunks
            else value
            for name, value in options.items()
        }
        yield run(hidden_BTH[part], **sliced)


@contextmanager
def _watching(matrices: dict[str, nn.Linear]) -> Iterator[Grams]:
    """Sum up x.T @ x of every matrix; those with one and the same input share the sum."""
    grams: Grams = {}
    latest: list[Any] = [None, None]

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0] is latest[0]:
            grams[name] = grams[latest[1]]
            return
        flat_NK = args[0].flatten(0, -2)
        if name not in grams:
            grams[name] = flat_NK.new_zeros(flat_NK.shape[1], flat_NK.shape[1])
        grams[name].addmm_(flat_NK.T, flat_NK)
        latest[:] = args[0], name

    hooks = [
        module.register_forward_pre_hook(partial(watch, name)) for name, module in matrices.items()
    ]
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()


def _empty_decoder(checkpoint: Checkpoint, embedding: torch.Tensor) -> Any:
    """Return the decoder with its layers still without memory, and no norm at its end."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    decoder = model.get_decoder().eval()
    for module in (decoder.embed_tokens, decoder.rotary_emb):
        module.to_empty(device="cpu")
        model._init_weights(module)  # tables that no checkpoint stores
    decoder.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    decoder.norm = nn.Identity()
    return decoder


def _load(checkpoint: Checkpoint, layer: nn.Module, prefix: str) -> None:
    tensors = {name: checkpoint.tensor(prefix + name) for name in layer.state_dict()}
    layer.load_state_dict(tensors, assign=True)

"""A weight that is embedding and head at once, with one gradient made in one place.

Autograd makes one for each use, both as large as the weight, of which the embedding's is zero but
for the tokens of the batch, and adds them: at 49,152 tokens a tenth of a small student's step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# B rows, T tokens, N = B T, V vocabulary, H hidden


def is_tied(model: Any) -> bool:
    """Return whether ``model`` looks tokens up in its head's weight, unchanged, and trains it."""
    embedding = model.get_input_embeddings()
    return (
        type(embedding) is nn.Embedding  # others scale or adapt what they find
        and embedding.weight is model.get_output_embeddings().weight
        and embedding.weight.requires_grad
        and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm)
    )


def embed(embedding: nn.Embedding, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings [B, T, H] of ``ids_BT``, and the weight [V, H] as the head's.

    The gradient of the head is changed in place: nobody else may hold it.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _Tied.apply(  # type: ignore[no-untyped-call]
        embedding.weight, ids_BT, embedding.padding_idx
    )
    return found


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight_VH: torch.Tensor, ids_BT: torch.Tensor, padding_id: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(ids_BT)
        ctx.padding_id = padding_id
        return F.embedding(ids_BT, weight_VH), weight_VH.view_as(weight_VH)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_BTH, grad_VH = grads
        (ids_BT,) = ctx.saved_tensors
        ids_N, grad_NH = ids_BT.flatten(), grad_BTH.flatten(0, 1)
        if ctx.padding_id is not None:  # as nn.Embedding: padding learns nothing
            grad_NH = grad_NH.masked_fill((ids_N == ctx.padding_id)[:, None], 0)
        # Not index_add_, whose sums on a GPU depend on luck.
        grad_VH.index_put_((ids_N,), grad_NH.to(grad_VH.dtype), accumulate=True)
        return grad_VH, None, None

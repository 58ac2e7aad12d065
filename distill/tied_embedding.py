"""A weight that is embedding and head at once, with one gradient made in one place.

Autograd makes one for each use, both as large as the weight, of which the embedding's is zero but
for the tokens of the batch, and adds them: at 49,152 tokens a tenth of a small student's step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# B rows, T tokens, N = B T, U distinct tokens, V vocabulary, H hidden


_NO_PADDING = -1


def is_tied(model: Any) -> bool:
    """Return whether ``model`` looks tokens up in its head's weight, unchanged, and trains it."""
    embedding = model.get_input_embeddings()
    return (
        type(embedding) is nn.Embedding  # others scale or adapt what they find
        and embedding.weight is model.get_output_embeddings().weight
        and embedding.weight.requires_grad
        and not (embedding.sparse or embedding.scale_grad_by_freq or embedding.max_norm)
    )


@contextmanager
def tied(embedding: nn.Embedding, ids_BT: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the weight [V, H] as the head's; in the block ``embedding`` is asked for ``ids_BT``.

    What else a decoder does with ids and embeddings stays its own affair. The gradient of the head
    is changed in place: nobody else may hold it.
    """
    found_BTH, head_VH = _Tied.apply(  # type: ignore[no-untyped-call]
        embedding.weight, ids_BT, embedding.padding_idx
    )
    handle = embedding.register_forward_hook(lambda *_: found_BTH)
    try:
        yield head_VH
    finally:
        handle.remove()


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
        # Threads that add to one row at the same time would leave the order of sums to luck.
        rows_U, places_N = ids_N.unique(return_inverse=True)
        sums_UH = torch.ops.aten.embedding_dense_backward(
            grad_NH, places_N, len(rows_U), _NO_PADDING, False
        )
        grad_VH[rows_U] += sums_UH.to(grad_VH.dtype)
        return grad_VH, None, None

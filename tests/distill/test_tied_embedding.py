from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from edgekd.distill.tied_embedding import embed, is_tied

N_TOKENS, HIDDEN = 20, 6


def loss_of(hidden_BTH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    return (hidden_BTH.tanh() @ head_VH.T).log_softmax(-1)[..., 3].sum()


@pytest.mark.parametrize("padding_id", [None, 2])
def test_the_gradient_is_that_of_autograd(padding_id: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(N_TOKENS, HIDDEN, padding_idx=padding_id, dtype=torch.float64)
    ids_BT = torch.tensor([[1, 2, 3, 3], [2, 1, 1, 19]])  # some twice, and the padding
    loss_of(embedding(ids_BT), embedding.weight).backward()  # type: ignore[no-untyped-call]
    wanted, embedding.weight.grad = embedding.weight.grad, None
    hidden_BTH, head_VH = embed(embedding, ids_BT)
    torch.testing.assert_close(hidden_BTH, embedding(ids_BT), rtol=0, atol=0)
    loss_of(hidden_BTH, head_VH).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(embedding.weight.grad, wanted, rtol=1e-12, atol=1e-12)


def model_of(kind: str, **settings: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    config = AutoConfig.for_model(kind, **sizes, **heads, **settings)
    return AutoModelForCausalLM.from_config(config)


def test_only_a_weight_that_is_trained_and_used_as_it_is_counts() -> None:
    tied = model_of("llama", tie_word_embeddings=True)
    assert is_tied(tied)
    tied.get_input_embeddings().weight.requires_grad_(False)
    assert not is_tied(tied)
    assert not is_tied(model_of("llama", tie_word_embeddings=False))
    assert not is_tied(model_of("gemma3_text", tie_word_embeddings=True))  # scales what it finds

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from edgekd.distill.loss_options import LossOptions
from edgekd.distill.model import DistillModel
from edgekd.distill.tied_embedding import is_tied, tied

N_TOKENS, HIDDEN = 20, 6
N_SHARED = 60  # of a head of 64 rows


def loss_of(hidden_BTH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    return (hidden_BTH.tanh() @ head_VH.T).log_softmax(-1)[..., 3].sum()


@pytest.mark.parametrize("padding_id", [None, 2])
def test_the_gradient_is_that_of_autograd(padding_id: int | None) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(N_TOKENS, HIDDEN, padding_idx=padding_id, dtype=torch.float64)
    ids_BT = torch.tensor([[1, 2, 3, 3], [2, 1, 1, 19]])  # some twice, and the padding
    loss_of(embedding(ids_BT), embedding.weight).backward()  # type: ignore[no-untyped-call]
    wanted, embedding.weight.grad = embedding.weight.grad, None
    with tied(embedding, ids_BT) as head_VH:
        hidden_BTH = embedding(ids_BT)
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


def test_the_gradient_is_the_same_each_time() -> None:
    embedding = nn.Embedding(200, 576)  # so large that torch sums in several threads
    ids_BT = torch.randint(0, 50, (2, 512), generator=torch.Generator().manual_seed(0))
    weights_BTH = torch.randn(2, 512, 576, generator=torch.Generator().manual_seed(1))

    def gradient() -> torch.Tensor:
        embedding.weight.grad = None
        with tied(embedding, ids_BT) as head_VH:
            hidden_BTH = embedding(ids_BT)
        loss = (hidden_BTH * weights_BTH).sum() + head_VH.square().sum()
        loss.backward()
        found = embedding.weight.grad
        assert isinstance(found, torch.Tensor)
        return found

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(60))


class ScalingDecoder(LlamaModel):  # type: ignore[misc]
    """Multiplies what it looks up itself, but not what it is given, as Falcon-H1 does."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **inputs: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = 3 * self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **inputs)


@pytest.mark.parametrize("decoder", [LlamaModel, ScalingDecoder])
def test_a_step_has_autograds_gradient_whatever_the_decoder_does_with_ids(decoder: Any) -> None:
    torch.manual_seed(0)
    student = model_of("llama", tie_word_embeddings=True).double()
    student.model.__class__ = decoder
    ids = torch.randint(0, N_SHARED, (2, 8))
    batch = {"input_ids": ids, "position_ids": torch.arange(8).expand(2, 8)}
    batch |= {"segment_ids": torch.ones_like(ids), "shift_labels": ids}

    hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = hidden @ student.lm_head.weight[:N_SHARED].T
    loss = 2 * nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    wanted = student.lm_head.weight.grad.clone()

    student.zero_grad()
    options = LossOptions(hard_label_weight=1.0)
    model = DistillModel(student, None, N_SHARED, options, torch.float32)
    for _ in range(2):  # as with accumulation steps
        model(**batch).loss.backward()
    torch.testing.assert_close(student.lm_head.weight.grad, wanted, rtol=1e-9, atol=1e-9)

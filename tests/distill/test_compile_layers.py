import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgekd.distill.compile_layers import compile_layers
from edgekd.distill.load_models import can_compile

N_LAYERS = 2


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.skipif(not can_compile(), reason="compiling needs a C++ compiler")
def test_attention_is_not_computed_again_for_backward() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 32))
    mask = torch.ones(32, 32, dtype=torch.bool).tril().expand(2, 1, -1, -1)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        model.get_decoder()(**inputs).last_hidden_state.square().sum().backward()
        found = model.get_input_embeddings().weight.grad
        assert isinstance(found, torch.Tensor)
        return found.clone()

    plain = gradient()
    compile_layers(model)
    assert (gradient() - plain).norm() < 1e-4 * plain.norm()  # float sums in another order
    with torch.profiler.profile() as profile:
        gradient()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == N_LAYERS
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == N_LAYERS

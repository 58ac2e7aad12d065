"""GPTQ against plain rounding, and the layer-by-layer run against the whole model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from edgekd.export.blocks import Blocks, dequantize, pack_gguf, quantize, unpack_gguf
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.gptq import choose_scales, round_q4_0_by_gptq
from edgekd.export.layer_by_layer import Grams, round_layer_by_layer
from edgekd.export.verify import blocks_equal
from edgekd.runtime.torch_engine import load_causal_lm
from tests.export.tiny_models import MODELS, save_model

_EMBEDDING = "model.embed_tokens.weight"


def output_error(weight_NK: torch.Tensor, blocks: Blocks, gram_KK: torch.Tensor) -> float:
    error_NK = dequantize(blocks) - weight_NK
    return float(((error_NK @ gram_KK) * error_NK).sum())


@pytest.fixture
def weight_NK() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(48, 128) * 0.05


@pytest.fixture
def gram_KK() -> torch.Tensor:
    """Of inputs that are correlated and of different size, as hidden states are."""
    torch.manual_seed(1)
    inputs_TK = torch.randn(512, 24) @ torch.randn(24, 128) + 0.3 * torch.randn(512, 128)
    inputs_TK *= torch.rand(128) * 4
    return inputs_TK.T @ inputs_TK


def test_outputs_stay_closer_than_by_plain_rounding(
    weight_NK: torch.Tensor, gram_KK: torch.Tensor
) -> None:
    plain = output_error(weight_NK, quantize(weight_NK, "q4_0"), gram_KK)
    calibrated = output_error(weight_NK, round_q4_0_by_gptq(weight_NK, gram_KK), gram_KK)
    assert calibrated < 0.4 * plain


def test_columns_make_up_for_each_other_across_blocks(weight_NK: torch.Tensor) -> None:
    """Column 40 has the same input as column 3: what is lost in one is given to the other."""
    inputs_TK = torch.randn(512, 128)
    inputs_TK[:, 40] = inputs_TK[:, 3]
    blocks = round_q4_0_by_gptq(weight_NK, inputs_TK.T @ inputs_TK)
    error_NK = dequantize(blocks) - weight_NK
    together_N = error_NK[:, 3] + error_NK[:, 40]
    assert together_N.square().mean() < 0.7 * error_NK[:, [3, 40]].square().sum(1).mean()


def test_blocks_survive_their_packing(weight_NK: torch.Tensor, gram_KK: torch.Tensor) -> None:
    blocks = round_q4_0_by_gptq(weight_NK, gram_KK)
    assert blocks_equal(unpack_gguf(pack_gguf(blocks), "q4_0"), blocks)


def test_columns_without_input_are_rounded_to_the_nearest(weight_NK: torch.Tensor) -> None:
    gram_KK = torch.eye(128)
    gram_KK[64:] = 0
    blocks = round_q4_0_by_gptq(weight_NK, gram_KK)
    scales_NB1 = blocks.scales_NB.float().abs().unsqueeze(-1)
    error_NBK = (dequantize(blocks) - weight_NK).reshape(48, 4, 32).abs()
    # Half a step, but for the largest weights, which may lie a little beyond the last code.
    assert (error_NBK <= 1.3 * scales_NB1).all()
    assert (error_NBK <= 0.501 * scales_NB1).float().mean() > 0.97


def test_weights_that_lie_on_the_grid_stay_there(
    weight_NK: torch.Tensor, gram_KK: torch.Tensor
) -> None:
    """A student that was trained on Q4_0 loses nothing to calibration."""
    blocks = quantize(weight_NK, "q4_0")
    assert blocks_equal(round_q4_0_by_gptq(dequantize(blocks), gram_KK), blocks)


def test_a_matrix_of_zeros_stays_zero(gram_KK: torch.Tensor) -> None:
    blocks = round_q4_0_by_gptq(torch.zeros(3, 128), gram_KK)
    assert not dequantize(blocks).any() and not blocks.scales_NB.any()


def test_the_chosen_scale_is_the_best_of_ggmls_candidates(weight_NK: torch.Tensor) -> None:
    block_NJ, importance_J = weight_NK[:, :32], torch.rand(32) + 0.1
    chosen_N = choose_scales(block_NJ, importance_J)
    plain_N1 = quantize(block_NJ, "q4_0").scales_NB.float()

    def loss(scale_N1: torch.Tensor) -> torch.Tensor:
        codes_NJ = (block_NJ / scale_N1).round().clamp(-8, 7)
        return (codes_NJ * scale_N1 - block_NJ).square() @ importance_J

    assert (loss(chosen_N.unsqueeze(-1)) <= loss(plain_N1)).all()
    assert (loss(chosen_N.unsqueeze(-1)) < loss(plain_N1)).float().mean() > 0.5
    assert chosen_N.equal(chosen_N.half().float())


def _keep(matrices: dict[str, nn.Linear], grams: Grams, seen: Grams) -> None:
    seen.update(grams)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_sees_the_inputs_of_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = save_model(name, tmp_path / "model")
    torch.manual_seed(2)
    ids_BT = torch.randint(0, 400, (6, 40))  # more chunks than run at once
    seen: Grams = {}
    round_layer_by_layer(
        checkpoint, ids_BT, checkpoint.tensor(_EMBEDDING), lambda m, g: _keep(m, g, seen)
    )
    expected = _grams_of_whole_model(load_causal_lm(checkpoint.folder, torch.float32), ids_BT)
    assert set(seen) == set(expected)
    for matrix, gram_KK in expected.items():
        torch.testing.assert_close(seen[matrix], gram_KK, rtol=1e-3, atol=1e-3)


def test_later_layers_see_what_rounded_ones_put_out(tiny: Checkpoint) -> None:
    ids_BT = torch.randint(0, 400, (2, 40))
    seen: Grams = {}

    def halve(matrices: dict[str, nn.Linear], grams: Grams) -> None:
        seen.update(grams)
        for matrix in matrices.values():
            matrix.weight.mul_(0.5)

    round_layer_by_layer(tiny, ids_BT, tiny.tensor(_EMBEDDING) * 2, halve)
    model = load_causal_lm(tiny.folder, torch.float32)
    with torch.no_grad():
        model.get_decoder().embed_tokens.weight.mul_(2)
        for module in model.model.layers[:2].modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(0.5)
    expected = _grams_of_whole_model(model, ids_BT)
    for matrix in ("self_attn.q_proj", "mlp.down_proj"):
        name = f"model.layers.2.{matrix}.weight"
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-4)


def _grams_of_whole_model(model: nn.Module, ids_BT: torch.Tensor) -> Grams:
    grams: Grams = {}

    def add(name: str, args: tuple[torch.Tensor, ...]) -> None:
        flat = args[0].flatten(0, -2)
        grams[f"{name}.weight"] = flat.T @ flat

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model.layers"):
            module.register_forward_pre_hook(lambda _, args, name=name: add(name, args))
    with torch.no_grad():
        model.eval()(input_ids=ids_BT)
    return grams

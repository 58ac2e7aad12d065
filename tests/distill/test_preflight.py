from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from edgekd.distill.preflight import (
    Machine,
    check_fits,
    named_machine,
    plan_run,
    saved_bytes_per_layer,
    this_machine,
)
from edgekd.distill.recipe import Recipe
from edgekd.errors import RecipeError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from tests.conftest import save_tiny_model

RECIPE = Recipe(rows_per_step=2, row_tokens=64, precision="fp32", compile="none")
MACHINE = Machine("test", 64e9, 1e12, 2e11)


def test_activations_are_counted_as_autograd_keeps_them(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny_model(tmp_path / "model", n_layers=6))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(
            input_ids=torch.zeros(2, 64, dtype=torch.int64), attention_mask=mask, use_cache=False
        )
        assert output is not None
        n_bytes = sum(kept.values())
    planned = 6 * saved_bytes_per_layer(checkpoint, RECIPE)
    assert planned == pytest.approx(n_bytes, rel=0.05)


def test_every_switch_saves_what_it_is_for(tiny: Checkpoint) -> None:
    def planned(**changes: object) -> dict[str, float]:
        recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
        return plan_run(recipe, tiny, tiny, 400, MACHINE).as_dict()

    full = planned()
    assert planned(gradient_checkpointing=True)["activations_bytes"] < full["activations_bytes"]
    assert planned(adapter="lora", lora_rank=2)["optimizer_bytes"] < 0.3 * full["optimizer_bytes"]
    assert planned(teacher_bits="8")["teacher_bytes"] < full["teacher_bytes"]
    assert planned(row_tokens=32)["activations_bytes"] < 0.6 * full["activations_bytes"]
    assert planned(precision="bf16")["teacher_bytes"] == full["teacher_bytes"] / 2
    assert full["weights_bytes"] == 4 * tiny.n_parameters
    assert full["optimizer_bytes"] == 8 * tiny.n_parameters
    cached = plan_run(RECIPE, tiny, None, 400, MACHINE, is_cached=True)
    assert cached.teacher_bytes == 0 and cached.tokens_per_s > full["tokens_per_s"]
    assert cached.flop_per_token == 6 * tiny.n_parameters


def test_what_cannot_fit_is_refused_with_what_would_help(tiny: Checkpoint) -> None:
    small = replace(MACHINE, memory_bytes=1e6)
    plan = plan_run(RECIPE, tiny, tiny, 400, small)
    with pytest.raises(RecipeError, match=r"needs about .*, 1.0 MB are available; .* saves about"):
        check_fits(plan, force=False)
    check_fits(plan, force=True)
    check_fits(plan_run(RECIPE, tiny, tiny, 400, MACHINE), force=False)


def test_machines_that_are_not_here_are_known_by_name() -> None:
    machine = named_machine("8xH100-80GB")
    assert (machine.n_devices, machine.memory_bytes) == (8, 80e9)
    assert named_machine("T4-16GB").n_devices == 1
    with pytest.raises(RecipeError, match="known are N x H200-141GB"):
        named_machine("2xABACUS")


def test_this_machine_has_memory_and_a_rate() -> None:
    machine = this_machine(with_speed=True)
    assert machine.memory_bytes > 1e9 and machine.fp32_flops > 1e9

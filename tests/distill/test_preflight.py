import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.distill.config_only import open_config
from edgekd.distill.data import read_documents
from edgekd.distill.distill import plan
from edgekd.distill.machines import Machine, has_native_bf16, named_machine, this_machine
from edgekd.distill.packing import pack
from edgekd.distill.preflight import Plan, check_fits, plan_run, saved_bytes_per_layer
from edgekd.distill.recipe import Job, Recipe
from edgekd.distill.sharding import gathered_bytes, traffic_of_step
from edgekd.errors import ModelError, RecipeError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.runtime.tokenizer import FileTokenizer
from tests.conftest import TEXTS, save_tiny_model

CPUINFO = Path("/proc/cpuinfo")
RECIPE = Recipe(rows_per_step=2, row_tokens=64, precision="fp32", compile="none")
MACHINE = Machine("test", 64e9, 1e12, 2e11, 1e10)


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


def test_text_that_the_student_writes_is_planned_with_the_time_it_takes(tiny: Checkpoint) -> None:
    def planned(texts_per_row: float = 1.0, **changes: object) -> Plan:
        recipe = replace(RECIPE, on_policy_tokens=16, on_policy_prompt_tokens=16, **changes)  # type: ignore[arg-type]
        return plan_run(recipe, tiny, tiny, 400, MACHINE, samples_per_row=texts_per_row)

    none, all_of_it = planned(), planned(on_policy=1.0)
    assert none.writing_s_per_step == 0 and none.run_tokens == RECIPE.steps * 128
    # Two rows of one text each, 16 of 32 tokens written: half of the rows' 128 is work.
    assert all_of_it.run_tokens == RECIPE.steps * 32
    assert all_of_it.compute_s_per_step == pytest.approx(none.compute_s_per_step / 2)
    read_s = 16 * 4 * tiny.n_parameters / MACHINE.read_bytes_per_s
    assert all_of_it.writing_s_per_step > read_s
    # Four of five steps write, since theirs are 32 of the tokens and the others' 128.
    half, full_rows = planned(on_policy=0.5), planned(on_policy=1.0, texts_per_row=9.0)
    assert half.writing_s_per_step == pytest.approx(0.8 * all_of_it.writing_s_per_step)
    assert half.run_tokens == RECIPE.steps * round(0.8 * 32 + 0.2 * 128)
    assert full_rows.run_tokens == RECIPE.steps * 64  # four texts fill both rows
    assert full_rows.writing_s_per_step == all_of_it.writing_s_per_step
    assert full_rows.tokens_per_s > all_of_it.tokens_per_s


def test_auto_is_what_the_planned_machine_has_whatever_plans_it(tiny: Checkpoint) -> None:
    autos = replace(RECIPE, precision="auto", head_precision="auto")
    low = replace(autos, precision="bf16")
    plain = replace(RECIPE, precision="fp32", head_precision="fp32")
    for machine, recipe in ((MACHINE, low), (replace(MACHINE, has_bf16=False), plain)):
        found, wanted = (plan_run(each, tiny, tiny, 400, machine) for each in (autos, recipe))
        assert found.tokens_per_s == wanted.tokens_per_s
        assert (found.teacher_bytes, found.loss_bytes) == (wanted.teacher_bytes, wanted.loss_bytes)
    assert named_machine("8xL4-24GB").has_bf16 and not named_machine("T4-16GB").has_bf16


def test_the_teachers_share_of_the_work_is_planned_and_said(tiny: Checkpoint) -> None:
    found = plan_run(RECIPE, tiny, tiny, 400, MACHINE)
    assert found.teacher_share == 2 / 8  # as large as the student, which is also trained
    assert plan_run(RECIPE, tiny, None, 400, MACHINE, is_cached=True).teacher_share == 0
    command = ["distill", "--teacher", str(tiny.folder), "--student", str(tiny.folder), "--plan"]
    command += ["--data", "unread.txt", "--gpus", "L4-24GB"]
    assert "25% of them the teacher's" in CliRunner().invoke(app, command).output


@pytest.mark.parametrize(("steps", "warns"), [(4, False), (50, True)])
def test_text_that_is_read_too_often_is_told_of(
    steps: int, warns: bool, tiny: Checkpoint, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(TEXTS))
    documents = read_documents([str(text)], FileTokenizer(tiny.folder), None)
    n_rows = len(pack(documents, 64))
    command = ["distill", "--teacher", str(tiny.folder), "--student", str(tiny.folder)]
    command += ["--data", str(text), "--row-tokens", "64", "--rows-per-step", "1", "--plan"]
    command += ["--steps", str(steps), "--gpus", "2xL4-24GB"]
    said = CliRunner().invoke(app, command).output
    assert f"{steps * 2 / n_rows:.1f} epochs" in said
    assert ("learned by heart" in said) == warns
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).output.splitlines()[-1])[
        "epochs"
    ] == pytest.approx(steps * 2 / n_rows)


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
    nodes = named_machine("2x8xH100-80GB")
    assert (nodes.n_nodes, nodes.n_devices, nodes.node_bytes_per_s) == (2, 16, 400e9)
    assert named_machine("2x8xH100-80GB", network_gbit=100).node_bytes_per_s == 12.5e9
    with pytest.raises(RecipeError, match="carries nothing"):
        named_machine("2x8xH100-80GB", network_gbit=0)
    for text in ("0xT4-16GB", "2x3x4xT4-16GB", "xT4-16GB", ""):
        with pytest.raises(RecipeError, match="unknown machine"):
            named_machine(text)
    with pytest.raises(RecipeError, match="known are N x H200-141GB"):
        named_machine("2xABACUS")


def test_this_machine_has_memory_and_a_rate() -> None:
    machine = this_machine(with_speed=True)
    assert machine.memory_bytes > 1e9 and machine.fp32_flops > 1e9


def test_gpus_share_a_student_and_each_gathers_a_part_of_it(tiny: Checkpoint) -> None:
    def planned(**changes: object) -> dict[str, float]:
        machine = replace(MACHINE, is_gpu=True, link_bytes_per_s=1e9, **changes)  # type: ignore[arg-type]
        return plan_run(RECIPE, tiny, tiny, 400, machine).as_dict()

    one, four = planned(), planned(n_devices=4)
    n_bytes = 4 * tiny.n_parameters
    assert one["gathered_bytes"] == one["network_s_per_step"] == 0
    saved = one["peak_bytes"] - four["peak_bytes"]
    at_rest = 3 * n_bytes * 3 / 4  # weights and two moments, three quarters of them elsewhere
    assert saved == pytest.approx(1.05 * (at_rest - four["gathered_bytes"]), rel=1e-6)
    assert four["network_gpu_bytes_per_step"] == 3 * n_bytes * 3 / 4
    assert four["run_tokens"] == 4 * one["run_tokens"]
    assert one["tokens_per_s"] < four["tokens_per_s"] < 4 * one["tokens_per_s"]
    step_s = four["compute_s_per_step"] + four["network_s_per_step"]
    assert four["run_s"] == pytest.approx(RECIPE.steps * step_s)
    assert four["gpu_hours"] == pytest.approx(4 * four["run_s"] / 3600)


def test_what_is_gathered_is_two_layers_and_what_lies_outside(tiny: Checkpoint) -> None:
    layer = sum(
        torch.Size(tiny.shape(name)).numel()
        for name in tiny.shard_of
        if name.startswith("model.layers.0.")
    )
    outside = tiny.n_parameters - tiny.n_layers * layer
    assert gathered_bytes(tiny, 4, with_gradients=False) == 4 * (outside + 2 * layer)
    assert gathered_bytes(tiny, 4, with_gradients=True) == 8 * (outside + 2 * layer)


def test_the_slower_of_links_and_network_decides() -> None:
    machine = named_machine("2x8xH100-80GB", network_gbit=8)
    traffic = traffic_of_step(machine, weights_bytes=32e9, gradients_bytes=32e9, n_passes=2)
    moved = 2 * 2 * 32e9 + 32e9
    assert (traffic.gpu_bytes, traffic.node_bytes) == (moved * 15 / 16, moved / 2)
    assert traffic.seconds == moved / 2 / 1e9
    fast = replace(machine, node_bytes_per_s=1e15)
    assert traffic_of_step(fast, 32e9, 32e9, 2).seconds == moved * 15 / 16 / 450e9


def test_a_config_alone_is_planned_as_the_model_it_describes(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((tiny.folder / "config.json").read_text())
    shapes = open_config(tmp_path)
    assert {name: shapes.shape(name) for name in shapes.shard_of} == {
        name: tiny.shape(name) for name in tiny.shard_of
    }
    job = Job(teacher=str(tiny.folder), student=str(tmp_path), data=[], recipe=RECIPE)
    n_tokens = tiny.config["vocab_size"]
    expected = plan_run(RECIPE, tiny, tiny, n_tokens, named_machine("4xL4-24GB"))
    assert plan(job, gpus="4xL4-24GB") == expected


def test_several_nodes_are_planned_and_priced_on_the_command_line(tiny: Checkpoint) -> None:
    command = ["distill", "--teacher", str(tiny.folder), "--student", str(tiny.folder)]
    command += ["--data", "unread.txt", "--plan", "--gpus", "2x4xL4-24GB", "--precision", "bf16"]
    command += ["--network-gbit", "10", "--gpu-hour-price", "3"]
    said = CliRunner().invoke(app, command)
    assert said.exit_code == 0, said.output
    assert "8 GPUs share" in said.output and "they cost" in said.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).output.splitlines()[-1])
    assert found["n_gpus"] == 8 and found["cost"] == pytest.approx(3 * found["gpu_hours"])
    moved = 3 * 4 * tiny.n_parameters
    assert found["network_node_bytes_per_step"] == moved / 2
    assert found["network_s_per_step"] == pytest.approx(moved / 2 / 1.25e9)


def test_a_config_of_no_known_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ModelError, match="no model can be built from"):
        open_config(tmp_path)


def test_recording_runs_the_teacher_alone(tiny: Checkpoint) -> None:
    machine = replace(MACHINE, n_devices=3)
    found = plan_run(RECIPE, tiny, tiny, 400, machine).capture_tokens_per_s
    assert found == pytest.approx(3 * 0.5 * 2e11 / (2 * tiny.n_parameters))
    assert plan_run(RECIPE, tiny, None, 400, machine).capture_tokens_per_s is None


@pytest.mark.skipif(
    torch.cuda.is_available() or not CPUINFO.is_file() or "flags" not in CPUINFO.read_text("utf-8"),
    reason="needs an x86 processor to train on",
)
def test_bf16_that_is_only_imitated_is_not_chosen() -> None:
    assert has_native_bf16() == ("avx512_bf16" in CPUINFO.read_text("utf-8"))

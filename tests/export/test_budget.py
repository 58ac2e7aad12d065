"""A size is kept to, is spent where it helps most, and gives one choice for both containers."""

import dataclasses
from pathlib import Path

import pytest
import torch
import typer

from edgekd.cli_options import parse_bytes
from edgekd.errors import ExportError
from edgekd.export.blocks import fake_quantize
from edgekd.export.budget import measure_costs, plan_within
from edgekd.export.checkpoint import Checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.export_options import Budget, CalibrationOptions
from edgekd.export.plan import make_plan
from edgekd.export.read_back import read_gguf_blocks, read_onnx_blocks
from edgekd.export.verify import blocks_equal, verify_as_recorded
from edgekd.manifest import manifest_path, read_manifest
from edgekd.runtime.fidelity import compare_engines
from edgekd.runtime.tokenizer import FileTokenizer
from edgekd.runtime.torch_engine import TorchEngine, load_causal_lm
from tests.conftest import TEXTS

_UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def costs(tiny: Checkpoint) -> dict[str, float]:
    ids = list(range(3, 200))
    return measure_costs(tiny, make_plan(tiny, "q4_0"), ids)


def within(checkpoint: Checkpoint, bits: float, costs: dict[str, float]) -> dict[str, str]:
    plan = make_plan(checkpoint, "q4_0")
    chosen = plan_within(checkpoint, plan, Budget(bits_per_weight=bits), 0, costs)
    assert chosen.budget is not None and chosen.budget["bits_per_weight"] <= bits
    return {name: chosen.types[name] for name in costs}


def test_the_cost_of_a_matrix_is_the_kl_of_rounding_it_alone(
    tiny: Checkpoint, costs: dict[str, float]
) -> None:
    exact = TorchEngine(load_causal_lm(tiny.folder, torch.float32), 256)
    model = load_causal_lm(tiny.folder, torch.float32)
    with torch.no_grad():
        weight = model.get_parameter(_UP_PROJ)
        weight.copy_(fake_quantize(weight, "q4_0"))
    found = compare_engines(exact, TorchEngine(model, 256), [list(range(3, 200))])
    assert costs[_UP_PROJ] == pytest.approx(found.kl_nats, rel=1e-3)
    assert len(costs) == 3 * 7 + 1


def test_the_ends_are_one_type_throughout(tiny: Checkpoint, costs: dict[str, float]) -> None:
    assert set(within(tiny, 4.5, costs).values()) == {"q4_0"}
    assert set(within(tiny, 8.5, costs).values()) == {"q8_0"}
    with pytest.raises(ExportError, match="q4_0 throughout takes"):
        within(tiny, 4.49, costs)


def test_what_costs_most_per_weight_gets_the_bits(
    tiny: Checkpoint, costs: dict[str, float]
) -> None:
    raised = dict.fromkeys(costs, 0.001)
    raised[_UP_PROJ] = 1.0
    types = within(tiny, 5.0, raised)
    assert types[_UP_PROJ] == "q8_0"
    # A small matrix goes before a larger one of the same cost.
    k_proj, q_proj = (f"model.layers.0.self_attn.{side}_proj.weight" for side in "kq")
    assert (types[k_proj], types[q_proj]) == ("q8_0", "q4_0")


@pytest.mark.parametrize("bits", [4.7, 5.5, 7.0])
def test_the_budget_is_used_up_to_one_matrix(
    bits: float, tiny: Checkpoint, costs: dict[str, float]
) -> None:
    types = within(tiny, bits, costs)
    sizes = {name: tiny.tensor(name).numel() for name in types}
    used_bits = sum(sizes[name] * (4.5 if types[name] == "q4_0" else 8.5) for name in types)
    smallest = min((sizes[name] for name in types if types[name] == "q4_0"), default=0)
    assert bits * sum(sizes.values()) - used_bits < 4 * smallest


def test_a_file_keeps_to_its_size_and_onnx_to_its_blocks(tiny: Checkpoint, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS * 6), "utf-8")
    options = CalibrationOptions(text=text, n_tokens=256)
    gguf, onnx, model = tmp_path / "m.gguf", tmp_path / "onnx", str(tiny.folder)
    smallest = export_model(model, "gguf", gguf, head="q4_0")["bytes"]
    budget = Budget(file_bytes=smallest + 25_000)
    export_model(model, "gguf", gguf, calibration=options, budget=budget)
    assert smallest + 15_000 < gguf.stat().st_size <= smallest + 25_000
    export_model(model, "onnx", onnx, calibration=options, budget=budget)
    in_gguf, in_onnx = dict(read_gguf_blocks(gguf, tiny)), dict(read_onnx_blocks(onnx))
    assert {blocks.grid for blocks in in_gguf.values()} == {"q4_0", "q8_0"}
    assert all(blocks_equal(in_gguf[name], in_onnx[name]) for name in in_gguf)
    ids = FileTokenizer(tiny.folder).encode(text.read_text("utf-8"))[:512]
    expected = measure_costs(tiny, make_plan(tiny, "q4_0"), ids)
    for path in (gguf, onnx):
        recipe = read_manifest(manifest_path(path))["recipe"]
        assert recipe["budget"]["cost_nats"] == pytest.approx(expected, rel=1e-3)
        assert verify_as_recorded(path, tiny.folder, recipe)["equal_matrices"] == len(in_gguf)


def test_a_budget_without_data_or_of_two_kinds_is_refused(
    tiny: Checkpoint, costs: dict[str, float], tmp_path: Path
) -> None:
    budget, model = Budget(bits_per_weight=5.0), str(tiny.folder)
    with pytest.raises(ExportError, match="on calibration text"):
        export_model(model, "gguf", tmp_path / "m.gguf", budget=budget)
    both = dataclasses.replace(budget, file_bytes=10**6)
    with pytest.raises(ExportError, match="one of the two"):
        plan_within(tiny, make_plan(tiny, "q4_0"), both, 0, costs)


def test_sizes_are_read_with_decimal_units() -> None:
    assert [parse_bytes(text) for text in ("80MB", "1.5 GB", "12k", "7")] == [
        80_000_000,
        1_500_000_000,
        12_000,
        7,
    ]
    with pytest.raises(typer.BadParameter, match="no size such as"):
        parse_bytes("80 Mb/s")

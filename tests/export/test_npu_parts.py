"""Models that are cut into parts for NPUs: how they are cut, and that no answer changes by it."""

import json
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from typer.testing import CliRunner

from edgekd.cli import app
from edgekd.errors import ExportError, ModelError
from edgekd.export.checkpoint import Checkpoint, open_checkpoint
from edgekd.export.export_model import export_model
from edgekd.export.npu_parts import cut_evenly, cut_into_parts, piece_bytes
from edgekd.export.npu_quantize import Range, activations, quantize_graph
from edgekd.export.package_android import package_android
from edgekd.export.plan import Quant, make_plan
from edgekd.export.to_npu import PLACEMENT_FILE, NpuOptions, check_binaries
from edgekd.export.verify import check_blocks, verify_as_recorded
from edgekd.manifest import read_manifest
from edgekd.runtime.loading import open_model
from edgekd.runtime.model_facts import read_facts
from edgekd.runtime.model_kind import ModelKind
from edgekd.runtime.npu_engine import NpuEngine
from edgekd.runtime.static_model import Compiled, read_static
from tests.conftest import TEXTS, save_tiny_model
from tests.export.npu_shapes import CONTEXT, PREFILL, PROMPT, needs_qnn, write_uncompiled
from tests.export.tiny_models import save_model

LIMIT_BYTES = 350_000
"""The tiny model's layers and head count as 150 to 160 kB each: two of them fit."""
PARTS = ["prefill_1", "prefill_2", "decode_1", "decode_2"]
FP32: dict[str, Any] = {
    "activations_text": Path("unread")
}  # graphs to be rounded calculate in fp32 until they are


def _logits(folder: Path, provider: str = "cpu") -> NDArray[np.float32]:
    """Return the logits after each token: a prompt of two pieces, then tokens one by one."""
    engine = NpuEngine(folder, CONTEXT, 1, provider, require_npu=provider == "qnn")
    found = [engine.forward(PROMPT, every_logit=True)]
    found += [engine.forward([token])[None] for token in (7, 9, 11)]
    engine.close()
    return np.concatenate(found)


def _export(model: Path, out: Path, max_binary_bytes: int, text: Path | None = None) -> Path:
    options = NpuOptions(
        soc="sm8750",
        context_tokens=CONTEXT,
        prefill_tokens=PREFILL,
        activations_text=text,
        max_binary_bytes=max_binary_bytes,
    )
    export_model(str(model), "onnx", out, target="qnn", npu=options)
    return out


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(40, 90))
def test_pieces_are_cut_into_the_fewest_runs_and_as_evenly_as_can_be(
    sizes: list[int], limit: int
) -> None:
    runs = cut_evenly(sizes, limit)
    assert [piece for run in runs for piece in run] == list(range(len(sizes)))
    best = min(
        (len(sums), sum(filled**2 for filled in sums))
        for n_cuts in range(len(sizes))
        for cuts in combinations(range(1, len(sizes)), n_cuts)
        if max(sums := [sum(sizes[a:b]) for a, b in pairwise([0, *cuts, len(sizes)])]) <= limit
    )
    filled = [sum(sizes[piece] for piece in run) for run in runs]
    assert max(filled) <= limit and (len(runs), sum(each**2 for each in filled)) == best


@pytest.mark.parametrize(
    ("limit_bytes", "layers"),
    [
        (10**9, [[0, 1, 2]]),
        (460_000, [[0, 1], [2]]),
        (LIMIT_BYTES, [[0, 1], [2]]),
        (300_000, [[0], [1], [2], []]),  # not even one layer has room for the head
    ],
)
def test_the_head_goes_with_the_last_layer_where_both_fit(
    limit_bytes: int, layers: list[list[int]], tiny: Checkpoint
) -> None:
    parts = cut_into_parts(tiny, make_plan(tiny, "q4_0"), limit_bytes)
    assert [list(part.layers) for part in parts] == layers
    assert [part.has_head for part in parts] == [False] * (len(parts) - 1) + [True]
    sizes = piece_bytes(tiny, make_plan(tiny, "q4_0"))
    assert sum(part.expected_bytes for part in parts) == sum(sizes)


def test_the_head_is_not_left_alone_where_that_would_be_more_even(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny_model(tmp_path, n_layers=2))
    parts = cut_into_parts(checkpoint, make_plan(checkpoint, "q4_0"), LIMIT_BYTES)
    assert [list(part.layers) for part in parts] == [[0], [1]]


def test_what_does_not_fit_alone_is_refused_with_sizes(tiny: Checkpoint) -> None:
    plan = make_plan(tiny, "q4_0")
    with pytest.raises(ExportError, match=r"layer 0 alone takes up to 150.0 kB .*allows 100.0 kB"):
        cut_into_parts(tiny, plan, 100_000)
    with pytest.raises(ExportError, match=r"the head alone takes up to .*--head q4_0"):
        cut_into_parts(tiny, plan, piece_bytes(tiny, plan)[0])


@pytest.mark.parametrize(
    ("name", "quant"),
    [("llama linear rope", "q8_0"), ("qwen3", "f16"), ("gemma3", "q4_0"), ("phi4", "q4_0")],
)
def test_what_a_part_is_expected_to_take_covers_all_it_stores(
    name: str, quant: Quant, tmp_path: Path
) -> None:
    checkpoint = save_model(name, tmp_path / "model")
    limit_bytes = max(piece_bytes(checkpoint, make_plan(checkpoint, quant)))
    folder = write_uncompiled(checkpoint, tmp_path / "npu", quant, max_binary_bytes=limit_bytes)
    parts = cut_into_parts(checkpoint, make_plan(checkpoint, quant), limit_bytes)
    assert len(parts) == checkpoint.n_layers + 1
    for part, file in zip(parts, read_static(folder).parts("decode"), strict=True):
        graph = onnx.load(str(folder / f"{file}.onnx"), load_external_data=False).graph
        entries = [e for tensor in graph.initializer for e in tensor.external_data]
        stored = sum(int(entry.value) for entry in entries if entry.key == "length")
        assert part.expected_bytes == pytest.approx(1.05 * stored + 128_000, abs=1)


@pytest.mark.parametrize("name", ["llama3 rope", "gemma3 softcap", "smollm3", "phi3"])
def test_a_cut_model_gives_the_same_logits_bit_for_bit(name: str, tmp_path: Path) -> None:
    """In fp32: in fp16 a CPU rounds only where a graph ends, so the cut itself would be seen."""
    checkpoint = save_model(name, tmp_path / "model")
    limit_bytes = max(piece_bytes(checkpoint, make_plan(checkpoint, "q4_0")))
    whole = write_uncompiled(checkpoint, tmp_path / "whole", **FP32)
    cut = write_uncompiled(checkpoint, tmp_path / "cut", max_binary_bytes=limit_bytes, **FP32)
    assert read_static(cut).n_parts == checkpoint.n_layers + 1  # kinds of layers lie apart
    assert np.array_equal(_logits(cut), _logits(whole))


def test_in_fp16_a_cut_rounds_what_is_handed_on_and_no_more(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    whole = write_uncompiled(tiny, tmp_path / "whole")
    cut = write_uncompiled(tiny, tmp_path / "cut", max_binary_bytes=LIMIT_BYTES)
    assert check_blocks(cut, tiny, make_plan(tiny, "q4_0")) > 0
    np.testing.assert_allclose(_logits(cut), _logits(whole), atol=0.02)


def test_every_part_takes_only_what_it_uses(tmp_path: Path) -> None:
    checkpoint = save_model("smollm3", tmp_path / "model")  # every fourth layer has no rope
    limit_bytes = max(piece_bytes(checkpoint, make_plan(checkpoint, "q4_0")))
    folder = write_uncompiled(checkpoint, tmp_path / "npu", max_binary_bytes=limit_bytes)
    for part in read_static(folder).all_parts():
        graph = onnx.load(str(folder / f"{part}.onnx"), load_external_data=False).graph
        read = {name for node in graph.node for name in node.input}
        assert {entry.name for entry in graph.input} <= read


def test_a_whole_model_is_described_as_before_and_a_cut_one_apart(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    whole = write_uncompiled(tiny, tmp_path / "whole")
    assert json.loads((whole / "npu.json").read_text()) == {
        "schema_version": 1,
        "context_tokens": CONTEXT,
        "prefill_tokens": PREFILL,
        "windows": {"": None},
        "activations": "fp16",
        "hidden": -30_000.0,
        "compiled": None,
    }
    assert read_static(whole).all_parts() == ["prefill", "decode"]
    cut = write_uncompiled(tiny, tmp_path / "cut", max_binary_bytes=LIMIT_BYTES)
    content = json.loads((cut / "npu.json").read_text())
    assert content["schema_version"] == 2 and read_static(cut).all_parts() == PARTS
    with pytest.raises(ModelError, match="--prefill 16 --max-binary SIZE --out OUT"):
        NpuEngine(cut, CONTEXT, 1, "qnn")
    (cut / "npu.json").write_text(json.dumps(content | {"schema_version": 1}))
    with pytest.raises(ModelError, match="another schema version"):
        read_static(cut)


def test_sizes_of_a_cut_model_are_those_of_the_whole(tiny: Checkpoint, tmp_path: Path) -> None:
    whole = write_uncompiled(tiny, tmp_path / "whole" / "npu")
    cut = write_uncompiled(tiny, tmp_path / "cut" / "npu", max_binary_bytes=LIMIT_BYTES)
    assert read_facts(ModelKind.ONNX, cut) == read_facts(ModelKind.ONNX, whole)
    (cut / "decode_2.onnx").unlink()
    assert "no decode_2.onnx" in (read_facts(ModelKind.ONNX, cut).n_parameters.reason or "")


def test_a_binary_beyond_the_limit_is_refused() -> None:
    compiled = Compiled(
        soc="sm8650", soc_model=57, htp_arch=75, sdk="v2", graphs={}, binaries={"a": 5, "b": 7}
    )
    check_binaries(compiled, 7)
    with pytest.raises(ExportError, match=r"b is 7 B, and --max-binary allows 6 B"):
        check_binaries(compiled, 6)


def test_the_command_takes_a_size_and_says_what_came_of_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    command = ["export", str(tiny_folder), "--format", "onnx", "--target", "qnn", "--no-emulate"]
    command += ["--ctx", "64", "--prefill", "16", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*command, "--max-binary", "100kB"])
    assert isinstance(refused.exception, ExportError) and not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*command, "--max-binary", "350kB"])
    assert done.exit_code == 0 and ", in 2 parts" in done.stdout
    described = read_manifest(tmp_path / "out/edgekd.json")["verification"]["npu"]["parts"]
    assert [part["layers"] for part in described] == [[0, 1], [2]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(TEXTS * 8), "utf-8")
    return path


@pytest.mark.parametrize("provider", ["cpu", pytest.param("qnn", marks=needs_qnn)])
def test_with_16_bit_activations_a_cut_model_gives_the_same_logits_bit_for_bit(
    provider: str, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    whole = _export(tiny_folder, tmp_path / "whole", 10**9, text)
    cut = _export(tiny_folder, tmp_path / "cut", LIMIT_BYTES, text)
    assert read_static(cut).n_parts == 2
    assert np.array_equal(_logits(cut, provider), _logits(whole, provider))
    reports = [read_manifest(folder / "edgekd.json")["verification"] for folder in (whole, cut)]
    left = [report["npu"]["activations"]["values_in_fp16"] for report in reports]
    assert left == [dict.fromkeys(["prefill", "decode"], 0), dict.fromkeys(PARTS, 0)]


def test_values_that_stay_floats_are_counted_in_their_own_part(
    tiny: Checkpoint, tmp_path: Path
) -> None:
    folder = write_uncompiled(tiny, tmp_path / "npu", max_binary_bytes=LIMIT_BYTES, **FP32)
    files = [folder / f"{part}.onnx" for part in read_static(folder).parts("decode")]
    loaded = [onnx.load(str(file), load_external_data=False) for file in files]
    names = {name for model in loaded for name in activations(model)}
    ranges = dict.fromkeys(names, Range(-1.0, 1.0, 0.1))
    ranges["model.norm.sum"] = Range(-874.0, 22_828.0, 3.1)
    assert [quantize_graph(file, ranges, -30.0) for file in files] == [0, 1]


@pytest.fixture(scope="module")
def on_npu(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model cut in two, whose export ran it in the emulator."""
    return _export(tiny_folder, tmp_path_factory.mktemp("npu") / "cut", LIMIT_BYTES)


@needs_qnn
def test_binaries_of_a_cut_model_keep_to_the_limit(on_npu: Path, tiny_folder: Path) -> None:
    manifest = read_manifest(on_npu / "edgekd.json")
    report = manifest["verification"]
    binaries = report["npu"]["compiled"]["binaries"]
    assert binaries.keys() == {f"{part}_ctx_qnn.bin" for part in PARTS}
    expected = [part["expected_bytes"] for part in report["npu"]["parts"]] * 2
    for part, expected_bytes in zip(PARTS, expected, strict=True):
        assert binaries[f"{part}_ctx_qnn.bin"] <= expected_bytes <= LIMIT_BYTES
    assert report["on_npu"]["label"] == "verified-in-emulator"
    again = verify_as_recorded(on_npu, tiny_folder, manifest["recipe"])
    assert again["on_npu"]["label"] == "verified-in-emulator"


@needs_qnn
def test_every_node_of_every_part_is_on_the_npu(on_npu: Path) -> None:
    placed = json.loads((on_npu / PLACEMENT_FILE).read_text())["graphs"]
    assert [*placed] == PARTS
    for nodes in placed.values():
        assert Counter(node["provider"] for node in nodes) == {"QNNExecutionProvider": len(nodes)}
    matrices = {part: sum(n["op"] == "MatMulNBits" for n in placed[part]) for part in PARTS}
    assert matrices == {"prefill_1": 8, "prefill_2": 5, "decode_1": 8, "decode_2": 5}
    engine = NpuEngine(on_npu, CONTEXT, 1, "qnn", require_npu=True)
    assert engine.provider_use.nodes == {part: {"QNNExecutionProvider": 1} for part in PARTS}
    engine.close()


@needs_qnn
def test_the_emulator_gives_the_same_logits_bit_for_bit(
    on_npu: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    whole = _export(tiny_folder, tmp_path / "whole", 10**9)
    cut_TV, cpu_TV = _logits(on_npu, "qnn"), _logits(on_npu)
    assert np.array_equal(cut_TV, _logits(whole, "qnn"))
    np.testing.assert_allclose(cut_TV, cpu_TV, atol=0.1)
    assert cut_TV[-1].argmax() == cpu_TV[-1].argmax()


@needs_qnn
def test_a_package_holds_every_part_and_its_script_runs_each(on_npu: Path, tmp_path: Path) -> None:
    package_android(on_npu, tmp_path / "package")
    opened = open_model(tmp_path / "package", context_tokens=CONTEXT, provider="qnn")
    assert opened.engine.forward(PROMPT).shape == (opened.engine.vocab_size,)
    script = (tmp_path / "package/run-adb.sh").read_text()
    assert "for part in decode_1_ctx.onnx decode_2_ctx.onnx; do" in script

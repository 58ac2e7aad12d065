"""What the fault matrix and the fuzzers found, each as small as it can be shown."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import AttributeProto, TensorProto, helper

from edgekd.distill.trainer import dropping_incomplete_checkpoints
from edgekd.errors import EngineError, ModelError, VerificationError
from edgekd.files import atomic_file, atomic_folder
from edgekd.manifest import check_files, read_manifest
from edgekd.no_memory import is_out_of_memory
from edgekd.runtime.batch_engine import EngineOptions
from edgekd.runtime.engine_process import EngineProcess
from edgekd.runtime.engine_worker import WorkerSettings
from edgekd.runtime.onnx_header import read_onnx_header
from edgekd.runtime.torch_engine import load_causal_lm
from edgekd.untrusted import is_plain_name, parse_json
from tests.conftest import save_tiny_model


def test_what_a_killed_run_left_goes_with_the_next_one(tmp_path: Path) -> None:
    left = tmp_path / ".result.abcd_123"
    left.mkdir()
    (left / "result").write_text("half")
    with atomic_file(tmp_path / "result") as partial:
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_what_a_living_run_writes_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "result") as first:
        (first / "mine").write_text("first")
        with atomic_folder(tmp_path / "result") as second:
            (second / "mine").write_text("second")
        assert (first / "mine").read_text() == "first"
    assert (tmp_path / "result" / "mine").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("name", [".result.abcd_123", ".result.checkpoints"])
def test_a_folder_that_is_not_ours_stays(name: str, tmp_path: Path) -> None:
    other = tmp_path / name
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    with atomic_file(tmp_path / "result") as partial:
        partial.write_text("whole")
    assert (other / "notes.txt").read_text() == "keep"


def test_a_failed_run_leaves_only_checkpoints_to_resume_from(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("checkpoint-1", "checkpoint-2"):
        (work / name).mkdir(parents=True)
    (work / "checkpoint-1" / "complete.json").write_text('{"step": 1}')
    with pytest.raises(ZeroDivisionError), dropping_incomplete_checkpoints(work):
        raise ZeroDivisionError
    assert [path.name for path in work.iterdir()] == ["checkpoint-1"]
    (work / "checkpoint-1" / "complete.json").unlink()
    with pytest.raises(ZeroDivisionError), dropping_incomplete_checkpoints(work):
        raise ZeroDivisionError
    assert not work.exists()


def test_weights_cut_short_are_one_error_for_torch_too(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "tiny", n_layers=1)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        load_causal_lm(folder)


def test_an_engine_that_never_starts_is_given_up(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # no Python starts with it
    options = EngineOptions(context_tokens=64)
    engine = EngineProcess(WorkerSettings(model=str(tiny_gguf), options=options, max_waiting=1))
    try:
        with pytest.raises(EngineError, match="ended 4 times before it had opened the model"):
            engine.wait_ready(60)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True),
        (RuntimeError("could not create a primitive"), True),
        (ImportError("lib.so: failed to map segment from shared object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory is a title"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_every_library_s_word_for_no_memory_is_understood(
    error: Exception, is_memory: bool
) -> None:
    assert is_out_of_memory(error) is is_memory
    outer = KeyError("x")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is is_memory


def test_torch_says_it_in_a_known_word() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.int8)
    assert is_out_of_memory(caught.value)


def onnx_file(path: Path, nodes: list[Any], inputs: Sequence[Any] = ()) -> Path:
    stored = [helper.make_tensor("w", TensorProto.FLOAT, [1, 1], [0.0])]
    graph = helper.make_graph(nodes, "g", inputs, [], initializer=stored)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_an_attribute_without_a_name_is_one_error(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    node.attribute.append(AttributeProto(i=3))
    with pytest.raises(ModelError, match="is no ONNX model"):
        read_onnx_header(onnx_file(tmp_path / "model.onnx", [node]))


def test_a_cache_without_a_type_is_one_error(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, [1])
    value.ClearField("type")
    with pytest.raises(ModelError, match="is no ONNX model"):
        read_onnx_header(onnx_file(tmp_path / "model.onnx", [], inputs=[value]))


def test_a_braided_graph_takes_no_time(tmp_path: Path) -> None:
    names = [["w"], *([f"{layer}-{n}" for n in range(12)] for layer in range(8))]
    nodes = [
        helper.make_node("Identity", [source], [target])
        for here, there in zip(names, names[1:], strict=False)
        for source in here
        for target in there
    ]
    path = onnx_file(tmp_path / "model.onnx", nodes)  # 12 ** 7 paths
    start_s = time.perf_counter()
    read_onnx_header(path)
    assert time.perf_counter() - start_s < 5


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_nested_without_end_is_no_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(text)
    (tmp_path / "edgekd.json").write_text(text)
    with pytest.raises(VerificationError, match="not an edgekd manifest"):
        read_manifest(tmp_path / "edgekd.json")


@pytest.mark.parametrize("name", ["a" * 300, "../a", "a/b", "", "..", "\ud800", "a\0b"])
def test_a_manifest_s_file_names_are_plain(name: str, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    with pytest.raises(VerificationError, match="is missing"):
        check_files(tmp_path, {"files": {name: {"sha256": "0"}}})

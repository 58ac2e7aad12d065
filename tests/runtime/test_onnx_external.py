"""Which files beside an ONNX model it may name, and which of their bytes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgekd.errors import ModelError
from edgekd.runtime.onnx_check import check_onnx
from edgekd.runtime.static_model import read_static
from tests.runtime.onnx_models import (
    WEIGHTS,
    argument,
    branch,
    context,
    model,
    outside,
    save,
    stored,
)

LEAVING = [
    "/etc/hostname",
    "../secret",
    "a/../../secret",
    "..",
    "sub/..",
    "C:secret",
    "C:\\secret",
    "\\\\host\\share\\secret",
    "..\\secret",
    "sub\\secret",
    "*/_ORT_MEM_ADDR_/*",
    "",
    ".",
    "weights.bin\0",
]


def refused(path: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        check_onnx(path)
    assert str(caught.value).startswith(f"{path} is refused: ") and "\n" not in str(caught.value)


def outside_in_a_body(location: str) -> ModelProto:
    return model([stored()], [branch([outside(location=location)])])


def outside_in_a_constant(location: str) -> ModelProto:
    return model(nodes=[helper.make_node("Constant", [], ["w"], value=outside(location=location))])


def compiled(location: str) -> ModelProto:
    return model(nodes=[context(embed_mode=0, ep_cache_context=location)])


def compiled_in_a_body(location: str) -> ModelProto:
    node = context(embed_mode=0, ep_cache_context=location)
    return model([stored()], [branch(nodes=[node])])


def refitted(location: str) -> ModelProto:
    return model(nodes=[context(ep_cache_context="binary", onnx_model_filename=location)])


NAMING = [
    lambda location: model([outside(location=location)]),
    outside_in_a_body,
    outside_in_a_constant,
    compiled,
    compiled_in_a_body,
    refitted,
]


@pytest.mark.parametrize("naming", NAMING)
def test_a_file_in_the_folder_or_below_it_may_be_named(naming: Any, tmp_path: Path) -> None:
    check_onnx(save(tmp_path, naming(WEIGHTS)))
    (tmp_path / "sub").mkdir()
    (tmp_path / WEIGHTS).rename(tmp_path / "sub" / WEIGHTS)
    (tmp_path / "sub" / "link").symlink_to(WEIGHTS)
    for location in (f"sub/{WEIGHTS}", f"./sub/{WEIGHTS}", "sub/link"):
        check_onnx(save(tmp_path, naming(location)))


@pytest.mark.parametrize("naming", NAMING)
def test_a_path_that_leaves_the_folder_is_refused(naming: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    for location in LEAVING:
        if location or naming not in (compiled, compiled_in_a_body, refitted):
            path = save(tmp_path / "m", naming(location))
            refused(path, "allowed is the relative path of a file in the model's folder")


@pytest.mark.parametrize("naming", NAMING)
def test_a_link_that_leaves_the_folder_is_refused(naming: Any, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "s").write_bytes(bytes(64))
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "file").symlink_to(tmp_path / "secrets" / "s")
    (folder / "sub").symlink_to(tmp_path / "secrets")
    for location in ("file", "sub/s"):
        refused(save(folder, naming(location)), "a link that leads out of the model's folder")


@pytest.mark.parametrize("naming", NAMING)
def test_what_is_not_there_or_no_file_is_refused(naming: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    refused(save(tmp_path, naming("folder")), "which is no plain file")
    for location in ("none", "loop", "x" * 300):
        refused(save(tmp_path, naming(location)), "which cannot be read")


def test_a_folder_of_links_to_files_of_one_other_folder_is_let_through(tmp_path: Path) -> None:
    """So the cache of the Hugging Face hub is laid out."""
    save(tmp_path / "blobs", model([outside()]))
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for name in ("model.onnx", WEIGHTS):
        (snapshot / name).symlink_to(f"../blobs/{name}")
    check_onnx(snapshot / "model.onnx")


def changed(**changes: Any) -> TensorProto:
    tensor = outside()
    for name, value in changes.items():
        setattr(tensor, name, value)
    return tensor


def without(key: str) -> TensorProto:
    tensor = outside()
    kept = [entry for entry in tensor.external_data if entry.key != key]
    tensor.ClearField("external_data")
    tensor.external_data.extend(kept)
    return tensor


def given_twice() -> TensorProto:
    tensor = outside()
    tensor.external_data.add(key="offset", value="16")
    return tensor


def strings() -> TensorProto:
    tensor = outside(length="4")
    tensor.data_type = TensorProto.STRING
    return tensor


TENSORS = [
    (outside(offset=52), "ends at byte 68 of weights.bin, which has 64"),
    (outside(n_values=17), "ends at byte 68 of weights.bin, which has 64"),
    (outside(length="12"), "takes 12 bytes of another file; its type and shape are 16"),
    (outside(length="0"), "takes 0 bytes of another file; its type and shape are 16"),
    (outside(offset=-4), "the offset or length '-4'; no number"),
    (changed(data_type=TensorProto.DOUBLE), "its type and shape are 32"),
    (changed(data_type=77), "unknown element type 77"),
    (changed(raw_data=bytes(16)), "values both in the model and in another file"),
    (changed(data_location=TensorProto.DEFAULT), "names another file, though its values lie in"),
    (outside(length="16 "), "no number"),
    (outside(offset=0, length="١٦"), "no number"),
    (outside(length="0x10"), "no number"),
    (outside(length="9" * 19), "no number"),
    (outside(prepacked_0="key|0;64;0"), "says 'location, offset, length, prepacked_0' of where"),
    (without("location"), "says 'offset, length' of where its values lie; needed is location"),
    (given_twice(), "says 'location, offset, length, offset' of where"),
    (strings(), "strings in another file"),
]


@pytest.mark.parametrize(("tensor", "match"), TENSORS)
def test_a_tensor_that_is_not_in_the_file_as_it_says_is_refused(
    tensor: TensorProto, match: str, tmp_path: Path
) -> None:
    refused(save(tmp_path, model([tensor])), match)


@pytest.mark.parametrize("key", ["offset", "length", "checksum"])
def test_only_the_location_is_needed(key: str, tmp_path: Path) -> None:
    check_onnx(save(tmp_path, model([without(key)])))


def in_constant(tensor: TensorProto) -> NodeProto:
    return helper.make_node("Constant", [], ["v"], value=tensor)


PLACED: list[tuple[Sequence[TensorProto], Sequence[NodeProto]]] = [
    ([outside(), outside("v", 12)], []),
    ([outside(n_values=8), outside("v", 4, 2)], []),  # one within the other
    ([outside(n_values=8), outside("v")], []),  # with the same start
    ([outside(), outside("v", 12, location="other")], []),  # two names of a file
    ([outside()], [branch([outside("v", 12)])]),
    ([outside()], [in_constant(outside("v", 12))]),
    ([outside("v", 44), outside("u", 20), outside("w", 32)], []),
]


@pytest.mark.parametrize(("tensors", "nodes"), PLACED)
def test_tensors_that_share_a_part_of_their_bytes_are_refused(
    tensors: Sequence[TensorProto], nodes: Sequence[NodeProto], tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(WEIGHTS)
    refused(
        save(tmp_path, model(tensors, nodes)), r"tensor '.' and tensor '.' overlap in weights.bin"
    )


def test_tensors_may_share_all_of_their_bytes_as_tied_ones_do(tmp_path: Path) -> None:
    tensors = [outside(), outside("v"), outside("u", 16), outside("empty", 8, 0)]
    check_onnx(save(tmp_path, model(tensors, [branch([outside("t")])])))


def test_a_compiled_graph_may_lie_in_the_node(tmp_path: Path) -> None:
    for binary in ("/etc/hostname", b"\xff\0"):
        check_onnx(save(tmp_path, model(nodes=[context(ep_cache_context=binary)])))
        check_onnx(save(tmp_path, model(nodes=[context(embed_mode=1, ep_cache_context=binary)])))
    check_onnx(save(tmp_path, model(nodes=[context(embed_mode=0, main_context=0)])))


def test_a_compiled_graph_whose_place_is_ambiguous_is_refused(tmp_path: Path) -> None:
    node = context(ep_cache_context="/etc/hostname")
    refused(save(tmp_path, model(nodes=[context(embed_mode=2)])), "embed_mode 2; allowed are 0")
    node.attribute.add(name="embed_mode")  # parsers read 0
    refused(save(tmp_path, model(nodes=[node])), "ep_cache_context of an EPContext node lies in")
    node.attribute.add(name="embed_mode", i=1)
    refused(save(tmp_path, model(nodes=[node])), "an attribute twice")
    del node.attribute[:]
    node.attribute.append(argument("ep_cache_context"))
    refused(save(tmp_path, model(nodes=[node])), "an attribute twice, or one of a function")


@pytest.mark.parametrize("name", ["../p.onnx", "/p.onnx", "a/p.onnx", "p.onnx; reboot", "", ".."])
def test_a_folder_for_an_npu_names_only_plain_files(name: str, tmp_path: Path) -> None:
    """Their names become paths, and words of a shell script."""
    chip = {"soc": "sm8650", "soc_model": 57, "htp_arch": 75, "sdk": "v2"}
    graphs = {"prefill": "p.onnx", "decode": "d_ctx.onnx"}
    sizes = {"context_tokens": 64, "prefill_tokens": 16, "windows": {}}
    described: tuple[dict[str, dict[str, Any]], ...] = (
        {"graphs": graphs, "binaries": {"d_ctx_qnn.bin": 5}},
        {"graphs": graphs | {"prefill": name}, "binaries": {}},
        {"graphs": graphs, "binaries": {name: 5}},
    )
    for names in described:
        content = {"schema_version": 1, "compiled": chip | names} | sizes
        (tmp_path / "npu.json").write_text(json.dumps(content))
        if name not in (*names["graphs"].values(), *names["binaries"]):
            assert read_static(tmp_path).compiled
            continue
        with pytest.raises(ModelError, match="is no plain file name"):
            read_static(tmp_path)


def test_a_folder_for_an_npu_names_every_graph(tmp_path: Path) -> None:
    chip = {"soc": "sm8650", "soc_model": 57, "htp_arch": 75, "sdk": "v2", "binaries": {}}
    sizes = {"context_tokens": 64, "prefill_tokens": 16, "windows": {}}
    wrong: tuple[Any, ...] = ({"prefill": "p"}, [], "text")
    for graphs in wrong:
        content = {"schema_version": 1, "compiled": chip | {"graphs": graphs}} | sizes
        (tmp_path / "npu.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match="is not what this edgekd writes"):
            read_static(tmp_path)

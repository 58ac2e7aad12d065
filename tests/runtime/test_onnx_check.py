"""What of an ONNX file is refused in Python, and that what exporters write is not."""

import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper

from edgekd.errors import ModelError
from edgekd.runtime.onnx_check import check_onnx
from edgekd.runtime.onnx_tensor import ELEMENT_TYPES
from edgekd.runtime.providers import create_session
from tests.runtime.onnx_models import (
    WEIGHTS,
    WEIGHTS_BYTES,
    branch,
    context,
    model,
    outside,
    part,
    save,
    stored,
    with_tensor,
)

TYPES = [number for number in TensorProto.DataType.values() if number != TensorProto.UNDEFINED]


def refused(folder: Path, content: ModelProto | bytes, match: str) -> None:
    path = save(folder, content)
    with pytest.raises(ModelError, match=match) as caught:
        check_onnx(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_what_other_exporters_write_is_let_through() -> None:
    files = list((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx"))
    assert len(files) > 100
    for path in files:
        check_onnx(path)


def test_an_exported_folder_is_let_through(tiny_onnx: Path) -> None:
    check_onnx(tiny_onnx / "model.onnx")


def test_the_element_types_are_those_of_the_onnx_package() -> None:
    assert {number: name for number, (name, _, _) in ELEMENT_TYPES.items()} == {
        number: TensorProto.DataType.Name(number) for number in TYPES
    }


@pytest.mark.parametrize("data_type", TYPES)
def test_values_of_every_type_are_let_through_and_one_too_many_or_few_is_not(
    data_type: int, tmp_path: Path
) -> None:
    ones: Any = [b"1" if data_type == TensorProto.STRING else 1] * 5
    typed = helper.make_tensor("w", data_type, [5], ones)
    check_onnx(save(tmp_path, model([typed])))
    for n_values in (3, 9):  # 4 and 6 may take as many bytes as 5
        typed.dims[0] = n_values
        refused(tmp_path, model([typed]), f"tensor 'w' has .* values; {n_values} ")


@pytest.mark.parametrize("data_type", [each for each in TYPES if each != TensorProto.STRING])
def test_raw_values_of_every_type_are_as_long_as_the_onnx_package_says(
    data_type: int, tmp_path: Path
) -> None:
    size_bytes = -(-5 * ELEMENT_TYPES[data_type][1] // 8)
    raw = helper.make_tensor("w", data_type, [5], bytes(size_bytes), raw=True)
    check_onnx(save(tmp_path, model([raw])))
    for wrong in (size_bytes - 1, size_bytes + 1):
        raw.raw_data = bytes(wrong)
        refused(tmp_path, model([raw]), f"tensor 'w' has {wrong} bytes of values; 5 ")


def changed(**changes: Any) -> TensorProto:
    """Return a sound tensor with ``changes``."""
    tensor = stored()
    for name, value in changes.items():
        if isinstance(value, list):
            tensor.ClearField(name)
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return tensor


def in_segments() -> TensorProto:
    tensor = stored()
    tensor.segment.begin = 0
    return tensor


TENSORS = [
    (changed(data_type=99), "unknown element type 99"),
    (changed(data_type=0), "unknown element type 0"),
    (changed(dims=[2, -2]), "negative or too large"),
    (changed(dims=[2**62, 2**62, 0], raw_data=b""), "negative or too large"),
    (changed(dims=[1] * 65), "more than 64 dimensions"),
    (changed(float_data=[0.0]), "raw values beside or instead of typed ones"),
    (changed(data_type=TensorProto.STRING), "raw values beside or instead of typed ones"),
    (changed(dims=[0], raw_data=b"\0"), "has 1 bytes of values; 0 FLOAT are 0"),
    (in_segments(), "stored in segments"),
    (TensorProto(name="w", data_type=1, dims=[2]), "has 0 values; 2 FLOAT are 2 of field 4"),
    (TensorProto(name="w", data_type=1, dims=[1], int32_data=[1]), "1 FLOAT are 1 of field 4"),
    (
        TensorProto(name="w", data_type=1, dims=[1], int32_data=[1], float_data=[1]),
        "has 2 values; 1 FLOAT are 1 of field 4",
    ),
]


@pytest.mark.parametrize(("tensor", "match"), TENSORS)
def test_a_tensor_that_contradicts_itself_is_refused(
    tensor: TensorProto, match: str, tmp_path: Path
) -> None:
    refused(tmp_path, model([tensor]), match)


SHORT = changed(raw_data=bytes(3))
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("s", TensorProto.FLOAT, [2], [1, 2]),
    helper.make_tensor("i", TensorProto.INT64, [2], [0, 3]),
    [4],
)


def sparse(shape: list[int]) -> Any:
    """Return a sparse tensor with indices of ``shape`` for its two values."""
    found = type(SPARSE)()
    found.CopyFrom(SPARSE)
    found.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, shape, [0] * shape[0]))
    return found


def in_function() -> ModelProto:
    node = helper.make_node("Constant", [], ["y"], value=SHORT)
    function = helper.make_function("own", "f", [], ["y"], [node], [helper.make_opsetid("", 21)])
    found = model([stored()])
    found.functions.append(function)
    return found


def in_training() -> ModelProto:
    found = model([stored()])
    found.training_info.add().algorithm.initializer.append(SHORT)
    return found


HIDDEN = {
    "constant": model(nodes=[helper.make_node("Constant", [], ["w"], value=SHORT)]),
    "list": model([stored()], [helper.make_node("Own", [], [], values=[stored(), SHORT])]),
    "body": model([stored()], [branch([SHORT])]),
    "node of a body": model(
        [stored()], [branch([], [helper.make_node("Constant", [], ["z"], value=SHORT)])]
    ),
    "list of bodies": model(
        [stored()], [helper.make_node("Own", [], [], bodies=[model([SHORT]).graph])]
    ),
    "function": in_function(),
    "training": in_training(),
}


@pytest.mark.parametrize("place", HIDDEN)
def test_tensors_are_found_wherever_they_lie(place: str, tmp_path: Path) -> None:
    refused(tmp_path, HIDDEN[place], "tensor 'w' has 3 bytes of values")


def test_sparse_tensors_are_looked_at(tmp_path: Path) -> None:
    check_onnx(save(tmp_path, model([stored()], sparse_initializer=[SPARSE])))
    for shape in ([1], [3]):
        wrong = model([stored()], sparse_initializer=[sparse(shape)])
        refused(tmp_path, wrong, rf"a sparse tensor has values \[2\] and indices \[{shape[0]}\]")


def nested(depth: int) -> ModelProto:
    node = branch([stored("deep")])
    for _ in range(depth):
        node = branch(nodes=[node])
        del node.attribute[1]  # one body, or they would double with each
    return model([stored()], [node])


def test_graphs_may_be_nested_but_not_without_end(tmp_path: Path) -> None:
    check_onnx(save(tmp_path, nested(8)))
    refused(tmp_path, nested(25), "nested more than 60 deep")


def test_types_nested_without_end_are_refused(tmp_path: Path) -> None:
    content = b""
    for _ in range(2000):
        content = part(4, part(1, content))
    refused(tmp_path, part(7, part(11, part(2, content))), "nested more than 60 deep")


@pytest.mark.parametrize("kind", ["input", "output", "value_info"])
def test_values_of_an_unknown_type_are_refused(kind: str, tmp_path: Path) -> None:
    content = model([stored()])
    value = getattr(content.graph, kind).add(name="v")
    value.type.sequence_type.elem_type.tensor_type.elem_type = 29
    refused(tmp_path, content, "a value is of the unknown element type 29")
    value.type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.INT4
    check_onnx(save(tmp_path, content))


TENSOR = stored().SerializeToString()
TWICE = {
    "graph": (model([stored()]).SerializeToString() * 2, "field 7 of a Model is given twice"),
    "name": (with_tensor(TENSOR + part(8, b"v")), "field 8 twice"),
    "type": (with_tensor(TENSOR + b"\x10\x01"), "field 2 twice"),
    "raw values": (with_tensor(TENSOR + part(9, b"")), "field 9 twice"),
    "operator": (part(7, part(1, part(4, b"If") * 2)), "a node has two operators"),
    "tensor of a node": (
        part(7, part(1, part(5, part(5, TENSOR) * 2))),
        "field 5 of a Attribute is given twice",
    ),
}


@pytest.mark.parametrize("what", TWICE)
def test_what_parsers_merge_or_drop_may_not_be_given_twice(what: str, tmp_path: Path) -> None:
    refused(tmp_path, *TWICE[what])


FORMS = {
    "a number as graph": (b"\x38\x01", "field 7 of a Model"),
    "a number as operator": (part(7, part(1, b"\x20\x01")), "field 4 of a Node is a number"),
    "a text as type": (with_tensor(part(2, b"\x01")), "field 2 twice or in a wrong form"),
    "a number as text": (with_tensor(b"\x10\x08\x30\x01\x08\x01"), "field 6 twice or in a wrong"),
    "another data location": (with_tensor(TENSOR + b"\x70\x02"), "unknown data location 2"),
    "half a float": (with_tensor(b"\x10\x01\x08\x01" + part(4, b"\0\0")), "cut off or in a wrong"),
    "a name that is no text": (with_tensor(part(8, b"\xff")), "can't decode byte 0xff"),
}


@pytest.mark.parametrize("what", FORMS)
def test_a_field_in_a_form_that_native_code_passes_over_is_refused(
    what: str, tmp_path: Path
) -> None:
    refused(tmp_path, *FORMS[what])


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"GGUF", b"\x3a\x05"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path, content, "is no ONNX model or is cut short: .*; fetch it again")


def test_only_a_plain_file_with_the_right_name_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    for name in ("none.onnx", ".onnx", "pipe.onnx"):
        with pytest.raises(ModelError, match="no model at|does not end in .onnx"):
            check_onnx(tmp_path / name)
    ort_format = save(tmp_path, model([stored()])).rename(tmp_path / "model.ort")
    with pytest.raises(ModelError, match="does not end in .onnx"):
        check_onnx(ort_format)


def test_no_session_is_made_of_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is refused: tensor 'w' has 3 bytes of values"):
        create_session(save(tmp_path, model([SHORT])), "cpu", n_threads=1)


WHOLE = model(
    [outside(), outside("v", 16), stored("u")],
    [branch([outside("t", 32), stored("s")]), context(embed_mode=0, ep_cache_context=WEIGHTS)],
    sparse_initializer=[SPARSE],
).SerializeToString()


def check_any(folder: Path, content: bytes) -> None:
    """Fail unless ``content`` is refused in one line or takes only what lies in ``folder``."""
    path = save(folder, content)
    try:
        check_onnx(path)
    except ModelError as error:
        assert "\n" not in str(error)
        return
    try:
        read = onnx.load_model_from_string(content)
    except Exception as error:
        assert type(error).__name__ == "DecodeError"  # protobuf's, whose types are not known
        return
    bodies = [each.g for node in read.graph.node for each in node.attribute if each.HasField("g")]
    for graph in (read.graph, *bodies):
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                where = {entry.key: entry.value for entry in tensor.external_data}
                assert where["location"].removeprefix("./") == WEIGHTS
                size_bytes = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
                n_bytes = size_bytes * tensor.dims[0]
                assert int(where.get("offset", 0)) + n_bytes <= WEIGHTS_BYTES


ANY_FILE = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@given(data=st.data())
@ANY_FILE
def test_any_mutation_is_refused_in_one_line_or_takes_only_what_is_there(
    tmp_path: Path, data: st.DataObject
) -> None:
    check_onnx(save(tmp_path, WHOLE))
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(WHOLE) - 1))] = data.draw(st.integers(0, 255))
    check_any(tmp_path, bytes(content))


@given(length=st.integers(0, len(WHOLE) - 1))
@ANY_FILE
def test_any_truncation_is_refused_in_one_line_or_takes_only_what_is_there(
    tmp_path: Path, length: int
) -> None:
    check_any(tmp_path, WHOLE[:length])


@given(content=st.binary(max_size=300))
@ANY_FILE
def test_any_bytes_are_survived(tmp_path: Path, content: bytes) -> None:
    check_any(tmp_path, content)
    check_any(tmp_path, with_tensor(content))

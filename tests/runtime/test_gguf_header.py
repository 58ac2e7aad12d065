import struct
from pathlib import Path

import pytest
from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekd.errors import ModelError
from edgekd.runtime.gguf_header import GGML_TYPES, read_gguf_header


def test_type_table_equals_the_gguf_package() -> None:
    for type_id, (name, block_size, block_bytes) in GGML_TYPES.items():
        assert GGML_QUANT_SIZES[GGMLQuantizationType(type_id)] == (block_size, block_bytes), name


def test_header_equals_what_the_gguf_package_reads(tiny_gguf: Path) -> None:
    header, reader = read_gguf_header(tiny_gguf), GGUFReader(tiny_gguf)
    theirs = {t.name: (t.data_offset, t.n_bytes, t.tensor_type.name) for t in reader.tensors}
    assert {t.name: (t.offset_bytes, t.size_bytes, t.type_name) for t in header.tensors} == theirs
    assert header.metadata["llama.block_count"] == 3
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_truncation_is_one_clear_error(
    tiny_gguf: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = tiny_gguf.read_bytes()
    length = data.draw(st.integers(0, len(content) - 64))
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[:length])
    with pytest.raises(ModelError, match="cut short|no GGUF file|more than its"):
        read_gguf_header(path)


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_mutation_of_the_header_escapes_as_another_error(
    tiny_gguf: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 20_000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
    except ModelError:
        return
    assert all(t.offset_bytes + t.size_bytes <= len(content) for t in header.tensors)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(
    path: Path, numbers: list[tuple[str, int]], offsets: list[tuple[str, int]], *, kind: int = 4
) -> Path:
    """Write a GGUF file with ``numbers`` as metadata and an F32 tensor [8] at each offset."""
    content = b"GGUF" + struct.pack("<IQQ", 3, len(offsets), len(numbers))
    for key, value in numbers:
        layout = {4: "<I", 7: "<?"}[kind]
        content += _text(key) + struct.pack("<I", kind) + struct.pack(layout, value)
    for name, offset in offsets:
        content += _text(name) + struct.pack("<IQIQ", 1, 8, 0, offset)
    path.write_bytes(content + bytes(-len(content) % 64) + bytes(256))
    return path


def test_tensors_at_multiples_of_the_alignment_are_read(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "m.gguf", [("general.alignment", 64)], [("b", 64), ("a", 0)])
    places = {tensor.name: tensor.offset_bytes for tensor in read_gguf_header(path).tensors}
    assert places["b"] - places["a"] == 64 and places["a"] % 64 == 0


@pytest.mark.parametrize(("alignment", "offset"), [(32, 36), (64, 32), (32, 33)])
def test_a_tensor_off_the_alignment_is_refused(alignment: int, offset: int, tmp_path: Path) -> None:
    path = _gguf(
        tmp_path / "m.gguf", [("general.alignment", alignment)], [("a", 128), ("b", offset)]
    )
    with pytest.raises(ModelError, match=f"'b' at offset {offset}, which is no multiple of"):
        read_gguf_header(path)


def test_a_tensor_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "m.gguf", [], [("a", 0), ("a", 32)])
    with pytest.raises(ModelError, match="has a tensor 'a' twice"):
        read_gguf_header(path)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "m.gguf", [("x", 1), ("x", 2)], [("a", 0)])
    with pytest.raises(ModelError, match="has the metadata key 'x' twice"):
        read_gguf_header(path)


def test_an_alignment_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = _gguf(tmp_path / "m.gguf", [("general.alignment", True)], [("a", 0)], kind=7)
    with pytest.raises(ModelError, match="has the alignment True; a power of two is needed"):
        read_gguf_header(path)

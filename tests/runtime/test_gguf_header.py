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

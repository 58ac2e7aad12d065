"""Protobuf's wire format: bounds, and what parsers read differently."""

import pytest
from onnx import TensorProto

from edgekd.runtime.protobuf_wire import BYTES, VARINT, Wire, WireError


def test_fields_are_those_that_protobuf_writes() -> None:
    tensor = TensorProto(name="é", data_type=7, dims=[3, 2**63 - 1], double_data=[1.0])
    wire = Wire(tensor.SerializeToString())
    found = [(number, kind) for number, kind, _, _ in wire.fields()]
    assert found == [(1, VARINT), (1, VARINT), (2, VARINT), (8, BYTES), (10, BYTES)]
    assert [start for number, _, start, _ in wire.fields() if number == 1] == [3, 2**63 - 1]
    ((start, end),) = [(start, end) for number, _, start, end in wire.fields() if number == 8]
    assert wire.text(start, end) == "é"


@pytest.mark.parametrize("value", [0, 127, 128, 2**31 - 1, -1, -(2**63)])
def test_packed_numbers_are_counted_and_read(value: int) -> None:
    packed = TensorProto(int64_data=[value, 5, value]).SerializeToString()
    wire = Wire(packed)
    ((_, _, start, end),) = wire.fields()
    assert wire.count_numbers(start, end) == 3
    assert list(wire.numbers(start, end)) == [value % 2**64, 5, value % 2**64]


MALFORMED = {
    b"\x0a\x05abc": "a field of 5 bytes at byte 2 ends beyond",
    b"\x0d\0\0\0": "a field of 4 bytes",
    b"\x09\0\0\0\0": "a field of 8 bytes",
    b"\x08": "does not end",
    b"\x0a": "does not end",
    b"\x08\x80": "does not end",
    b"\x80": "does not end",
    b"\x08" + b"\xff" * 9 + b"\x02": "more than 64 bits",
    b"\x08" + b"\x80" * 10 + b"\0": "does not end",
    b"\0\0": "field number 0",
    b"\x88\x80\x80\x80\x10\0": "out of range",  # native parsers read field 1
    b"\x0b\x0c": "unknown wire type 3",
    b"\x0f": "unknown wire type 7",
}


@pytest.mark.parametrize("content", MALFORMED)
def test_what_is_malformed_is_refused(content: bytes) -> None:
    with pytest.raises(WireError, match=MALFORMED[content]):
        list(Wire(content).fields())


def test_a_message_ends_where_it_says_and_not_where_the_file_does() -> None:
    content = b"\x0a\x02\x08\x80\x01"
    with pytest.raises(WireError, match="does not end"):
        list(Wire(content).fields(2, 4))
    with pytest.raises(WireError, match="does not end"):
        Wire(content).count_numbers(2, 4)


def test_fields_are_counted_over_all_messages() -> None:
    wire = Wire(b"\x08\x01" * 6, max_fields=10)
    assert len(list(wire.fields())) == 6
    with pytest.raises(WireError, match="more than 10 fields"):
        list(wire.fields())

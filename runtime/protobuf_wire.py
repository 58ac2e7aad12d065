"""Protobuf's wire format, walked within bounds and without protobuf.

A length is checked against the message it lies in before it is used. What parsers read differently
(groups, numbers that are too large for their type) is refused, so that native code finds the same
fields: https://protobuf.dev/programming-guides/encoding/

    for number, wire, start, end in Wire(data).fields():
        ...
"""

import mmap
from collections.abc import Iterator

Buffer = bytes | mmap.mmap
Field = tuple[int, int, int, int]
"""Number, wire type, and where the value starts and ends; a VARINT's value stands for its start."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
_MAX_KEY = 2**32  # larger ones lose their upper bits in native parsers
_MAX_FIELDS = 10_000_000  # seconds; a model of 100 layers has some 100 thousand
_LAST_OF_NUMBER = bytes(range(0x80, 0x100))


class WireError(ValueError):
    """The bytes are no protobuf message."""


class Wire:
    """Bytes of which messages are read; all of them together may have so many fields."""

    def __init__(self, data: Buffer, max_fields: int = _MAX_FIELDS) -> None:
        """Read from ``data``, of which nothing is copied."""
        self.data = data
        self._max_fields = self._n_left = max_fields

    def fields(self, start: int = 0, end: int | None = None) -> Iterator[Field]:
        """Yield every field of the message from ``start`` to ``end``.

        Raises:
            WireError: it is malformed, or one field too many.
        """
        data, place = self.data, start
        end = len(data) if end is None else end
        while place < end:
            # Most numbers are of one byte, and a call takes longer than the rest.
            if (key := data[place]) < 0x80:
                place += 1
            else:
                key, place = self._number(place, end)
            number, wire = key >> 3, key & 7
            if not number or key >= _MAX_KEY:
                raise WireError(f"the field number {number} at byte {place} is out of range")
            self._n_left -= 1
            if self._n_left < 0:
                raise WireError(f"it has more than {self._max_fields} fields")
            if wire == VARINT:
                value, place = self._number(place, end)
                yield number, wire, value, place
                continue
            if wire == BYTES:
                if place < end and (length := data[place]) < 0x80:
                    place += 1
                else:
                    length, place = self._number(place, end)
            elif wire in _FIXED_BYTES:
                length = _FIXED_BYTES[wire]
            else:
                raise WireError(f"unknown wire type {wire} at byte {place}")
            if length > end - place:
                raise WireError(
                    f"a field of {length} bytes at byte {place} ends beyond its message"
                )
            yield number, wire, place, place + length
            place += length

    def count_numbers(self, start: int, end: int) -> int:
        """Return how many packed numbers lie from ``start`` to ``end``.

        Raises:
            WireError: the last one does not end there.
        """
        packed = self.data[start:end]
        if packed and packed[-1] >= 0x80:
            raise WireError(f"a number at byte {end} does not end")
        return len(packed.translate(None, _LAST_OF_NUMBER))

    def numbers(self, start: int, end: int) -> Iterator[int]:
        """Yield the packed numbers from ``start`` to ``end``."""
        while start < end:
            value, start = self._number(start, end)
            yield value

    def text(self, start: int, end: int) -> str:
        """Return what is written from ``start`` to ``end``.

        Raises:
            ValueError: it is no UTF-8.
        """
        return self.data[start:end].decode()

    def _number(self, place: int, end: int) -> tuple[int, int]:
        if place < end and (byte := self.data[place]) < 0x80:
            return byte, place + 1
        value = 0
        for shift in range(0, 64, 7):
            if place >= end:
                break
            byte = self.data[place]
            value |= (byte & 0x7F) << shift
            place += 1
            if byte < 0x80:
                if value >> 64:
                    raise WireError(f"a number at byte {place} has more than 64 bits")
                return value, place
        raise WireError(f"a number at byte {place} does not end")

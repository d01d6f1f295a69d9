"""Reads the footer of a Parquet file before Arrow does, as far as a reader's safety depends on it.

Arrow calls the code that a process has registered for an extension type of the schema `ARROW:schema` (Ray's own
unpickles what the file holds), and ends the process where the sizes of a damaged footer are asked for in Python.

A footer is one struct in Thrift's compact protocol, which is read here without knowing its fields, and then asked for
those of `parquet.thrift`, by their numbers.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

EXTENSION_KEY = b"ARROW:extension:name"
_BYTES_PER_GUESS = 64 << 10  # read at once, since most footers are shorter
_MAX_FOOTER_BYTES = 64 << 20
_MAX_DEPTH = 16  # Parquet's own structs are half as deep
_MAX_VARINT_BYTES = 10
_TAIL = 8  # the length of the footer, and the magic number
# Types of the compact protocol; 1 and 2 are the truth values, 3 a byte.
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_DICTIONARY_ENCODINGS, _DELTA_BYTE_ARRAY = {2, 8}, 7


@dataclass(frozen=True, slots=True)
class Chunk:
    """The values of a physical column in a row group.

    Attributes:
        num_values: Values and nulls, and empty lists.
        size: Bytes of its pages before compression.
        has_dictionary: Whether it may store equal values once.
        has_shared_beginnings: Whether it may store the equal beginnings of values once.
    """

    num_values: int
    size: int
    has_dictionary: bool
    has_shared_beginnings: bool


def read_chunks(source: pa.NativeFile) -> list[list[Chunk]]:
    """Read the chunks of each row group, in the order of the physical columns.

    Raises:
        ValueError: The footer is damaged, or has an extension type, which the message names.
    """
    size = source.size()
    tail = source.read_at(min(size, _BYTES_PER_GUESS), max(0, size - _BYTES_PER_GUESS))
    length = int.from_bytes(tail[-_TAIL:-4], "little")
    if length > min(size - _TAIL, _MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {length} bytes in a file of {size}")
    if length + _TAIL > len(tail):
        tail = source.read_at(length + _TAIL, size - _TAIL - length)
    footer = tail[len(tail) - _TAIL - length : -_TAIL]
    if any(spelling in footer for spelling in _SPELLINGS):
        named = ", ".join(f"{name!r} is of {kind!r}" for name, kind in _extension_types(footer))
        raise ValueError(f"Arrow extension types are not read, cast them to plain types: {named or 'in its schema'}")
    try:
        groups = _Thrift(footer).struct().get(4, [])
        return [[_chunk(column[3]) for column in group[1]] for group in groups]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("a damaged footer") from error


def _chunk(fields: dict[int, Any]) -> Chunk:
    encodings = set(fields[2])
    return Chunk(
        num_values=int(fields[5]),
        size=int(fields[6]),
        has_dictionary=11 in fields or bool(encodings & _DICTIONARY_ENCODINGS),
        has_shared_beginnings=_DELTA_BYTE_ARRAY in encodings,
    )


class _Thrift:
    """Reads values of the compact protocol one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read a struct: its values by the numbers of their fields."""
        if depth > _MAX_DEPTH:
            raise ValueError("a footer of too many levels")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            step, kind = divmod(header, 16)
            number = number + step if step else self._integer()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        if kind in _INTEGERS:
            return self._integer()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in _LISTS:
            length, item = divmod(self._byte(), 16)
            return [self._value(item, depth + 1) for _ in range(self._varint() if length == 15 else length)]
        if kind == _MAP:
            raise ValueError("a map in the footer, where Parquet has none")
        if kind == _STRUCT:
            return self.struct(depth + 1)
        raise ValueError(f"a value of the unknown type {kind} in the footer")

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _bytes(self, length: int) -> bytes:
        self._place += length
        if self._place > len(self._data):
            raise ValueError("a footer that ends too early")
        return self._data[self._place - length : self._place]

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of too many bytes in the footer")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def _in_base64(text: bytes, offset: int) -> bytes:
    """What base 64 holds of a text, wherever it is, that begins at `offset`, modulo 3, of what is encoded."""
    encoded = base64.b64encode(bytes(offset) + text)
    return encoded[-(-offset * 8 // 6) : (offset + len(text)) * 8 // 6]


_SPELLINGS = (EXTENSION_KEY, *(_in_base64(EXTENSION_KEY, offset) for offset in range(3)))


def _extension_types(footer: bytes) -> list[tuple[str, str]]:
    """The columns of extension types and these types' names, as far as they can be told."""
    found = re.search(rb"/////[A-Za-z0-9+/]+={0,2}", footer)  # how the stored Arrow schema begins
    if found is None:
        return []
    harmless = EXTENSION_KEY.lower()
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found[0]).replace(EXTENSION_KEY, harmless)))
    except (ValueError, OSError, pa.ArrowException):
        return []
    return [(field.name, kind) for field in schema for kind in _kinds(field, harmless)]


def _kinds(field: pa.Field, key: bytes) -> Iterator[str]:
    if key in (field.metadata or {}):
        yield field.metadata[key].decode(errors="replace")
    for number in range(field.type.num_fields):
        yield from _kinds(field.type.field(number), key)

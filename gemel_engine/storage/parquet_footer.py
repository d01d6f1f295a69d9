"""Checks the footer of a Parquet file before Arrow reads it.

Arrow runs the code that a process has registered for an extension type in the schema `ARROW:schema`
(Ray's own type unpickles data of the file), and crashes the process when Python asks for the sizes
in a damaged footer.

A footer is a struct in Thrift's compact protocol. It is parsed here without its schema; fields are
then looked up by their numbers in `parquet.thrift`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

EXTENSION_KEY = b"ARROW:extension:name"
_BYTES_PER_GUESS = 64 << 10  # read first; most footers are shorter
_MAX_FOOTER_BYTES = 64 << 20
_MAX_DEPTH = 16  # Parquet's own structs are half as deep
_MAX_VARINT_BYTES = 10
_FOOTERS_KEPT = 2  # the shards of a file follow each other
_TAIL = 8  # length of the footer, magic number
# Types of the compact protocol; 1 and 2 are booleans, 3 is a byte.
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_DICTIONARY_ENCODINGS, _DELTA_BYTE_ARRAY = {2, 8}, 7


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column chunk: the values of a physical column in a row group.

    Attributes:
        num_values: Number of values, including nulls and empty lists.
        size: Size of its pages in bytes before compression.
        num_nulls: Number of nulls and empty lists; None if the file does not say it.
        has_dictionary: Whether equal values may be stored once.
        has_shared_beginnings: Whether equal prefixes of values may be stored once.
    """

    num_values: int
    size: int
    num_nulls: int | None
    has_dictionary: bool
    has_shared_beginnings: bool


def read_chunks(source: pa.NativeFile) -> tuple[tuple[Chunk, ...], ...]:
    """Return the column chunks of each row group, in the order of the physical columns.

    A process checks a footer once: the next shards of a file with many row groups take no such time.

    Raises:
        ValueError: The footer is damaged, or contains an extension type, which the message names.
    """
    size = source.size()
    tail = source.read_at(min(size, _BYTES_PER_GUESS), max(0, size - _BYTES_PER_GUESS))
    length = int.from_bytes(tail[-_TAIL:-4], "little")
    if length > min(size - _TAIL, _MAX_FOOTER_BYTES):
        raise ValueError(f"a footer of {length} bytes in a file of {size}")
    if length + _TAIL > len(tail):
        tail = source.read_at(length + _TAIL, size - _TAIL - length)
    return _checked_chunks(tail[len(tail) - _TAIL - length : -_TAIL])


@lru_cache(_FOOTERS_KEPT)
def _checked_chunks(footer: bytes) -> tuple[tuple[Chunk, ...], ...]:
    if any(spelling in footer for spelling in _SPELLINGS):
        named = ", ".join(f"{name!r} is of {kind!r}" for name, kind in _extension_types(footer))
        raise ValueError(f"Arrow extension types are not read, cast them to plain types: {named or 'in its schema'}")
    try:
        groups = _Thrift(footer).struct().get(4, [])
        return tuple(tuple(_chunk(column[3]) for column in group[1]) for group in groups)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("a damaged footer") from error


def _chunk(fields: dict[int, Any]) -> Chunk:
    encodings = set(fields[2])
    return Chunk(
        num_values=int(fields[5]),
        size=int(fields[6]),
        num_nulls=fields.get(12, {}).get(3),
        has_dictionary=11 in fields or bool(encodings & _DICTIONARY_ENCODINGS),
        has_shared_beginnings=_DELTA_BYTE_ARRAY in encodings,
    )


class _Thrift:
    """Reads consecutive values of the compact protocol."""

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
    """Return the base 64 characters that a text determines if it starts at `offset` (modulo 3).

    The first and last character may also depend on the bytes around the text; they are left out.
    """
    encoded = base64.b64encode(bytes(offset) + text)
    return encoded[-(-offset * 8 // 6) : (offset + len(text)) * 8 // 6]


_SPELLINGS = (EXTENSION_KEY, *(_in_base64(EXTENSION_KEY, offset) for offset in range(3)))


def _extension_types(footer: bytes) -> list[tuple[str, str]]:
    """Return pairs of column and extension type; empty if the stored schema cannot be read."""
    found = re.search(rb"/////[A-Za-z0-9+/]+={0,2}", footer)  # the start of the stored Arrow schema
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

"""Columns of entities: in tables, in knowledge bases, and read from a mapped file.

Arrow would follow damaged offsets of a mapped file and crash. `StringColumn` and `ListColumn` read
and check only the offsets of requested values, so that opening millions of them takes no time.

Shapes: S entities.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.storage.columns import BOOLEAN, FEATURES, IDENTIFIER, NUMBER, PICTURE, TEXT, Column

ENTITY_SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.large_string()),
        pa.field("name", pa.large_string()),
        pa.field("description", pa.large_string()),
        pa.field("popularity", pa.float64()),
        pa.field("language", pa.large_string()),  # of name and description
        pa.field("image_uri", pa.list_(pa.large_string())),
        pa.field("aliases", pa.list_(pa.large_string())),
    ]
)
# Columns that are not stored in a knowledge base: the evidence index has what is computed of them.
PICTURE_COLUMNS = {
    "image_bytes": Column.one_or_list_of(PICTURE),
    "image_features": Column.one_or_list_of(FEATURES),
}
ENTITY_COLUMNS = {
    "entity_id": IDENTIFIER,
    "name": IDENTIFIER,  # a name may be a number, such as 1984
    "aliases": Column.list_of(IDENTIFIER),
    "other_names": Column.list_of(IDENTIFIER),  # also aliases; only when a knowledge base is built
    "description": TEXT,
    "popularity": NUMBER,
    "language": TEXT,
    "image_uri": Column.one_or_list_of(TEXT),
    **PICTURE_COLUMNS,
    "retired": BOOLEAN,  # only in updates
}
# row_by_id sorts the rows by id: its i-th value is the row with the i-th smallest entity id.
_ORDER = [pa.field("name_index", pa.uint32()), pa.field("row_by_id", pa.uint32())]
STORED_SCHEMA = pa.schema([*ENTITY_SCHEMA, *_ORDER])
_EARLIER = {"language": None, "image_uri": pa.field("image_uri", pa.large_string())}  # one address, no language


def earlier_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema with the columns of entities as releases before `language` wrote them."""
    fields = [_EARLIER.get(field.name, field) for field in schema]
    return pa.schema([field for field in fields if field is not None])


def as_stored(entities: pa.Table) -> pa.Table:
    """Return entities that any release wrote with all columns of `ENTITY_SCHEMA`, in its order.

    Other columns follow; missing ones are null.
    """
    columns = {name: entities[name] for name in entities.column_names}
    for field in ENTITY_SCHEMA:
        values = columns.pop(field.name, None)
        if values is None:
            values = pa.nulls(len(entities), field.type)
        columns[field.name] = as_lists(values) if field.type.equals(pa.list_(pa.large_string())) else values
    names = [*ENTITY_SCHEMA.names, *(name for name in columns if name not in ENTITY_SCHEMA.names)]
    return pa.table({name: columns[name] for name in names})


def as_lists(values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return a column of strings as lists of one string, null where the string is; lists as they are."""
    if not pa.types.is_string(values.type) and not pa.types.is_large_string(values.type):
        return values
    flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    offsets = np.concatenate([[0], np.cumsum(pc.is_valid(flat).to_numpy(zero_copy_only=False))]).astype(np.int32)
    mask = pc.is_null(flat) if flat.null_count else None
    return pa.ListArray.from_arrays(
        pa.array(offsets), flat.drop_null().cast(pa.large_string()), pa.list_(pa.large_string()), mask=mask
    )


def all_aliases(aliases: Iterable[str] | None, other_names: Iterable[str] | None) -> list[str]:
    """Return aliases, then those of other names that are not among them."""
    return list(dict.fromkeys([*(aliases or ()), *(other_names or ())]))


class StringColumn:
    """The strings of a column in a mapped file, with checked offsets; a null is an empty string."""

    def __init__(self, column: pa.LargeStringArray) -> None:
        _, offsets, text = column.buffers()
        self._offsets: NDArray[np.int64] = _numbers(offsets, np.int64, len(column) + 1)
        self._text = memoryview(text or b"")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        try:
            start, stop = self._offsets[row : int(row) + 2].tolist()
            if not 0 <= start <= stop <= len(self._text):
                raise ValueError(f"a string from {start} to {stop} of {len(self._text)} bytes")
            return str(self._text[start:stop], "utf-8")
        except ValueError as error:
            raise ArtifactError(f"row {row} of the knowledge base is damaged ({error}); build it again") from error


class ListColumn:
    """The lists of strings of a column in a mapped file, with checked offsets."""

    def __init__(self, column: pa.ListArray) -> None:
        self._offsets: NDArray[np.int32] = _numbers(column.buffers()[1], np.int32, len(column) + 1)
        self._strings = StringColumn(column.values)

    def __getitem__(self, row: int) -> tuple[str, ...]:
        start, stop = self._offsets[row : int(row) + 2].tolist()
        if not 0 <= start <= stop <= len(self._strings):
            raise ArtifactError(
                f"row {row} of the knowledge base is damaged (a list from {start} to {stop} of {len(self._strings)} "
                "strings); build it again"
            )
        return tuple(string for string in map(self._strings.__getitem__, range(start, stop)) if string)


def _numbers(buffer: pa.Buffer | None, dtype: type[np.int32] | type[np.int64], count: int) -> NDArray[Any]:
    if count == 1 and not buffer:  # Arrow may leave out the one offset of no values
        return np.zeros(1, dtype)
    try:
        return np.frombuffer(memoryview(buffer or b""), dtype, count)
    except ValueError as error:
        raise ArtifactError(f"strings of the knowledge base are damaged ({error}); build it again") from error

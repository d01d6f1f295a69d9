"""One open Parquet file: a checked footer, and rows in pieces of bounded size."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gemel_engine.errors import InputError
from gemel_engine.storage.column_names import explain_unparsed, missing_columns, stored_names
from gemel_engine.storage.columns import Column, is_any_list, list_depth
from gemel_engine.storage.files import SUFFIXES, InputFile
from gemel_engine.storage.local import is_of_system
from gemel_engine.storage.parquet_footer import read_chunks
from gemel_engine.storage.parsing import is_parsed, parse

_ALWAYS_ALLOWED = 256 << 20
_EXPANSION = 100
_PIECE_BYTES = 64 << 20
_ROWS_PER_PIECE = 1 << 16
_ROWS_PER_TAKE = 256  # few, because most rows are dropped and may contain pictures
_BYTES_PER_REQUEST = 8 << 20
_MAX_COLUMNS = 10_000
_PICTURE, _ADDRESS = "image_bytes", "image_uri"


class Table:
    """An open Parquet file whose footer has been checked; a context manager.

    Attributes:
        file: Address, size and version of the file.
        names: Names of the columns, by which they are read: those of `columns`, whatever they are
            called in the file, then the file's other names. Pictures stored as {bytes, path} also
            give a column `image_uri`.
        num_rows: Number of rows.
    """

    def __init__(
        self,
        source: pa.NativeFile,
        file: InputFile,
        columns: Mapping[str, Column] | None = None,
        required: Sequence[str] = (),
        *,
        is_text: bool = False,
    ) -> None:
        """Check a file.

        Args:
            source: Content of the file; closed with this object.
            file: Address, size and version of the file.
            columns: Columns that can be read, by name; None for all columns, as they are stored.
            required: Columns that the file must have.
            is_text: Whether the content is the copy of a table in text, see `storage.text`: numbers
                and lists are then parsed.

        Raises:
            InputError: The file is not Parquet, has an extension type, lacks a column, has one
                twice or of another type, or would take too much memory for its size.
        """
        self.file = file
        self._source = source
        self._is_text = is_text
        with explain_unreadable(file.uri):
            self._chunks = read_chunks(source)
            self._parquet = self._open()
            self._schema: pa.Schema = self._parquet.schema_arrow
            self._metadata: pq.FileMetaData = self._parquet.metadata
            self._stored = stored_names(self._schema, columns)
            theirs = {*self._stored.values(), *self._stored}
            self.names = [*self._stored, *(name for name in self._schema.names if name not in theirs)]
            self.num_rows: int = self._metadata.num_rows
            groups = [self._metadata.row_group(group) for group in range(self._metadata.num_row_groups)]
        self._ends = np.cumsum([0, *(group.num_rows for group in groups)])
        self._check_columns(columns, required)
        self._check_sizes()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._source.close()

    @property
    def parsed(self) -> list[str]:
        """Return the names of the columns whose text is parsed, which can fail."""
        return [name for name, field in self._fields.items() if self._is_text and is_parsed(field.type)]

    @property
    def stored_schema(self) -> pa.Schema:
        """Return the schema of all columns as they are stored, with the file's own metadata."""
        return self._schema

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """Return the schema of those of `columns` that the file has, with the types of reading."""
        return pa.schema([self._fields[name] for name in dict.fromkeys(columns) if name in self._fields])

    def pieces(
        self, columns: Sequence[str], rows: range | None = None, max_rows: int = _ROWS_PER_PIECE
    ) -> Iterator[pa.Table]:
        """Yield consecutive rows in pieces.

        Args:
            columns: Columns to read; those that the file lacks are left out.
            rows: Row numbers to read; None for all rows.
            max_rows: Maximum number of rows in a piece.

        Raises:
            InputError: The file is damaged, or takes too much memory.
        """
        schema = self.schema(columns)
        rows = range(self.num_rows) if rows is None else rows
        stored = [name for name in schema.names if name in self._stored]
        if _ADDRESS in schema.names and _PICTURE not in stored and self._has_picture_structs():
            stored.append(_PICTURE)
        for group, (first, end) in enumerate(zip(self._ends[:-1].tolist(), self._ends[1:].tolist(), strict=True)):
            if first == end or end <= rows.start or first >= rows.stop:
                continue
            with explain_unreadable(self.file.uri):
                num_rows = self._rows_per_piece(group, stored, max_rows)
                physical = list(dict.fromkeys(self._stored[name] for name in stored))
                for batch in self._reader.iter_batches(num_rows, row_groups=[group], columns=physical):
                    start, stop = max(rows.start - first, 0), min(rows.stop - first, len(batch))
                    if start < stop:
                        yield self._converted(batch.slice(start, stop - start), schema, stored, first + start)
                    first += len(batch)
                    if first >= rows.stop:
                        break
            if first < min(end, rows.stop):
                raise InputError(f"{self.file.uri} lacks rows that its footer promises: write it again")

    def read(self, columns: Sequence[str] | None = None, rows: range | None = None) -> pa.Table:
        """Read consecutive rows into one table; arguments and errors are those of `pieces`."""
        columns = self.names if columns is None else columns
        tables, num_bytes = [self.schema(columns).empty_table()], 0
        for piece in self.pieces(columns, rows):
            num_bytes += piece.nbytes
            self._check_bytes(num_bytes, "rows that are read at once")
            tables.append(piece)
        return pa.concat_tables(tables)

    def take(self, columns: Sequence[str], rows: NDArray[np.int64], max_rows: int = _ROWS_PER_TAKE) -> pa.Table:
        """Read rows by ascending row numbers; only row groups that contain one of them are read."""
        return pa.concat_tables([self.schema(columns).empty_table(), *self.taken(columns, rows, max_rows)])

    def taken(
        self, columns: Sequence[str], rows: NDArray[np.int64], max_rows: int = _ROWS_PER_PIECE
    ) -> Iterator[pa.Table]:
        """Yield what `take` reads, in pieces."""
        for first, end in zip(self._ends[:-1].tolist(), self._ends[1:].tolist(), strict=True):
            wanted = rows[slice(*np.searchsorted(rows, (first, end)))]
            if not len(wanted):
                continue
            for piece in self.pieces(columns, range(first, int(wanted[-1]) + 1), max_rows):
                here = slice(*np.searchsorted(wanted, (first, first + len(piece))))
                yield piece.take(pa.array(wanted[here] - first))
                first += len(piece)

    def may_have_nulls(self, name: str) -> bool:
        """Return whether a column may have nulls or empty lists, by the footer alone."""
        places = [place for place, leaf in self._leaves([name]) if not leaf.path.endswith(".path")]  # of a picture
        return not places or any(chunks[place].num_nulls != 0 for chunks in self._chunks for place in places)

    def _open(self, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        """Open the file; the physical columns `dictionaries` are read as dictionaries."""
        return pq.ParquetFile(
            self._source,
            metadata=self._metadata if dictionaries else None,
            read_dictionary=list(dictionaries),
            pre_buffer=False,  # would hold all pages of a row group
            buffer_size=_BYTES_PER_REQUEST,
            arrow_extensions_enabled=False,
        )

    @cached_property
    def _reader(self) -> pq.ParquetFile:
        """Reader of texts in lists as dictionaries, so that their size is known before decoding."""
        in_lists = [leaf for _, leaf in self._leaves(self._fields) if leaf.max_repetition_level]
        nested = [leaf.path for leaf in in_lists if leaf.physical_type == "BYTE_ARRAY"]
        return self._open(nested) if nested else self._parquet

    def _leaves(self, names: Collection[str]) -> list[tuple[int, pq.ColumnSchema]]:
        """Return the physical columns of some columns, with their indexes."""
        names = {self._stored[name] for name in names if name in self._stored}
        leaves = ((place, self._metadata.schema.column(place)) for place in range(self._metadata.num_columns))
        return [(place, leaf) for place, leaf in leaves if leaf.path in names or leaf.path.partition(".")[0] in names]

    def _check_columns(self, columns: Mapping[str, Column] | None, required: Sequence[str]) -> None:
        uri, num_columns = self.file.uri, self._metadata.num_columns
        is_complete = [len(chunks) for chunks in self._chunks] == [num_columns] * self._metadata.num_row_groups
        if not is_complete or self._ends[-1] != self.num_rows or num_columns > _MAX_COLUMNS:
            raise InputError(
                f"{uri} has {num_columns} columns, in row groups that lack some or of {self._ends[-1]} of its "
                f"{self.num_rows} rows: write it again, with {_MAX_COLUMNS} columns at most"
            )
        stored = {field.name: field.remove_metadata() for field in self._schema} if columns is None else {}
        columns = {name: Column(field.type, str(field.type)) for name, field in stored.items()} | dict(columns or {})
        if missing := [name for name in required if name not in self.names]:
            names = [(columns[name].stored_names or (name,))[0] if name in columns else name for name in missing]
            raise missing_columns(uri, names, self._schema.names)
        for name, theirs in self._stored.items():
            if (count := self._schema.names.count(theirs)) > 1:
                raise InputError(f"{uri} has the column {theirs!r} {count} times: keep one")
            found = self._schema.field(theirs).type
            if not columns[name].takes(found) and not (self._is_text and is_parsed(columns[name].type)):
                raise InputError(
                    f"{uri}: column {theirs!r} is of type {found}, it must be {columns[name].expected}: cast it"
                )
        if _PICTURE in columns and _ADDRESS in columns and self._has_picture_structs() and _ADDRESS not in self.names:
            self.names.append(_ADDRESS)
        self._fields = {
            name: stored.get(name, pa.field(name, columns[name].type)) for name in self.names if name in columns
        }

    def _has_picture_structs(self) -> bool:
        stored = self._stored.get(_PICTURE)
        return stored is not None and pa.types.is_struct(self._schema.field(stored).type)

    def _check_sizes(self) -> None:
        """Raise if a column of a row group expands too far: pages of zeros, millions of nulls."""
        sizes = (
            (max(chunks[place].size, 8 * (chunks[place].num_values - num_rows)), leaf.path, num_rows)
            for place, leaf in self._leaves(self._fields)
            for chunks, num_rows in zip(self._chunks, np.diff(self._ends).tolist(), strict=True)
        )
        size, path, num_rows = max(sizes, default=(0, "", 0))
        self._check_bytes(size, f"column {path.partition('.')[0]!r} of {num_rows} rows")

    def _check_bytes(self, size: int, what: str) -> None:
        check_memory(self.file.uri, size, self._source.size(), what)

    def _rows_per_piece(self, group: int, names: Sequence[str], max_rows: int) -> int:
        """Return the number of rows that fit into `_PIECE_BYTES`.

        A row counts with its own average size and the largest values that rows may share.
        """
        num_rows, largest, own = self._ends[group + 1] - self._ends[group], 0, 0
        for place, leaf in self._leaves(names):
            largest += self._largest_shared(group, place, leaf)
            own += max(0, self._chunks[group][place].size) // num_rows
        for found in (self._schema.field(self._stored[name]).type for name in names):
            if pa.types.is_fixed_size_list(found):  # a null takes room for its items too
                largest += 8 * found.list_size
        self._check_bytes(largest, "a single row")
        return int(max(1, min(max_rows, _PIECE_BYTES // max(1, largest + own))))

    def _largest_shared(self, group: int, place: int, leaf: pq.ColumnSchema) -> int:
        """Return the maximum size in bytes of a value stored once for many rows; 0 if none is."""
        chunk = self._chunks[group][place]
        if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY":
            return int(leaf.length)
        if leaf.physical_type != "BYTE_ARRAY":
            return 0
        if chunk.has_shared_beginnings:
            return chunk.size
        if leaf.max_repetition_level or not chunk.has_dictionary:
            return 0
        (values, *_) = next(self._open([leaf.path]).iter_batches(1, row_groups=[group], columns=[leaf.path])).columns
        while pa.types.is_struct(values.type):
            values = values.field(0)
        return int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0)

    def _converted(self, batch: pa.RecordBatch, schema: pa.Schema, stored: Sequence[str], first: int) -> pa.Table:
        """Convert rows from number `first` to the types of `schema`, from its columns `stored`."""
        columns = {name: batch.column(self._stored[name]) for name in stored}
        for name in set(stored).intersection(self.parsed):
            with explain_unparsed(self.file.uri, self._stored[name], first):
                columns[name] = parse(columns[name], schema.field(name).type)
        if self._has_picture_structs() and _PICTURE in columns:
            pictures = columns[_PICTURE]
            columns[_PICTURE] = file = pc.struct_field(pictures, "bytes")
            if _ADDRESS in schema.names and pictures.type.get_field_index("path") >= 0:
                kind = schema.field(_ADDRESS).type
                path = pc.if_else(pc.is_null(file), pc.struct_field(pictures, "path"), None)
                address = self._convert(columns.get(_ADDRESS, pa.nulls(len(batch))), kind)
                columns[_ADDRESS] = pc.coalesce(address, self._convert(path, kind))
        nulls = pa.nulls(len(batch))  # addresses, if structs have none
        return pa.table(
            [
                self._convert(columns.get(name, nulls), kind)
                for name, kind in zip(schema.names, schema.types, strict=True)
            ],
            schema=schema,
        )

    def _convert(self, values: pa.Array, wanted: pa.DataType) -> pa.Array:
        """Convert values of a type that `Column.takes` accepts to the type of the column."""
        if values.type == wanted:
            return values
        if pa.types.is_dictionary(values.type):
            if pa.types.is_binary(values.dictionary.type) or pa.types.is_string(values.dictionary.type):
                lengths = pc.binary_length(values.dictionary).take(values.indices)
                self._check_bytes(pc.sum(lengths.cast(pa.int64())).as_py() or 0, "rows that are read at once")
            return self._convert(values.dictionary, wanted).take(values.indices)  # checks the indices
        if list_depth(values.type) < list_depth(wanted) and not pa.types.is_null(values.type):  # an item, no list
            offsets = pa.array(np.concatenate([[0], np.cumsum(pc.is_valid(values).to_numpy(zero_copy_only=False))]))
            items = self._convert(values.drop_null(), wanted.value_type)
            mask = pc.is_null(values) if values.null_count else None
            return pa.ListArray.from_arrays(offsets.cast(pa.int32()), items, wanted, mask=mask)
        if is_any_list(values.type) and is_any_list(wanted):
            lengths = pc.if_else(pc.is_null(values), 0, pc.list_value_length(values)).to_numpy(zero_copy_only=False)
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            items = self._convert(values.flatten(), wanted.value_type)
            mask = pc.is_null(values) if values.null_count else None
            return pa.ListArray.from_arrays(offsets, items, pa.list_(wanted.value_field), mask=mask).cast(wanted)
        if pa.types.is_struct(values.type) and pa.types.is_large_binary(wanted):  # a picture {bytes, path}
            return self._convert(pc.struct_field(values, "bytes"), wanted)
        if pa.types.is_struct(values.type) and pa.types.is_struct(wanted):
            items = [
                self._convert(pc.struct_field(values, field.name), field.type)
                if values.type.get_field_index(field.name) >= 0
                else pa.nulls(len(values), field.type)
                for field in wanted
            ]
            return pa.StructArray.from_arrays(items, fields=list(wanted), mask=pc.is_null(values))
        return pc.cast(values, options=pc.CastOptions(target_type=wanted, allow_invalid_utf8=True))


def check_memory(uri: str, num_bytes: int, stored_bytes: int, what: str) -> None:
    """Raise if data would take too much memory for its stored size."""
    if num_bytes > max(_ALWAYS_ALLOWED, _EXPANSION * stored_bytes):
        raise InputError(
            f"{uri}: {what} would take {num_bytes >> 20:,} MiB of memory, more than {_ALWAYS_ALLOWED >> 20} MiB and "
            f"{_EXPANSION} times the file's size: write shorter values, or lower rows_per_shard"
        )


@contextmanager
def explain_unreadable(uri: str) -> Iterator[None]:
    """Convert Arrow's errors for an unreadable file to InputError, but for errors of disk or network."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        if is_of_system(error):
            raise
        if isinstance(error, OSError) and error.errno == errno.EBUSY:  # of s3fs, if the ETag is another
            raise InputError(f"{uri} was replaced while it was read: run the same command again") from error
        remedy = "write it again" if uri.lower().endswith(SUFFIXES) else "name it *.csv, *.tsv or *.jsonl if it is one"
        raise InputError(f"{uri} is not a readable Parquet table ({error}): {remedy}") from error

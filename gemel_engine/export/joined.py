"""Joins the answers of a finished run with the rows of its input, in the order of the input.

A run's rows are in another order than those of its input. Both may be larger than the memory: only
the identifiers and the places of the rows are held in it. The answers are written to a temporary
Arrow file, from which the operating system reads the pages that are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.errors import InputError, shown
from gemel_engine.pipeline.output import RunDirectory, load_claim
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column
from gemel_engine.storage.table import Table
from gemel_engine.types import PREDICTION_COLUMNS, PREDICTION_SCHEMA, mention_columns

ANSWER_COLUMNS = (
    "entity_id",
    "entity_name",
    "score",
    "log_prob",
    "decided_by",
    "confidence",
    "probability",
    "margin",
    "certified",
    "nil_probability",
    "is_nil",
    "candidates",
    "error",
)
GOLD_COLUMNS = {"entity_id": "gold_entity_id", "entity_name": "gold_entity_name"}
_ROWS_PER_BATCH = 1 << 16
_LARGE_COLUMNS = ("image_bytes", "image_features")


class StoredRows:
    """Rows in a temporary Arrow file, which are read by their numbers.

    Args:
        path: The file, written by `store`.
    """

    def __init__(self, path: Path) -> None:
        self._reader = parquet.open_arrow(path)
        batches = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        self._ends = np.cumsum([0, *(len(batch) for batch in batches)])
        self.num_rows = int(self._ends[-1])

    @classmethod
    def store(cls, path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> Self:
        """Write tables to a file, and open it."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for table in tables:
                writer.write_table(table.combine_chunks(), _ROWS_PER_BATCH)
        return cls(path)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column, which stays in the file."""
        batches = (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))
        return pa.chunked_array([batch.column(name) for batch in batches], self._reader.schema.field(name).type)

    def take(self, rows: NDArray[np.int64]) -> pa.Table:
        """Return rows in the order of their numbers in `rows`."""
        numbers = np.searchsorted(self._ends, rows, "right") - 1
        order = np.argsort(numbers, kind="stable")
        cuts = np.flatnonzero(np.diff(numbers[order])) + 1
        parts = [
            self._reader.get_batch(int(numbers[places[0]])).take(
                pa.array(rows[places] - self._ends[numbers[places[0]]])
            )
            for places in np.split(order, cuts)
            if len(places)
        ]
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.Table.from_batches(parts, self._reader.schema).combine_chunks().take(pa.array(back))


class JoinedRun:
    """The rows of a run's input, each with its answer.

    Args:
        output: Output directory of a finished run.
        scratch: Local directory for temporary files.
        columns: Columns of the input to join; None: all but pictures, features and other bytes.

    Attributes:
        schema: Columns of the input, then `ANSWER_COLUMNS`. Columns of both names are those of the
            answers; the input's are `gold_entity_id`, `gold_entity_name` and `input_` with their
            names, again and again until no other column has it.
        source: Address of the input.

    Raises:
        InputError: The run has not finished, or its input is missing or has changed.
    """

    def __init__(self, output: str, scratch: Path, columns: Sequence[str] | None = None) -> None:
        directory = RunDirectory(output.rstrip("/"))
        if not storage.exists(directory.report):
            raise InputError(f"{shown(output)} has no _report.json: name the output of a linking run that has finished")
        settings = load_claim(directory.output).get("settings") or {}
        source = settings.get("input")
        if not isinstance(source, str):
            raise InputError(f"{shown(directory.claim)} is not of a linking run: name the output of one")
        self.source, self._columns = source, columns
        self._stored_names = {name: theirs for name, theirs in (settings.get("columns") or {}).items() if theirs}
        self._names = self._input_schema()
        answers = pa.schema([PREDICTION_SCHEMA.field(name) for name in ("mention_id", *ANSWER_COLUMNS)])
        self._answers = StoredRows.store(scratch / "answers.arrow", answers, _answers(directory.data, answers))
        self._places = self._joined_places()
        self.schema = pa.schema(
            [field.with_name(name) for field, name in zip(self._names, _joined_names(self._names.names), strict=True)]
            + [PREDICTION_SCHEMA.field(name) for name in ANSWER_COLUMNS]
        )

    @property
    def num_rows(self) -> int:
        """Return the number of mentions."""
        return len(self._places)

    def pieces(self) -> Iterator[pa.Table]:
        """Yield all rows in pieces, with the columns of `schema`."""
        first = 0
        for table in self._open():
            for piece in table.pieces(self._names.names, max_rows=_ROWS_PER_BATCH):
                rows = [
                    piece[field.name].cast(field.type)
                    if field.name in piece.column_names
                    else _nulls(piece, field.type)
                    for field in self._names
                ]
                answers = self._answers.take(self._places[first : first + len(piece)])
                yield pa.table(rows + [answers[name] for name in ANSWER_COLUMNS], schema=self.schema)
                first += len(piece)

    def _open(self) -> Iterator[Table]:
        """Yield the files of the input, with known columns in their types and others as stored."""
        known = mention_columns(self._stored_names)
        theirs = set(self._stored_names.values())
        for stored in parquet.open_tables(self.source):
            others = {
                field.name: Column(field.type, str(field.type))
                for field in stored.stored_schema
                if field.name not in theirs
            }
            with parquet.open_table(stored.file.uri, others | known, ["mention_id"], file=stored.file) as table:
                yield table

    def _input_schema(self) -> pa.Schema:
        schemas = []
        for table in self._open():
            names = table.names if self._columns is None else self._columns
            schemas.append(pa.schema([_without_views(field) for field in table.schema(names) if not _is_large(field)]))
        return pa.unify_schemas(schemas, promote_options="permissive")

    def _joined_places(self) -> NDArray[np.int64]:
        """Return the row of each input row among the answers (N,)."""
        of_input = [piece["mention_id"] for table in self._open() for piece in table.pieces(["mention_id"])]
        ids = pa.chunked_array([chunk for column in of_input for chunk in column.chunks], pa.large_string())
        places = pc.index_in(ids, value_set=self._answers.column("mention_id").cast(pa.large_string()))
        if places.null_count or len(places) != self._answers.num_rows:
            raise InputError(
                f"{shown(self.source)} has {len(places)} mentions, of which the run links "
                f"{len(places) - places.null_count}, and the run has {self._answers.num_rows} rows: put the input back "
                "as it was, or link it again"
            )
        return np.asarray(places.to_numpy(), np.int64)


def _joined_names(names: Sequence[str]) -> list[str]:
    """Return the names of an input's columns beside the answers, no two of them the same."""
    taken = {*ANSWER_COLUMNS, *(GOLD_COLUMNS[name] for name in names if name in GOLD_COLUMNS)}
    joined: list[str] = []
    for name in names:
        free = name
        while free in taken or (free != name and free in names):
            free = f"input_{free}"
        joined.append(GOLD_COLUMNS.get(name, free))
        taken.add(joined[-1])
    return joined


def _answers(directory: str, schema: pa.Schema) -> Iterator[pa.Table]:
    for table in parquet.open_tables(directory, PREDICTION_COLUMNS, ["mention_id"]):
        for piece in table.pieces(schema.names):
            columns = [
                piece[field.name] if field.name in piece.column_names else _nulls(piece, field.type) for field in schema
            ]
            yield pa.table(columns, schema=schema)


def _without_views(field: pa.Field) -> pa.Field:
    """Return a field of plain text for one of views, which are neither merged nor written to CSV."""
    return field.with_type(pa.string()) if field.type == pa.string_view() else field


def _nulls(table: pa.Table, kind: pa.DataType) -> pa.Array:
    return pa.nulls(table.num_rows, kind)


def _is_large(field: pa.Field) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return field.name in _LARGE_COLUMNS or any(is_kind(field.type) for is_kind in kinds)

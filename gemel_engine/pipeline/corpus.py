"""The corpus of a run, cut into shards, the units of work and of output.

A shard is a range of rows of one file, either of the input or of the ordered corpus (see
`pipeline.output`). The plan of a run is the list of its shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.errors import InputError, shown
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column
from gemel_engine.storage.files import text_format
from gemel_engine.storage.table import Table
from gemel_engine.types import MENTION_COLUMNS, MENTION_REQUIRED_COLUMNS, mention_columns

if TYPE_CHECKING:
    from gemel_engine.config.settings import JobConfig

Config = TypeVar("Config", bound="JobConfig")

# The columns of the ordered corpus, and all columns that linking reads.
SMALL_SCHEMA = pa.schema(
    [
        (name, MENTION_COLUMNS[name].type)
        for name in ("mention_id", "text", "mention", "mention_start", "candidate_ids", "group", "image_uri")
    ]
)
# The default of `rows_per_shard`: enough shards to see a run move, of rows that fill a batch of the engine.
_NUM_SHARDS, _LEAST_ROWS_PER_SHARD, _MOST_ROWS_PER_SHARD = 32, 64, 1024
_COLUMNS = (*SMALL_SCHEMA.names, "image_bytes", "image_features")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start` to `stop` - 1 of an input file, as it was when the run was planned.

    Attributes:
        index: Position in the plan, from 0.
        uri: Address of the file.
        version: Version of the file, see `version_of`.
        start: First row.
        stop: Row after the last.
        ids: `ids_digest` of its mentions; empty if the digest is not checked.
        columns: The file's names of columns that have another name there, as JSON; empty: none.
    """

    index: int
    uri: str
    version: str
    start: int
    stop: int
    ids: str = ""
    columns: str = ""

    @property
    def name(self) -> str:
        """Return the name of its output file, without extension."""
        return f"shard-{self.index:05d}"


def plan_shards(
    input_uri: str,
    rows_per_shard: int | None,
    also_required: Sequence[str] = (),
    stored_names: Mapping[str, str] | None = None,
    *,
    columns: Mapping[str, Column] = MENTION_COLUMNS,
    required: Sequence[str] = MENTION_REQUIRED_COLUMNS,
) -> list[Shard]:
    """Validate the columns and ids of a corpus and cut it into shards.

    Args:
        input_uri: Table of mentions, or of rows with other columns, or directory of tables.
        rows_per_shard: Maximum number of rows of a shard; None: a shard for each file.
        also_required: Columns that this run requires beside those that every run requires.
        stored_names: The corpus' names of columns that have another name there; it must have them.
        columns: Columns that the corpus may have.
        required: Columns that every run requires; the first is the id.

    Raises:
        InputError: A column is missing, repeated or of the wrong type, a file cannot be read, or an
            id is missing, repeated or not UTF-8.
    """
    shards: list[Shard] = []
    id_column = required[0]
    ids = _UniqueIds(input_uri, id_column)
    stored_names = stored_names or {}
    names = json.dumps(stored_names, sort_keys=True) if stored_names else ""
    for table in _tables(input_uri, also_required, stored_names, columns, required):
        chunks: list[pa.Array] = []
        for piece in table.pieces([id_column, *table.parsed]):  # raises here what stages would
            ids.add(piece[id_column])
            chunks += piece[id_column].chunks
        of_file, num_rows = pa.chunked_array(chunks, pa.large_string()), rows_per_shard or max(1, table.num_rows)
        cut = cut_file(table.file.uri, version_of(table.file), table.num_rows, num_rows, len(shards))
        shards += [replace(shard, ids=ids_digest(of_file[shard.start : shard.stop]), columns=names) for shard in cut]
    ids.check()
    return shards


def with_rows_per_shard(config: Config, *inputs: str) -> Config:
    """Return a configuration whose `rows_per_shard` is a number, by the number of input rows."""
    if config.rows_per_shard is not None:
        return config
    num_rows = sum(table.num_rows for uri in inputs for table in parquet.open_tables(uri, {}))
    at_least = max(_LEAST_ROWS_PER_SHARD, getattr(config.language_model, "max_num_seqs", 0))
    rows_per_shard = max(at_least, min(_MOST_ROWS_PER_SHARD, -(-num_rows // _NUM_SHARDS)))
    return replace(config, rows_per_shard=rows_per_shard)


def check_columns(input_uri: str, also_required: Sequence[str], stored_names: Mapping[str, str]) -> None:
    """Check the columns of a corpus' first file: quick, before anything that takes seconds to import.

    Arguments and errors are those of `plan_shards`.
    """
    next(_tables(input_uri, also_required, stored_names))


def _tables(
    input_uri: str,
    also_required: Sequence[str],
    stored_names: Mapping[str, str],
    columns: Mapping[str, Column] = MENTION_COLUMNS,
    required: Sequence[str] = MENTION_REQUIRED_COLUMNS,
) -> Iterator[Table]:
    names = list(dict.fromkeys((*required, *also_required, *stored_names)))
    return parquet.open_tables(input_uri, mention_columns(stored_names, columns=columns), names)


def order_by_surface_form(plan: Sequence[Shard]) -> NDArray[np.int64] | None:
    """Return the position of each row in the corpus sorted by surface form and `mention_id` (N,).

    Rows are counted in the order of the plan. Only these two columns are read. Return None if a
    file contains pictures or image features: rows of that size are not sorted.
    """
    tables = []
    for uri, columns in _files(plan):
        with parquet.open_table(uri, columns) as table:
            if not {"image_bytes", "image_features"}.isdisjoint(table.names):
                return None
            tables.append(table.read(["mention", "mention_id"]))
    order = pc.sort_indices(
        pa.concat_tables(tables), sort_keys=[("mention", "ascending"), ("mention_id", "ascending")]
    ).to_numpy()
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    return places


def order_within_shards(plan: Sequence[Shard]) -> NDArray[np.int64]:
    """Return row numbers in the order of linking if the corpus is not sorted (N,)."""
    orders, first = [], 0
    for (uri, columns), of_file in zip(_files(plan), _by_file(plan), strict=True):
        with parquet.open_table(uri, columns) as table:
            mentions = table.read(["mention"])["mention"]
        for shard in of_file:
            within = pc.sort_indices(mentions.slice(shard.start, shard.stop - shard.start)).to_numpy()
            orders.append(first + within.astype(np.int64))
            first += len(within)
    return np.concatenate(orders)


def take_rows(plan: Sequence[Shard], rows: NDArray[np.int64]) -> pa.Table:
    """Return the columns that linking reads, for ascending row numbers in the plan."""
    tables, first = [], 0
    for uri, columns in _files(plan):
        with parquet.open_table(uri, columns) as table:
            wanted = rows[(rows >= first) & (rows < first + table.num_rows)] - first
            tables.append(table.take(_COLUMNS, wanted))
            first += table.num_rows
    return pa.concat_tables(tables, promote_options="default")


def recut(plan: Sequence[Shard], rows_per_shard: int) -> list[Shard]:
    """Return the same rows in the same order, in shards of another size."""
    recut: list[Shard] = []
    for of_file in _by_file(plan):
        last = of_file[-1]
        cut = cut_file(last.uri, last.version, last.stop, rows_per_shard, len(recut))
        recut += [replace(shard, columns=last.columns) for shard in cut]
    return recut


def _by_file(plan: Sequence[Shard]) -> list[list[Shard]]:
    """Return the shards of each file."""
    return [list(of_file) for _, of_file in groupby(plan, key=lambda shard: shard.uri)]


def _files(plan: Sequence[Shard]) -> list[tuple[str, dict[str, Column]]]:
    """Return the address of each file, and its columns."""
    return [(shards[0].uri, _columns_of(shards[0])) for shards in _by_file(plan)]


def _columns_of(shard: Shard, columns: Mapping[str, Column] = MENTION_COLUMNS) -> dict[str, Column]:
    return mention_columns(json.loads(shard.columns or "{}"), columns=columns)


def count_rows(plan: Sequence[Shard]) -> int:
    """Return the number of rows of all shards."""
    return sum(shard.stop - shard.start for shard in plan)


def read_rows(
    shard: Shard,
    columns: Sequence[str],
    *,
    kinds: Mapping[str, Column] = MENTION_COLUMNS,
    id_column: str = MENTION_REQUIRED_COLUMNS[0],
) -> pa.Table:
    """Read those of `columns` that the file has, from the row groups that contain the shard only.

    Args:
        shard: The shard.
        columns: Columns to read.
        kinds: The `columns` that the shard was planned with.
        id_column: Column of the ids.

    Raises:
        InputError: The file has changed since the run was planned.
    """
    check_version(shard)
    of_file = _columns_of(shard, kinds)
    kinds = {name: of_file[name] for name in (id_column, *columns)}
    with parquet.open_table(shard.uri, kinds, (id_column,)) as table:
        rows = table.read(columns, range(shard.start, shard.stop))
    check_version(shard)  # the file may have been replaced during the read
    if shard.ids and id_column in rows.column_names and ids_digest(rows[id_column]) != shard.ids:
        raise _changed(shard)
    return rows


def plan_identity(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """Return the plan as JSON; it is equal for unchanged files that are cut in the same way."""
    return [{name: value for name, value in asdict(shard).items() if name != "columns" or value} for shard in shards]


def ids_digest(ids: pa.ChunkedArray) -> str:
    """Return a hash of mention ids in their order; it does not depend on the Arrow string type."""
    if not len(ids):
        return hashlib.blake2b(digest_size=16).hexdigest()
    array = pa.concat_arrays(ids.cast(pa.large_string()).chunks)
    _, offsets, characters = array.buffers()
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    digest = hashlib.blake2b((ends - ends[0]).tobytes(), digest_size=16)
    digest.update(memoryview(characters or b"")[ends[0] : ends[-1]])
    return digest.hexdigest()


def version_of(file: storage.InputFile) -> str:
    """Return a string that changes with a file's content, without reading the whole file.

    For a local file this is its version with a hash of its Parquet footer, which contains sizes,
    offsets and usually the minimum and maximum of each column. For an object in S3 it is its ETag,
    for a local table in text its version, by which its copy in Parquet is found.
    """
    path = storage.local_path(file.uri)
    if path is None or text_format(file.uri):
        return file.version
    with path.open("rb") as stream:
        stream.seek(max(0, file.size - 8))
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, file.size - 8 - length))
        return f"{file.version}-{hashlib.blake2b(stream.read(), digest_size=16).hexdigest()}"


def check_version(shard: Shard) -> None:
    """Raise InputError if the file of a shard has changed since the run was planned."""
    try:
        versions = [version_of(file) for file in storage.list_tables(shard.uri)]
    except FileNotFoundError:
        versions = []
    if versions != [shard.version]:
        raise _changed(shard)


def _changed(shard: Shard) -> InputError:
    return InputError(f"{shown(shard.uri)} has changed since the run was planned: link it again to a new output")


def cut_file(uri: str, version: str, num_rows: int, rows_per_shard: int, first_index: int) -> list[Shard]:
    """Return the shards of a file, of at most `rows_per_shard` rows, numbered from `first_index`."""
    return [
        Shard(index, uri, version, start, min(start + rows_per_shard, num_rows))
        for index, start in enumerate(range(0, num_rows, rows_per_shard), first_index)
    ]


class _UniqueIds:
    """Collects and validates the ids of a corpus early: repeated ids can exhaust the memory."""

    def __init__(self, uri: str, column: str) -> None:
        self._uri, self._column = uri, column
        self._chunks: list[pa.Array] = []
        self._num_ids = self._num_checked = 0

    def add(self, ids: pa.ChunkedArray) -> None:
        """Add ids; check all ids whenever their number has doubled since the last check."""
        self._chunks += ids.chunks
        self._num_ids += len(ids)
        if self._num_ids >= 2 * self._num_checked:
            self.check()

    def check(self) -> None:
        """Raise if an id is missing, repeated or not UTF-8.

        Raises:
            InputError: Such an id exists, or there are no ids.
        """
        if self._num_checked == self._num_ids > 0:
            return
        ids = pa.chunked_array(self._chunks, pa.large_string())
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(f"{self._uri} has a {self._column} that is not UTF-8 ({error}): write it again") from error
        is_missing = pc.equal(pc.fill_null(ids, ""), "")
        if num_missing := pc.sum(is_missing).as_py():
            first = pc.index(is_missing, True).as_py() + 1
            raise InputError(
                f"{self._uri} has {num_missing} rows without a {self._column}, the first is row {first}: give "
                "each row its own"
            )
        if len(ids) == 0:
            raise InputError(f"{self._uri} has no rows")
        if pc.count_distinct(ids).as_py() < len(ids):
            counts = pc.value_counts(ids)
            repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            examples = [found[:50] for found in repeated[:3].to_pylist()]
            first = pc.index(ids, repeated[0]).as_py() + 1
            second = first + pc.index(ids[first:], repeated[0]).as_py() + 1
            raise InputError(
                f"{self._uri} repeats {len(repeated)} {self._column}, such as {examples}, the first in rows {first} "
                f"and {second}: make them unique"
            )
        self._num_checked = self._num_ids

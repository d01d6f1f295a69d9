"""A run's unit of work and of output: the plan that cuts a corpus into shards, and how a shard is finished.

    OUTPUT/_run.json                        what the run is; created exclusively, so that two different runs can't mix
    OUTPUT/_parts/shard-00003/...           finished rows of an unfinished shard
    OUTPUT/data/shard-00003.parquet         exists if and only if the shard is complete; created exclusively
    OUTPUT/report.json

    OUTPUT/_plan.json                       the shards, where they are not those of the input files; created exclusively
    OUTPUT/_ordered/...                     the corpus in the order of its surface forms, without pictures

A shard is a range of rows of one file: of the input, or of the ordered corpus where that was written. `data/` is a
plain Parquet directory at every moment and holds no row twice: whoever finishes a shard first wins, and a rerun skips
the finished ones. Each shard's footer names its run; `output_check` compares all of them with the plan.
"""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gemel_engine import parquet, storage
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.types import MENTION_COLUMNS, MENTION_REQUIRED_COLUMNS, PREDICTION_COLUMNS, PREDICTION_SCHEMA

# Columns that linking reads: those that are sorted by surface form, and all.
SMALL_SCHEMA = pa.schema(
    [
        (name, MENTION_COLUMNS[name].type)
        for name in ("mention_id", "text", "mention", "mention_start", "candidate_ids", "group", "image_uri")
    ]
)
_COLUMNS = (*SMALL_SCHEMA.names, "image_bytes", "image_features")
RUN_KEY = b"gemel_run"  # in the metadata of a shard's footer


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `start` to `stop` - 1 of an input file, as it was when the run was planned.

    Attributes:
        index: Position in the plan, from 0.
        uri: Address of the file.
        version: Of the file: see `_version`.
        start: First row.
        stop: Row behind the last.
        ids: `ids_digest` of its mentions; empty where only the rows matter.
    """

    index: int
    uri: str
    version: str
    start: int
    stop: int
    ids: str = ""

    @property
    def name(self) -> str:
        """Name of its output, without extension."""
        return f"shard-{self.index:05d}"


def plan_shards(input_uri: str, rows_per_shard: int, also_required: Sequence[str] = ()) -> list[Shard]:
    """Check a corpus by its small columns and cut it into shards.

    Args:
        input_uri: Parquet file or directory of mentions.
        rows_per_shard: At most so many.
        also_required: Columns that this run needs beside those that every run does.

    Raises:
        InputError: A column is missing, of the wrong type or there twice, a file is no Parquet, or a `mention_id` is
            missing, not UTF-8, or stands twice.
    """
    shards: list[Shard] = []
    ids = _UniqueIds(input_uri)
    for table in parquet.open_tables(input_uri, MENTION_COLUMNS, (*MENTION_REQUIRED_COLUMNS, *also_required)):
        chunks: list[pa.Array] = []
        for piece in table.pieces(["mention_id"]):
            ids.add(piece["mention_id"])
            chunks += piece["mention_id"].chunks
        of_file = pa.chunked_array(chunks, pa.large_string())
        cut = _cut(table.file.uri, _version(table.file), table.num_rows, rows_per_shard, len(shards))
        shards += [replace(shard, ids=ids_digest(of_file[shard.start : shard.stop])) for shard in cut]
    ids.check()
    return shards


def order_by_surface_form(plan: Sequence[Shard]) -> NDArray[np.int64] | None:
    """The place of each row, in the order of the plan, in the corpus sorted by surface form and `mention_id`.

    Only these two columns are read. None if a file holds pictures or image features: rows of that size stay where they
    are.
    """
    tables = []
    for uri in dict.fromkeys(shard.uri for shard in plan):
        with parquet.open_table(uri, MENTION_COLUMNS) as table:
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
    """The rows, numbered in the order of the plan, in the order in which they are linked where they stay in place."""
    orders, first = [], 0
    for uri, of_file in groupby(plan, key=lambda shard: shard.uri):
        with parquet.open_table(uri, MENTION_COLUMNS) as table:
            mentions = table.read(["mention"])["mention"]
        for shard in of_file:
            within = pc.sort_indices(mentions.slice(shard.start, shard.stop - shard.start)).to_numpy()
            orders.append(first + within.astype(np.int64))
            first += len(within)
    return np.concatenate(orders)


def take_rows(plan: Sequence[Shard], rows: NDArray[np.int64]) -> pa.Table:
    """All columns that linking reads of some rows, by their numbers in the order of the plan, which must rise."""
    tables, first = [], 0
    for uri in dict.fromkeys(shard.uri for shard in plan):
        with parquet.open_table(uri, MENTION_COLUMNS) as table:
            wanted = rows[(rows >= first) & (rows < first + table.num_rows)] - first
            tables.append(table.take(_COLUMNS, wanted))
            first += table.num_rows
    return pa.concat_tables(tables, promote_options="default")


def recut(plan: Sequence[Shard], rows_per_shard: int) -> list[Shard]:
    """The same rows in the same order, in shards of another size."""
    recut: list[Shard] = []
    for (uri, version), of_file in groupby(plan, key=lambda shard: (shard.uri, shard.version)):
        recut += _cut(uri, version, list(of_file)[-1].stop, rows_per_shard, len(recut))
    return recut


def num_rows(plan: Sequence[Shard]) -> int:
    """Return the number of rows of all shards."""
    return sum(shard.stop - shard.start for shard in plan)


def save_plan(output: str, plan: Sequence[Shard]) -> list[Shard]:
    """Note the shards of a run, unless another run was first; returns those that are noted."""
    storage.create_exclusive(f"{output}/_plan.json", json.dumps(plan_identity(plan)).encode())
    noted = load_plan(output, num_rows(plan))
    assert noted is not None, "created just now, or before"
    return noted


def load_plan(output: str, expected_rows: int) -> list[Shard] | None:
    """Return the shards that `save_plan` noted, if it did.

    Raises:
        InputError: What it noted is damaged, or is not of `expected_rows` rows.
    """
    uri = f"{output}/_plan.json"
    if not storage.exists(uri):
        return None
    remedy = "remove it and run the same command again"
    found = storage.read_json(uri, remedy)
    try:
        plan = [Shard(**fields) for fields in found]
        is_whole = num_rows(plan) == expected_rows and [shard.index for shard in plan] == list(range(len(plan)))
    except TypeError:  # other JSON than `plan_identity` makes
        plan, is_whole = [], False
    if not is_whole:
        raise InputError(f"{shown(uri)} is not the plan of this run's {expected_rows} rows: {remedy}")
    return plan


def read_rows(shard: Shard, columns: Sequence[str]) -> pa.Table:
    """Read a shard's rows, those of `columns` that the file has; only the row groups that hold them are touched.

    Raises:
        InputError: The file has changed since the run was planned.
    """
    _check_version(shard)
    kinds = {name: MENTION_COLUMNS[name] for name in columns}
    with parquet.open_table(shard.uri, kinds, MENTION_REQUIRED_COLUMNS[:1]) as table:
        rows = table.read(columns, range(shard.start, shard.stop))
    _check_version(shard)  # it may have been replaced while it was read
    if shard.ids and "mention_id" in rows.column_names and ids_digest(rows["mention_id"]) != shard.ids:
        raise _changed(shard)
    return rows


def claim_output(output: str, identity: dict[str, Any]) -> None:
    """Make the output this run's, or see that it already is.

    Args:
        output: Directory of the run.
        identity: What makes up the run, as JSON: settings, input files, artifacts.

    Raises:
        ConfigurationError: The output belongs to a run that differs; the message names where.
        InputError: It has shards, but nothing says of which run.
    """
    if data_files(output) and not is_claimed(output):  # in this order: a run claims before it writes shards
        raise InputError(
            f"{shown(output)} has files in data but no _run.json, so that nobody knows of which run they are: remove "
            "them, or choose another output"
        )
    if not storage.create_exclusive(f"{output}/_run.json", _run_json(identity)):
        check_claim(output, identity)


def is_claimed(output: str) -> bool:
    """Whether the output is a run's already."""
    return storage.exists(f"{output}/_run.json")


def check_claim(output: str, identity: dict[str, Any]) -> None:
    """Raise if the output, which is a run's, is not this run's.

    Raises:
        ConfigurationError: It belongs to a run that differs; the message names where.
        InputError: What it says of its run is damaged.
    """
    existing = load_claim(output)
    if existing != json.loads(_run_json(identity)):
        raise ConfigurationError(
            f"{output} holds a run that differs in {', '.join(differences(existing, identity))}: "
            "choose another output, or remove it"
        )


def load_claim(output: str) -> dict[str, Any]:
    """Return the identity of the run that the output belongs to.

    Raises:
        InputError: It is missing or damaged.
    """
    uri, remedy = f"{output}/_run.json", "choose another output, or remove this one"
    found = storage.read_json(uri, remedy)
    if not isinstance(found, dict):
        raise InputError(f"{shown(uri)} describes no run: {remedy}")
    return found


def run_digest(identity: dict[str, Any]) -> str:
    """Return what the footer of each of a run's shards names it by."""
    return hashlib.sha256(_run_json(identity)).hexdigest()


def data_files(output: str) -> set[str]:
    """Return the names of all files in `data/`, without those that somebody has begun to write.

    Raises:
        InputError: One is a link that leads nowhere.
    """
    try:
        return {name for name in storage.list_files(f"{output}/data") if not name.startswith(".")}
    except FileNotFoundError as error:
        raise InputError(
            f"{shown(str(error.filename))} leads nowhere: remove it and run the same command again"
        ) from error


def finished_shards(output: str) -> set[str]:
    """Names of the shards that are complete."""
    return {name.removesuffix(".parquet") for name in data_files(output) if name.endswith(".parquet")}


def write_part(output: str, shard: Shard, table: pa.Table) -> str:
    """Store finished rows of a shard; returns their address. `table` has a column `row` beside the predictions."""
    uri = f"{output}/_parts/{shard.name}/{uuid.uuid4().hex}.parquet"
    storage.write_bytes(uri, parquet_bytes(table))
    return uri


def commit_shard(output: str, shard: Shard, part_uris: Sequence[str], run: str = "") -> bool:
    """Put a shard's parts together in the order of its input rows, unless another driver was first.

    Args:
        output: Directory of the run.
        shard: What the parts are of.
        part_uris: As `write_part` returned them.
        run: `run_digest` of the run.

    Returns:
        Whether this call created the shard.

    Raises:
        AssertionError: The parts are not exactly the shard's rows.
        InputError: Parts have been removed.
    """
    finished = f"{output}/data/{shard.name}.parquet"
    try:
        parts = [parquet.from_bytes(storage.read_bytes(uri), uri) for uri in part_uris]
    except FileNotFoundError as error:
        if not storage.exists(finished):
            raise InputError(
                f"parts of {shown(finished)} were removed while the run was at work: run the same command again"
            ) from error
        return False  # another run finished all shards, and removed the parts
    table = pa.concat_tables(parts).sort_by("row")
    assert table["row"].to_pylist() == list(range(shard.start, shard.stop)), f"{shard.name}: rows lost or repeated"
    table = table.select(PREDICTION_SCHEMA.names).replace_schema_metadata({RUN_KEY: run})
    return storage.create_exclusive(finished, parquet_bytes(table))


def read_columns(directory: str, columns: Sequence[str]) -> pa.Table:
    """Small columns of all Parquet files of a directory."""
    return parquet.read_tables(directory, MENTION_COLUMNS | PREDICTION_COLUMNS, columns, columns)


def plan_identity(shards: Sequence[Shard]) -> list[dict[str, Any]]:
    """The plan as JSON: the same for the same input files, unchanged, cut in the same way."""
    return [asdict(shard) for shard in shards]


def parquet_bytes(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """A Parquet file of a table."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    return sink.getvalue()


def ids_digest(ids: pa.ChunkedArray) -> str:
    """Return a hash of mention ids in their order, the same for all types of strings."""
    if not len(ids):
        return hashlib.blake2b(digest_size=16).hexdigest()
    array = pa.concat_arrays(ids.cast(pa.large_string()).chunks)
    _, offsets, characters = array.buffers()
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    digest = hashlib.blake2b((ends - ends[0]).tobytes(), digest_size=16)
    digest.update(memoryview(characters or b"")[ends[0] : ends[-1]])
    return digest.hexdigest()


def _run_json(identity: dict[str, Any]) -> bytes:
    return json.dumps(identity, indent=2, sort_keys=True).encode()


def _version(file: storage.InputFile) -> str:
    """Return what changes with a file's content, without reading it: with its version also the Parquet footer's hash.

    The footer holds sizes, places and, as a rule, the least and greatest values of all columns; an object's ETag in S3
    needs no such help.
    """
    path = storage.local_path(file.uri)
    if path is None:
        return file.version
    with path.open("rb") as stream:
        stream.seek(max(0, file.size - 8))
        length = int.from_bytes(stream.read(4), "little")
        stream.seek(max(0, file.size - 8 - length))
        return f"{file.version}-{hashlib.blake2b(stream.read(), digest_size=16).hexdigest()}"


def _check_version(shard: Shard) -> None:
    try:
        versions = [_version(file) for file in storage.list_parquet(shard.uri)]
    except FileNotFoundError:
        versions = []
    if versions != [shard.version]:
        raise _changed(shard)


def _changed(shard: Shard) -> InputError:
    return InputError(f"{shown(shard.uri)} has changed since the run was planned: link it again to a new output")


def _cut(uri: str, version: str, num_rows: int, rows_per_shard: int, first_index: int) -> list[Shard]:
    return [
        Shard(index, uri, version, start, min(start + rows_per_shard, num_rows))
        for index, start in enumerate(range(0, num_rows, rows_per_shard), first_index)
    ]


class _UniqueIds:
    """The ids of a corpus, checked while they come: equal ones take no room in a file, and much in memory."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._chunks: list[pa.Array] = []
        self._num_ids = self._num_checked = 0

    def add(self, ids: pa.ChunkedArray) -> None:
        """Take the next ids; check all where they have doubled in number since."""
        self._chunks += ids.chunks
        self._num_ids += len(ids)
        if self._num_ids >= 2 * self._num_checked:
            self.check()

    def check(self) -> None:
        """See that each id so far is there, is UTF-8, and stands once.

        Raises:
            InputError: One does not, or there is none.
        """
        if self._num_checked == self._num_ids > 0:
            return
        ids = pa.chunked_array(self._chunks, pa.large_string())
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(f"{self._uri} has a mention_id that is not UTF-8 ({error}): write it again") from error
        if num_missing := pc.sum(pc.equal(pc.fill_null(ids, ""), "")).as_py():
            raise InputError(f"{self._uri} has {num_missing} rows without a mention_id: give each row its own")
        if len(ids) == 0:
            raise InputError(f"{self._uri} has no rows")
        if pc.count_distinct(ids).as_py() < len(ids):
            counts = pc.value_counts(ids)
            repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
            examples = [mention_id[:50] for mention_id in repeated[:3].to_pylist()]
            raise InputError(f"{self._uri} repeats {len(repeated)} mention_id, such as {examples}: make them unique")
        self._num_checked = self._num_ids


def differences(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Full names of the keys in which two JSON objects differ."""
    names = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}")
    return names

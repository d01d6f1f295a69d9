"""The entities that mentions may refer to: their names as a prefix trie, and their records in an Arrow file.

    knowledge_base.json     counts, tokenizer fingerprint, checksums of the entities and of trie.json; written last
    trie/                   the names' tokens, see `prefix_trie`
    entities.arrow          one record batch: the entities in the order of their names

Both are mapped into memory, so that opening millions of entities takes little time and processes share the pages; so
their files must not be written to, or cut off, while a process has them open.
Entities with equal names share one name and are neighbours. Nothing here knows a language model.

Shapes: S entities.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.settings import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.knowledge_base.names import TokenisedNames, count_skipped, reasons_to_skip
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.knowledge_base.trie import IntArray, PrefixTrie
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import claimed, file_sha256, read_manifest, write_manifest
from gemel_engine.tokenizer import tokenizer_fingerprint
from gemel_engine.types import BOOLEAN, IDENTIFIER, NUMBER, TEXT, Column

FORMAT_VERSION = 2
WITHOUT_CHECKSUM = 1  # the format version before, in which nothing said which trie was that of the entities
MANIFEST = "knowledge_base.json"
_TRIE = "trie"

ENTITY_SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.large_string()),
        pa.field("name", pa.large_string()),
        pa.field("description", pa.large_string()),
        pa.field("popularity", pa.float64()),
        pa.field("image_uri", pa.large_string()),
        pa.field("aliases", pa.list_(pa.large_string())),
    ]
)
_ENTITY_COLUMNS = {
    "entity_id": IDENTIFIER,
    "name": IDENTIFIER,  # 1984
    "description": TEXT,
    "popularity": NUMBER,
    "image_uri": TEXT,
    "aliases": Column.list_of(IDENTIFIER),
    "retired": BOOLEAN,  # of updates
}
# row_by_id is a second order of the same rows: its i-th value is the row with the i-th smallest entity id.
_STORED_SCHEMA = pa.schema([*ENTITY_SCHEMA, pa.field("name_index", pa.uint32()), pa.field("row_by_id", pa.uint32())])


@dataclass(frozen=True, slots=True)
class KnowledgeBaseReport:
    """What a built knowledge base holds.

    Attributes:
        num_entities: Entities kept.
        num_names: Distinct names among them.
        longest_name: Tokens of the longest of these names.
        num_skipped: Entities left out, by reason.
    """

    num_entities: int
    num_names: int
    longest_name: int
    num_skipped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Entity:
    """One record of the knowledge base."""

    entity_id: str
    name: str
    description: str | None
    popularity: float | None


class KnowledgeBase:
    """A knowledge base on disk, mapped read-only.

    Attributes:
        trie: The names; a number in the trie is a name index here.
        tokenizer_fingerprint: `tokenizer_fingerprint` of the tokenizer that it was built with.
    """

    def __init__(self, trie: PrefixTrie, entities: pa.RecordBatch, tokenizer_fingerprint: str) -> None:
        self.trie = trie
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._entities = entities
        self._ids, self._names = _Strings(entities["entity_id"]), _Strings(entities["name"])
        self._descriptions = _Strings(entities["description"])
        self._name_index: NDArray[np.uint32] = entities["name_index"].to_numpy()
        self._row_by_id: NDArray[np.uint32] = entities["row_by_id"].to_numpy()

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Map what `build_knowledge_base` wrote.

        Args:
            directory: A local directory.
            verify: Also read every byte: checksums, and that trie and entities are well-formed and fit. Do this once
                for files from elsewhere.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit the others.
        """
        manifest = read_manifest(directory / MANIFEST, FORMAT_VERSION, without_checksum=WITHOUT_CHECKSUM)
        if "base" in manifest:
            raise ArtifactError(
                f"{directory} is an update of a knowledge base: open what local_knowledge_base makes of it"
            )
        _check_trie(directory, manifest)
        trie = PrefixTrie.open(directory / _TRIE, verify=verify)
        path = directory / "entities.arrow"
        try:
            with parquet.open_arrow(path) as reader:
                entities = reader.get_batch(0) if reader.num_record_batches == 1 else pa.RecordBatch.from_pylist([])
                if reader.schema != _STORED_SCHEMA or not entities.num_rows:
                    raise ArtifactError(f"{path} has other columns than a knowledge base; build it again")
            entities.validate(full=verify)
            knowledge_base = cls(trie, entities, str(manifest.get("tokenizer_fingerprint")))
            is_consistent = knowledge_base._has_consistent_lengths(manifest.get("num_entities")) and (
                not verify
                or (file_sha256(path) == manifest.get("entities_sha256") and knowledge_base._is_well_ordered())
            )
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
        if not is_consistent:
            raise ArtifactError(f"the files in {directory} are damaged or not of one knowledge base; build it again")
        return knowledge_base

    def name_of_row(self, row: int) -> int:
        """Return the name index of the entity in a row, from 0 to S - 1."""
        return int(self._name_index[row])

    @property
    def num_entities(self) -> int:
        """S; at least the number of names."""
        return int(self._entities.num_rows)

    def entity(self, row: int) -> Entity:
        """The record in a row, from 0 to S - 1.

        Raises:
            ArtifactError: The file is damaged there.
        """
        lacks_description = self._entities["description"].slice(row, 1).null_count
        return Entity(
            self._ids[row],
            self._names[row],
            None if lacks_description else self._descriptions[row],
            self._entities["popularity"][row].as_py(),
        )

    def table(self) -> pa.Table:
        """All entities in the order of their names: `ENTITY_SCHEMA` and `name_index`.

        Arrow reads it without a look at where the file says that strings are: open with `verify` first.
        """
        return pa.Table.from_batches([self._entities.select([*ENTITY_SCHEMA.names, "name_index"])])

    def records(self, entity_ids: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Table:
        """`entity_id`, `name` and `popularity` of the entities with one of these ids or one of these names."""
        table = pa.Table.from_batches([self._entities.select(["entity_id", "name", "popularity"])])
        has_id = pc.is_in(table["entity_id"], entity_ids.combine_chunks())
        return table.filter(pc.or_(has_id, pc.is_in(table["name"], names.combine_chunks())))

    def entities_of_name(self, name_index: int) -> range:
        """Rows of the entities of a name: the most popular first, unknown popularity last, ties by id.

        Raises:
            ArtifactError: It has none: the file is damaged.
        """
        rows = range(bisect_left(self._name_index, name_index), bisect_right(self._name_index, name_index))
        if not rows:
            raise ArtifactError(f"the knowledge base has no entity of name {name_index}; build it again")
        return rows

    def names_of_entities(self, entity_ids: Sequence[str]) -> list[int | None]:
        """Name index of each entity, None for an id that is not in the knowledge base."""
        return [self._name_of_entity(entity_id) for entity_id in entity_ids]

    def name_tokens(self, name_index: int) -> list[int]:
        """Tokens of a name, without the terminator."""
        return self.trie.name_tokens(name_index)

    def _name_of_entity(self, entity_id: str) -> int | None:
        position = bisect_left(self._row_by_id, entity_id, key=self._ids.__getitem__)
        if position == self.num_entities:
            return None
        row = int(self._row_by_id[position])
        return int(self._name_index[row]) if self._ids[row] == entity_id else None

    def _has_consistent_lengths(self, num_entities: object) -> bool:
        return (
            self.num_entities == num_entities
            and self.num_entities > 0
            and self._name_index[0] == 0
            and self._name_index[-1] == self.trie.num_names - 1
        )

    def _is_well_ordered(self) -> bool:
        steps = np.diff(self._name_index.astype(np.int64))
        ids = self._entities["entity_id"].take(self._entities["row_by_id"])
        return bool(
            ids.null_count == self._entities["name"].null_count == 0
            and np.isin(steps, (0, 1)).all()
            and pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py()
        )


class _Strings:
    """The strings of a column of a mapped file, which Arrow would read from wherever the file says, and crash.

    Only the places of the strings that are asked for are read and checked, so that millions cost nothing to open.
    """

    def __init__(self, column: pa.LargeStringArray) -> None:
        _, offsets, text = column.buffers()
        try:
            self._offsets: NDArray[np.int64] = np.frombuffer(offsets, np.int64, len(column) + 1)
        except ValueError as error:
            raise ArtifactError(f"strings of the knowledge base are damaged ({error}); build it again") from error
        self._text = memoryview(text or b"")

    def __getitem__(self, row: int) -> str:
        try:
            start, stop = self._offsets[row : int(row) + 2].tolist()
            if not 0 <= start <= stop <= len(self._text):
                raise ValueError(f"a string from {start} to {stop} of {len(self._text)} bytes")
            return str(self._text[start:stop], "utf-8")
        except ValueError as error:
            raise ArtifactError(f"row {row} of the knowledge base is damaged ({error}); build it again") from error


def read_entities(uri: str, also: Sequence[str] = ()) -> pa.Table:
    """Read the entities' columns of all Parquet files at an address, and those of `also` that they have.

    Raises:
        InputError: There is no such file, or one is not readable, or has a column of another type.
    """
    kinds = {name: _ENTITY_COLUMNS[name] for name in (*ENTITY_SCHEMA.names, *also)}
    return parquet.read_tables(uri, kinds, list(kinds))


def build_knowledge_base(
    entities: pa.Table, tokenizer: PreTrainedTokenizerFast, directory: Path, settings: KnowledgeBaseSettings
) -> KnowledgeBaseReport:
    """Write a knowledge base to a new directory.

    Names are brought to Unicode's form NFC and stripped of white space at their ends. A name is unusable if it is
    empty, holds control or line-separating characters, U+FFFD or a prompt marker, is too long, or if its tokens hold a
    special token or do not decode to the name itself.

    Args:
        entities: Columns `entity_id` and `name`, and optionally others of `ENTITY_SCHEMA`; other columns are left out.
        tokenizer: The language model's.
        directory: Does not exist yet, or is empty.
        settings: What to do with unusable names.

    Raises:
        ConfigurationError: The directory holds something, or another command is writing it.
        InputError: A column is missing or of another type, an id is missing or not unique, text is not UTF-8, or names
            are unusable (none is left, where they are skipped).
    """
    with claimed(directory):
        fingerprint = tokenizer_fingerprint(tokenizer)
        entities = checked_entities(entities)
        names = TokenisedNames.tokenise(entities["name"], tokenizer)
        reasons = reasons_to_skip(entities["name"], names, tokenizer, settings.max_name_tokens)
        num_skipped = count_skipped(entities["entity_id"], reasons, settings.on_bad_name)
        is_kept = reasons == ""
        manifest = {"tokenizer_fingerprint": fingerprint, "vocabulary_size": len(tokenizer)}
        return save_knowledge_base(
            directory, entities.filter(pa.array(is_kept)), names.select(is_kept), manifest, num_skipped
        )


def save_knowledge_base(
    directory: Path,
    entities: pa.Table,
    names: tuple[IntArray, IntArray],
    manifest: Mapping[str, object],
    num_skipped: dict[str, int],
) -> KnowledgeBaseReport:
    """Write a knowledge base whose names are tokenised.

    Args:
        directory: Where.
        entities: Rows of `ENTITY_SCHEMA`, in any order.
        names: Tokens of each row's name, as `PrefixTrie.build` takes them.
        manifest: What the manifest says beside the counts and the checksum.
        num_skipped: Entities left out, by reason.
    """
    trie, name_of_row = PrefixTrie.build(*names)
    stored = _sort_entities(entities, name_of_row)
    trie.save(directory / _TRIE)
    path = directory / "entities.arrow"
    with pa.ipc.new_file(str(path), _STORED_SCHEMA) as writer:
        writer.write_table(stored.combine_chunks())
    report = KnowledgeBaseReport(stored.num_rows, trie.num_names, trie.longest(0), num_skipped)
    checksums = {"entities_sha256": file_sha256(path), "trie_sha256": file_sha256(directory / _TRIE / TRIE_MANIFEST)}
    write_manifest(directory / MANIFEST, FORMAT_VERSION, {**manifest, **checksums, **asdict(report)})
    return report


def _check_trie(directory: Path, manifest: Mapping[str, object]) -> None:
    """Raise unless the trie is that of the knowledge base; its manifest has the checksums of its arrays."""
    path = directory / _TRIE / TRIE_MANIFEST
    try:
        is_same = "trie_sha256" not in manifest or file_sha256(path) == manifest["trie_sha256"]
    except OSError as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
    if not is_same:
        raise ArtifactError(
            f"{directory / _TRIE} is the trie of another knowledge base; build the knowledge base again"
        )


def checked_entities(entities: pa.Table) -> pa.Table:
    """Check ids and types, and normalise names; the result has the columns of `ENTITY_SCHEMA`.

    Raises:
        InputError: A column is missing or of another type, an id is missing or not unique, or text is not UTF-8.
    """
    for required in ("entity_id", "name"):
        if required not in entities.column_names:
            raise InputError(f"the entities have no column {required!r}, only {entities.column_names}; add it")
    columns = []
    for column in ENTITY_SCHEMA:
        if column.name not in entities.column_names:
            columns.append(pa.nulls(len(entities), column.type))
            continue
        try:
            values = entities[column.name].cast(column.type)
            values.validate(full=True)
        except (KeyError, pa.ArrowException) as error:
            raise InputError(f"column {column.name!r} is not valid {column.type} ({error}); correct it") from error
        columns.append(values)
    table = pa.table(columns, schema=ENTITY_SCHEMA)
    _check_ids(table["entity_id"])
    names = pc.utf8_trim_whitespace(pc.utf8_normalize(pc.fill_null(table["name"], ""), form="NFC"))
    return table.set_column(table.column_names.index("name"), "name", names)


def _check_ids(ids: pa.ChunkedArray) -> None:
    if not len(ids):
        raise InputError("there are no entities; give a table with at least one row")
    is_missing = pc.equal(pc.fill_null(ids, ""), "")
    if pc.any(is_missing).as_py():
        raise InputError(f"row {pc.index(is_missing, True).as_py()} has no entity_id; give every entity a unique one")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise InputError(
            f"{len(repeated)} entity ids occur more than once, such as {repeated[0].as_py()!r}; merge them"
        )


def _sort_entities(entities: pa.Table, name_of_row: NDArray[np.intp]) -> pa.Table:
    """Rows of `_STORED_SCHEMA`: by name, then popularity descending with unknown ones last, then id."""
    named = entities.append_column("name_index", pa.array(name_of_row.astype(np.uint32)))
    keys = [("name_index", "ascending"), ("popularity", "descending"), ("entity_id", "ascending")]
    ordered = named.take(pc.sort_indices(named, sort_keys=keys))
    row_by_id = pc.sort_indices(ordered["entity_id"]).cast(pa.uint32())
    return ordered.append_column("row_by_id", row_by_id).cast(_STORED_SCHEMA)

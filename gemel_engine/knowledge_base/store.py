"""Knowledge bases on disk: entity names as a prefix trie, and entity records in an Arrow file.

    knowledge_base.json     counts, tokenizer fingerprint, checksums of the entities and of
                            trie.json; written last
    trie/                   tokens of the names, see `trie.py`
    entities.arrow          one record batch: entities in the order of their names

Both are memory-mapped, so that opening millions of entities takes little time and processes share
the pages; their files must not be written to or truncated while a process has them open.
Entities with equal names share one name and are adjacent. No language model is used here.

Shapes: S entities.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256, read_manifest
from gemel_engine.types import BOOLEAN, IDENTIFIER, NUMBER, TEXT, Column

FORMAT_VERSION = 2
WITHOUT_CHECKSUM = 1  # the previous format version, whose manifest lacks the checksum of the trie
MANIFEST = "knowledge_base.json"
TRIE_DIRECTORY = "trie"

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
ENTITY_COLUMNS = {
    "entity_id": IDENTIFIER,
    "name": IDENTIFIER,  # a name may be a number, such as 1984
    "description": TEXT,
    "popularity": NUMBER,
    "image_uri": TEXT,
    "aliases": Column.list_of(IDENTIFIER),
    "retired": BOOLEAN,  # only in updates
}
# row_by_id sorts the rows by id: its i-th value is the row with the i-th smallest entity id.
STORED_SCHEMA = pa.schema([*ENTITY_SCHEMA, pa.field("name_index", pa.uint32()), pa.field("row_by_id", pa.uint32())])


@dataclass(frozen=True, slots=True)
class Entity:
    """One record of the knowledge base."""

    entity_id: str
    name: str
    description: str | None
    popularity: float | None
    aliases: tuple[str, ...] = ()


class KnowledgeBase:
    """A knowledge base on disk, memory-mapped read-only.

    Attributes:
        trie: Prefix trie of the names; its name numbers are the name indexes here.
        trie_directory: Directory of the trie, for processes that map it themselves.
        tokenizer_fingerprint: Fingerprint of the tokenizer that it was built with.
    """

    def __init__(
        self, trie: PrefixTrie, trie_directory: Path, entities: pa.RecordBatch, tokenizer_fingerprint: str
    ) -> None:
        self.trie = trie
        self.trie_directory = trie_directory
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._entities = entities
        self._ids, self._names = _Strings(entities["entity_id"]), _Strings(entities["name"])
        self._descriptions = _Strings(entities["description"])
        self._name_index: NDArray[np.uint32] = entities["name_index"].to_numpy()
        self._row_by_id: NDArray[np.uint32] = entities["row_by_id"].to_numpy()

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Open a knowledge base that `build_knowledge_base` wrote, memory-mapped.

        Args:
            directory: Local directory.
            verify: Whether to check every byte: checksums, and that trie and entities are
                well-formed and fit together. Do this once for files from elsewhere.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit
                the others.
        """
        manifest = read_manifest(directory / MANIFEST, FORMAT_VERSION, without_checksum=WITHOUT_CHECKSUM)
        if "base" in manifest:
            raise ArtifactError(f"{directory} is an update of a knowledge base: open it with `open_knowledge_base`")
        _check_trie(directory, manifest)
        trie = PrefixTrie.open(directory / TRIE_DIRECTORY, verify=verify)
        path = directory / "entities.arrow"
        try:
            with parquet.open_arrow(path) as reader:
                entities = reader.get_batch(0) if reader.num_record_batches == 1 else pa.RecordBatch.from_pylist([])
                if reader.schema != STORED_SCHEMA or not entities.num_rows:
                    raise ArtifactError(f"{path} has other columns than a knowledge base; build it again")
            entities.validate(full=verify)
            knowledge_base = cls(trie, directory / TRIE_DIRECTORY, entities, str(manifest.get("tokenizer_fingerprint")))
            is_consistent = knowledge_base._has_consistent_lengths(manifest.get("num_entities")) and (
                not verify
                or (file_sha256(path) == manifest.get("entities_sha256") and knowledge_base._is_well_ordered())
            )
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
        if not is_consistent:
            raise ArtifactError(f"the files in {directory} are damaged or not of one knowledge base; build it again")
        return knowledge_base

    @property
    def directory(self) -> Path:
        """Directory of the knowledge base."""
        return self.trie_directory.parent

    def name_of_row(self, row: int) -> int:
        """Return the name index of the entity in a row, from 0 to S - 1."""
        return int(self._name_index[row])

    @property
    def num_entities(self) -> int:
        """Number of entities, S; at least the number of names."""
        return int(self._entities.num_rows)

    def entity(self, row: int) -> Entity:
        """Return the record in a row, from 0 to S - 1.

        Raises:
            ArtifactError: The row is damaged.
        """
        lacks_description = self._entities["description"].slice(row, 1).null_count
        return Entity(
            self._ids[row],
            self._names[row],
            None if lacks_description else self._descriptions[row],
            self._entities["popularity"][row].as_py(),
            tuple(alias for alias in self._entities["aliases"][row].as_py() or () if alias),
        )

    def table(self) -> pa.Table:
        """Return all entities in the order of their names: `ENTITY_SCHEMA` and `name_index`.

        Arrow does not check the string offsets in the file: open with `verify` first.
        """
        return pa.Table.from_batches([self._entities.select([*ENTITY_SCHEMA.names, "name_index"])])

    def records(self, entity_ids: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Table:
        """Return id, name and popularity of the entities with one of these ids or names.

        The columns are `entity_id`, `name` and `popularity`.
        """
        table = pa.Table.from_batches([self._entities.select(["entity_id", "name", "popularity"])])
        has_id = pc.is_in(table["entity_id"], entity_ids.combine_chunks())
        return table.filter(pc.or_(has_id, pc.is_in(table["name"], names.combine_chunks())))

    def entities_of_name(self, name_index: int) -> range:
        """Return the rows of the entities of a name.

        They are sorted by descending popularity (unknown last), ties by id.

        Raises:
            ArtifactError: The name has no entity, because the file is damaged.
        """
        rows = range(bisect_left(self._name_index, name_index), bisect_right(self._name_index, name_index))
        if not rows:
            raise ArtifactError(f"the knowledge base has no entity of name {name_index}; build it again")
        return rows

    def names_of_entities(self, entity_ids: Sequence[str]) -> list[int | None]:
        """Return the name index of each entity; None for an unknown id."""
        return [self._name_of_entity(entity_id) for entity_id in entity_ids]

    def name_tokens(self, name_index: int) -> list[int]:
        """Return the tokens of a name, without the terminator."""
        return self.trie.name_tokens(name_index)

    def entity_id(self, row: int) -> str:
        """Return the id of the entity in a row, from 0 to S - 1."""
        return self._ids[row]

    def row_of_entity(self, entity_id: str) -> int | None:
        """Return the row of an entity; None for an unknown id."""
        position = bisect_left(self._row_by_id, entity_id, key=self._ids.__getitem__)
        if position == self.num_entities:
            return None
        row = int(self._row_by_id[position])
        return row if self._ids[row] == entity_id else None

    def _name_of_entity(self, entity_id: str) -> int | None:
        row = self.row_of_entity(entity_id)
        return None if row is None else self.name_of_row(row)

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
    """The strings of a column in a mapped file, with checked offsets.

    Arrow would follow damaged offsets and crash. Only the offsets of requested strings are read and
    checked, so that opening millions of strings takes no time.
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


def _check_trie(directory: Path, manifest: Mapping[str, object]) -> None:
    """Raise unless the manifest of the trie, which contains its checksums, has the right checksum.

    Raises:
        ArtifactError: The manifest is missing, or is that of another knowledge base's trie.
    """
    path = directory / TRIE_DIRECTORY / TRIE_MANIFEST
    try:
        is_same = "trie_sha256" not in manifest or file_sha256(path) == manifest["trie_sha256"]
    except OSError as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); build the knowledge base again") from error
    if not is_same:
        raise ArtifactError(
            f"{directory / TRIE_DIRECTORY} is the trie of another knowledge base; build the knowledge base again"
        )

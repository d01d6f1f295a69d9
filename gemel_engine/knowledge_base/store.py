"""Knowledge bases on disk: entity names as a prefix trie, and entity records in an Arrow file.

    knowledge_base.json     counts, tokenizer fingerprint, checksums of the entities and of
                            trie.json; written last
    trie/                   tokens of the names, see `trie.py`
    entities.arrow          one record batch: entities in the order of their names
    other_names.arrow       further names of entities, see `other_names.py`; optional

Both are memory-mapped, so that opening millions of entities takes little time and processes share
the pages; their files must not be written to or truncated while a process has them open.
Entities with equal names share one name and are adjacent. An entity may have other names, too; what
is called its name is the main one. No language model is used here.

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
from gemel_engine.knowledge_base.columns import (
    ENTITY_SCHEMA,
    STORED_SCHEMA,
    ListColumn,
    StringColumn,
    as_stored,
    earlier_schema,
)
from gemel_engine.knowledge_base.other_names import OtherNames
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256, read_manifest

FORMAT_VERSION = 2
WITHOUT_CHECKSUM = 1  # the previous format version, whose manifest lacks the checksum of the trie
MANIFEST = "knowledge_base.json"
TRIE_DIRECTORY = "trie"
_TEXTS = ("description", "language")


@dataclass(frozen=True, slots=True)
class Entity:
    """One record of the knowledge base.

    Attributes:
        entity_id: Identifier, unique in the knowledge base.
        name: Name, which several entities may share.
        description: Text about the entity; None: unknown.
        popularity: Number that is larger for better known entities; None: unknown.
        language: Language of name and description, as the table of entities has it; None: unknown.
        aliases: Other names.
        image_uris: Addresses of pictures.
    """

    entity_id: str
    name: str
    description: str | None
    popularity: float | None
    language: str | None = None
    aliases: tuple[str, ...] = ()
    image_uris: tuple[str, ...] = ()


class KnowledgeBase:
    """A knowledge base on disk, memory-mapped read-only.

    Attributes:
        trie: Prefix trie of the names; its name numbers are the name indexes here.
        trie_directory: Directory of the trie, for processes that map it themselves.
        tokenizer_fingerprint: Fingerprint of the tokenizer that it was built with.
        other_names: Names of entities besides their main names.
    """

    def __init__(
        self,
        trie: PrefixTrie,
        trie_directory: Path,
        entities: pa.RecordBatch,
        tokenizer_fingerprint: str,
        other_names: OtherNames,
    ) -> None:
        self.trie = trie
        self.trie_directory = trie_directory
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.other_names = other_names
        self._entities = entities
        self._ids, self._names = StringColumn(entities["entity_id"]), StringColumn(entities["name"])
        self._texts = {name: StringColumn(entities[name]) for name in _TEXTS if name in entities.schema.names}
        self._aliases = ListColumn(entities["aliases"])
        addresses = entities["image_uri"]  # an earlier release has stored one address per entity at most
        self._image_uris = ListColumn(addresses) if pa.types.is_list(addresses.type) else StringColumn(addresses)
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
                is_known = reader.schema in (STORED_SCHEMA, earlier_schema(STORED_SCHEMA))
                if not is_known or not entities.num_rows:
                    raise ArtifactError(f"{path} has other columns than a knowledge base; build it again")
            entities.validate(full=verify)
            checksum = manifest.get("other_names_sha256")
            knowledge_base = cls(
                trie,
                directory / TRIE_DIRECTORY,
                entities,
                str(manifest.get("tokenizer_fingerprint")),
                OtherNames.open(directory, trie.num_names, entities.num_rows, checksum),
            )
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
        """Return the name index of the main name of the entity in a row, from 0 to S - 1."""
        return int(self._name_index[row])

    def names_of_row(self, row: int) -> list[int]:
        """Return the name indexes of all names of the entity in a row, the main one first."""
        return [self.name_of_row(row), *self.other_names.names_of(row)]

    @property
    def num_entities(self) -> int:
        """Number of entities, S; at least the number of names."""
        return int(self._entities.num_rows)

    def entity(self, row: int) -> Entity:
        """Return the record in a row, from 0 to S - 1.

        Raises:
            ArtifactError: The row is damaged.
        """
        return Entity(
            self._ids[row],
            self._names[row],
            self._text("description", row),
            self._entities["popularity"][row].as_py(),
            self._text("language", row),
            self._aliases[row],
            self._image_uris_of(row),
        )

    def table(self) -> pa.Table:
        """Return all entities in the order of their names: `ENTITY_SCHEMA` and `name_index`.

        Arrow does not check the string offsets in the file: open with `verify` first.
        """
        names = [name for name in (*ENTITY_SCHEMA.names, "name_index") if name in self._entities.schema.names]
        return as_stored(pa.Table.from_batches([self._entities.select(names)]))

    def records(self, entity_ids: pa.ChunkedArray, names: pa.ChunkedArray) -> pa.Table:
        """Return id, name and popularity of the entities with one of these ids or names.

        The columns are `entity_id`, `name` and `popularity`.
        """
        table = pa.Table.from_batches([self._entities.select(["entity_id", "name", "popularity"])])
        has_id = pc.is_in(table["entity_id"], entity_ids.combine_chunks())
        return table.filter(pc.or_(has_id, pc.is_in(table["name"], names.combine_chunks())))

    def entities_of_name(self, name_index: int) -> Sequence[int]:
        """Return the rows of the entities of a name.

        Those of which it is the main name come first, sorted by descending popularity (unknown
        last), ties by id.

        Raises:
            ArtifactError: The name has no entity, because the file is damaged.
        """
        rows: Sequence[int]
        rows = range(bisect_left(self._name_index, name_index), bisect_right(self._name_index, name_index))
        if len(self.other_names):
            rows = [*rows, *self.other_names.entities_of(name_index)]
        if not rows:
            raise ArtifactError(f"the knowledge base has no entity of name {name_index}; build it again")
        return rows

    def names_of_entities(self, entity_ids: Sequence[str]) -> list[int | None]:
        """Return the name index of each entity's main name; None for an unknown id."""
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

    def _text(self, name: str, row: int) -> str | None:
        """Return an optional text of a row; None if it is null, or if the file has no such column."""
        is_missing = name not in self._texts or self._entities[name].slice(row, 1).null_count
        return None if is_missing else self._texts[name][row]

    def _image_uris_of(self, row: int) -> tuple[str, ...]:
        found = self._image_uris[row]
        if isinstance(found, str):
            return (found,) if found else ()
        return found

    def _name_of_entity(self, entity_id: str) -> int | None:
        row = self.row_of_entity(entity_id)
        return None if row is None else self.name_of_row(row)

    def _has_consistent_lengths(self, num_entities: object) -> bool:
        return (
            self.num_entities == num_entities
            and self.num_entities > 0
            and min([self._name_index[0], *self.other_names.name_index[:1]]) == 0
            and max([self._name_index[-1], *self.other_names.name_index[-1:]]) == self.trie.num_names - 1
        )

    def _is_well_ordered(self) -> bool:
        names = np.concatenate([self._name_index, self.other_names.name_index])
        steps = np.diff(np.sort(names).astype(np.int64))
        ids = self._entities["entity_id"].take(self._entities["row_by_id"])
        return bool(
            ids.null_count == self._entities["name"].null_count == 0
            and np.isin(steps, (0, 1)).all()
            and (np.diff(self._name_index.astype(np.int64)) >= 0).all()
            and pc.all(pc.less(ids[:-1], ids[1:]), min_count=0).as_py()
        )


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

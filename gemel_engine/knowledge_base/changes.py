"""The differences between two knowledge bases that can change predictions."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import storage
from gemel_engine.errors import ConfigurationError
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.storage.parquet import parquet_bytes


@dataclass(frozen=True, slots=True, eq=False)
class KnowledgeBaseChanges:
    """The differences between two knowledge bases that can change predictions.

    Attributes:
        entity_ids: Ids of old entities that were retired or renamed.
        edited_ids: Ids of the other old entities whose cards may differ: those with another
            description, other aliases or other pictures.
        added_names: Trie of the names that only the new knowledge base contains; None if none.
    """

    entity_ids: pa.Array
    edited_ids: pa.Array
    added_names: PrefixTrie | None

    @classmethod
    def between(cls, old: KnowledgeBase, new: KnowledgeBase) -> Self:
        """Compare two knowledge bases, both opened with `verify`.

        Raises:
            ConfigurationError: An entity of one has several names.
        """
        if len(old.other_names) or len(new.other_names):
            raise ConfigurationError(
                "a knowledge base whose entities have other names (column 'other_names') can't be compared with an "
                "earlier one: leave previous out, which links all rows again"
            )
        before, after = old.table(), new.table()
        ids, names = (after[name].combine_chunks() for name in ("entity_id", "name"))
        place = pc.index_in(before["entity_id"], ids).combine_chunks()
        now = names.take(place)
        is_same = pc.fill_null(pc.equal(now, before["name"].combine_chunks()), False)
        is_new = pc.invert(pc.is_in(names, before["name"].combine_chunks()))
        is_edited = pa.array(np.zeros(len(before), bool))
        for column in ("description", "aliases", "image_uri"):
            is_edited = pc.or_(is_edited, pc.not_equal(_texts(before, column), _texts(after, column).take(place)))
        added = np.unique(after["name_index"].filter(is_new).to_numpy())
        old_ids = before["entity_id"].combine_chunks()
        return cls(
            old_ids.filter(pc.invert(is_same)),
            old_ids.filter(pc.and_(is_same, pc.fill_null(is_edited, False))),
            PrefixTrie.build(*new.trie.sequences(added))[0] if len(added) else None,
        )

    def save(self, address: str) -> None:
        """Write the differences to a directory, local or `s3://`; existing files are replaced."""
        is_edited = np.repeat([False, True], [len(self.entity_ids), len(self.edited_ids)])
        ids = pa.chunked_array([self.entity_ids, self.edited_ids])
        table = pa.table({"entity_id": ids, "is_edited": is_edited})
        storage.write_bytes(f"{address}/entities.parquet", parquet_bytes(table))
        num_names = 0
        if self.added_names is not None:
            num_names = self.added_names.num_names
            with tempfile.TemporaryDirectory() as directory:
                self.added_names.save(Path(directory))
                for path in Path(directory).iterdir():
                    storage.write_bytes(f"{address}/added_names/{path.name}", path.read_bytes())
        counts = {"num_changed_entities": len(self.entity_ids), "num_added_names": num_names}
        storage.write_bytes(f"{address}/changes.json", json.dumps(counts).encode())


def _texts(entities: pa.Table, column: str) -> pa.Array:
    """Return a column as strings, lists joined, empty where it is null."""
    values = entities[column].combine_chunks()
    if pa.types.is_list(values.type):
        lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        items = pa.ListArray.from_arrays(offsets, pc.fill_null(values.flatten(), ""))
        values = pc.binary_join(items, pa.scalar("\x1f", values.type.value_type))
    return pc.fill_null(values, "")

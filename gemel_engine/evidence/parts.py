"""Embeddings and picture features of entities, in the order of their table, before they are indexed.

A part is a Parquet file with one row per entity:

    entity_id         identifier
    num_names         number of embedded names and aliases
    names             their embeddings, concatenated
    num_descriptions  number of embedded descriptions: 0 or 1
    descriptions      its embedding
    num_pictures      number of usable pictures; null: the table says nothing of pictures
    pictures          their features, concatenated
    faults            why its other pictures are unusable

Shapes: N vectors, E their width, S entities.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.errors import InputError, MentionError, shown
from gemel_engine.evidence.arrays import scratch_array
from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.index import DESCRIPTIONS, NAMES, PICTURES
from gemel_engine.evidence.pictures import PictureIndex
from gemel_engine.retrieval.table import FloatArray
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column

PART_SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.large_string(), nullable=False),
        pa.field("num_names", pa.int32(), nullable=False),
        pa.field("names", pa.list_(pa.float32()), nullable=False),
        pa.field("num_descriptions", pa.int32(), nullable=False),
        pa.field("descriptions", pa.list_(pa.float32()), nullable=False),
        pa.field("num_pictures", pa.int32()),
        pa.field("pictures", pa.list_(pa.float32()), nullable=False),
        pa.field("faults", pa.list_(pa.string()), nullable=False),
    ]
)
_COLUMNS = {field.name: Column.like(field.type) for field in PART_SCHEMA} | {
    "entity_id": Column(pa.large_string(), "string", pa.types.is_large_string)
}
_COUNTED = ("entity_id", "num_names", "num_descriptions", "num_pictures", "faults")
_COUNTED_SCHEMA = pa.schema([pa.field(name, PART_SCHEMA.field(name).type) for name in _COUNTED])
Kind = Literal["names", "descriptions", "pictures"]
# The index of each kind of vectors.
INDEXES: Mapping[Kind, type[DenseIndex] | type[PictureIndex]] = MappingProxyType(
    {NAMES: DenseIndex, DESCRIPTIONS: DenseIndex, PICTURES: PictureIndex}
)


def make_part(
    entity_ids: pa.Array | pa.ChunkedArray,
    names: Sequence[FloatArray],
    descriptions: Sequence[FloatArray],
    pictures: Sequence[Sequence[FloatArray | MentionError]] | None,
) -> pa.Table:
    """Return a part.

    Args:
        entity_ids: Identifier of each entity.
        names: Embeddings (N, E) of the names and aliases of each entity.
        descriptions: Embeddings (N, E) of its description, at most one.
        pictures: Features of each entity's pictures, or why they are unusable; None: the table says
            nothing of pictures.
    """
    of_entities = [[]] * len(names) if pictures is None else pictures
    usable = [[item for item in found if not isinstance(item, MentionError)] for found in of_entities]
    return pa.table(
        {
            "entity_id": entity_ids,
            "num_names": [len(vectors) for vectors in names],
            "names": [vectors.ravel() for vectors in names],
            "num_descriptions": [len(vectors) for vectors in descriptions],
            "descriptions": [vectors.ravel() for vectors in descriptions],
            "num_pictures": [None if pictures is None else len(features) for features in usable],
            "pictures": [np.concatenate(features) if features else [] for features in usable],
            "faults": [[str(item) for item in found if isinstance(item, MentionError)] for found in of_entities],
        },
        schema=PART_SCHEMA,
    )


class VectorParts:
    """The vectors in some parts, for the entities of one knowledge base.

    Args:
        addresses: Addresses of the parts.
        entity_ids: Identifiers of the S entities of the knowledge base, in the order of its rows;
            other entities in the parts are left out.

    Attributes:
        rows: Row of each entity in the parts; -1 for one that the knowledge base lacks.
        has_pictures: Whether the table said anything of the pictures of each entity in the parts.
        faults: Identifier and reason of each unusable picture.

    Raises:
        InputError: A part is unreadable.
    """

    def __init__(self, addresses: Sequence[str], entity_ids: pa.Array) -> None:
        self._addresses = addresses
        tables = [self._read(address, _COUNTED) for address in addresses]
        table = pa.concat_tables([_COUNTED_SCHEMA.empty_table(), *tables])
        ids = table["entity_id"].combine_chunks()
        self._ends = np.cumsum([0, *map(len, tables)])
        self.rows: NDArray[np.int64] = pc.fill_null(pc.index_in(ids, entity_ids), -1).to_numpy().astype(np.int64)
        self.has_pictures: NDArray[np.bool_] = pc.is_valid(table["num_pictures"]).to_numpy()
        self._counts = {
            kind: np.where(self.rows >= 0, pc.fill_null(table[f"num_{kind}"], 0).to_numpy(), 0) for kind in INDEXES
        }
        faults = table["faults"].combine_chunks()
        of_fault = ids.take(pc.list_parent_indices(faults)).to_pylist()
        self.faults: list[tuple[str, str]] = list(zip(of_fault, pc.list_flatten(faults).to_pylist(), strict=True))

    @contextmanager
    def vectors(self, kind: Kind, scratch: Path) -> Iterator[tuple[FloatArray, NDArray[np.uint32]] | None]:
        """Yield vectors (N, E) sorted by entity and their entities (N,); None if there are none.

        Args:
            kind: Which vectors.
            scratch: Path of a temporary file for them.

        Raises:
            InputError: Vectors differ in width.
        """
        rows = np.repeat(self.rows, self._counts[kind])
        if not len(rows):
            yield None
            return
        order = np.argsort(rows, kind="stable")
        with scratch_array(scratch, (len(rows), self._width(kind))) as vectors:
            self._fill(kind, vectors, np.argsort(order))
            yield vectors, rows[order].astype(np.uint32)

    def _fill(self, kind: Kind, vectors: FloatArray, places: NDArray[np.int64]) -> None:
        start, width = 0, vectors.shape[1]
        for number, address in enumerate(self._addresses):
            of_part = slice(self._ends[number], self._ends[number + 1])
            stop = start + int(self._counts[kind][of_part].sum())
            values = self._values(address, kind, self.rows[of_part] >= 0)
            if len(values) != (stop - start) * width:
                raise InputError(
                    f"{shown(address)}: {stop - start} vectors ({kind}) with {len(values)} numbers, not {width} each: "
                    "use the features of one image encoder"
                )
            vectors[places[start:stop]] = values.reshape(-1, width)
            start = stop

    def _width(self, kind: Kind) -> int:
        number = int(np.searchsorted(self._ends, np.flatnonzero(self._counts[kind])[0], "right")) - 1
        of_part = slice(self._ends[number], self._ends[number + 1])
        values = self._values(self._addresses[number], kind, self.rows[of_part] >= 0)
        return len(values) // int(self._counts[kind][of_part].sum())

    def _values(self, address: str, kind: Kind, is_known: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Return the concatenated vectors of the known entities of a part."""
        lists = self._read(address, [kind])[kind].combine_chunks().filter(pa.array(is_known))
        values: NDArray[np.float32] = lists.flatten().to_numpy(zero_copy_only=False)
        return values

    @staticmethod
    def _read(address: str, names: Sequence[str]) -> pa.Table:
        with parquet.open_table(address, _COLUMNS, PART_SCHEMA.names) as table:
            return table.read(names)


def index_parts(parts: VectorParts, directory: Path, num_rows: int) -> None:
    """Write the indexes of embeddings and pictures of an evidence index.

    Args:
        parts: The vectors; there may be none.
        directory: Directory of the evidence index.
        num_rows: Number of entities, S.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / "vectors.tmp"
    for kind, index in INDEXES.items():
        with parts.vectors(kind, scratch) as found:
            if found is not None:
                index.build(directory / kind, *found, num_rows)

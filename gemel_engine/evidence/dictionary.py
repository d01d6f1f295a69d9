"""Look up entities by name or alias, in sorted memory-mapped keys.

    text.npy        concatenated keys, as UTF-8 bytes
    offsets.npy     start of each key, and the end of the last one
    rows.npy        entity of each key
    kinds.npy       kind of each key, as an index into `KINDS`

A key is a normal form without its spaces, so "AT-4" finds "AT4". A key is repeated for each of its
entities.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, Self, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.arrays import open_array
from gemel_engine.evidence.normal_form import normal_form, without_qualifier

Kind = Literal["name", "alias", "base_name"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class NameDictionary:
    """Finds entities by the normal form of a name, an alias, or a name without its qualifier.

    Raises:
        ArtifactError: The arrays do not fit each other.
    """

    def __init__(
        self,
        text: NDArray[np.uint8],
        offsets: NDArray[np.int64],
        rows: NDArray[np.uint32],
        kinds: NDArray[np.uint8],
    ) -> None:
        if not len(offsets) - 1 == len(rows) == len(kinds) or offsets[-1] != len(text):
            raise ArtifactError("the dictionary's arrays differ in length; build the evidence index again")
        self._text, self._offsets, self._rows, self._kinds = text, offsets, rows, kinds

    @classmethod
    def build(cls, directory: Path, entities: Iterable[tuple[int, str, Iterable[str]]]) -> Self:
        """Write the dictionary of some entities and open it.

        Args:
            directory: Output directory, created if it does not exist.
            entities: Row, name and aliases of each entity.
        """
        keys, rows, kinds = _sorted_keys(entities)
        _, offsets, text = keys.buffers()
        directory.mkdir(parents=True, exist_ok=True)
        np.save(directory / "text.npy", np.frombuffer(text or b"", np.uint8))
        np.save(directory / "offsets.npy", np.frombuffer(offsets, np.int64, len(keys) + 1))
        np.save(directory / "rows.npy", rows)
        np.save(directory / "kinds.npy", kinds)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map what `build` wrote.

        Raises:
            ArtifactError: A file is missing, damaged, or does not fit the others.
        """
        return cls(
            open_array(directory / "text.npy", np.uint8, 1),
            open_array(directory / "offsets.npy", np.int64, 1),
            open_array(directory / "rows.npy", np.uint32, 1),
            open_array(directory / "kinds.npy", np.uint8, 1),
        )

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, form: str, limit: int, allowed: Container[int] | None = None) -> list[tuple[int, Kind]]:
        """Return (entity, kind) pairs of a normal form, names first, then by row; entities once.

        Args:
            form: Normal form.
            limit: Maximum number of pairs.
            allowed: Rows of the entities that may be found; None: all.
        """
        key = _key(form)
        if not key:
            return []
        start = bisect_left(range(len(self)), key, key=self._key_at)
        last = len(self) if allowed is not None else min(start + limit, len(self))
        stop = bisect_right(range(len(self)), key, start, last, key=self._key_at)
        pairs = zip(self._rows[start:stop].tolist(), self._kinds[start:stop].tolist(), strict=True)
        found = ((row, KINDS[kind]) for row, kind in pairs if allowed is None or row in allowed)
        return list(islice(found, limit))

    def _key_at(self, number: int) -> bytes:
        start, stop = self._offsets[number : number + 2].tolist()
        return self._text[start:stop].tobytes()


def _key(form: str) -> bytes:
    return form.replace(" ", "").encode()


def _keys_of(name: str, aliases: Iterable[str]) -> Iterator[tuple[bytes, int]]:
    """Yield the distinct keys of an entity, each with its strongest kind."""
    of_name = _key(normal_form(name))
    seen = {b"", of_name}
    if of_name:
        yield of_name, KINDS.index("name")
    for kind, others in (("alias", aliases), ("base_name", (without_qualifier(name),))):
        for other in others:
            key = of_name if other == name else _key(normal_form(other))
            if key not in seen:
                seen.add(key)
                yield key, KINDS.index(kind)


def _sorted_keys(
    entities: Iterable[tuple[int, str, Iterable[str]]],
) -> tuple[pa.LargeBinaryArray, NDArray[np.uint32], NDArray[np.uint8]]:
    keys: list[bytes] = []
    rows: list[int] = []
    kinds: list[int] = []
    for row, name, aliases in entities:
        for key, kind in _keys_of(name, aliases):
            keys.append(key)
            rows.append(row)
            kinds.append(kind)
    table = pa.table(
        {
            "key": pa.array(keys, pa.large_binary()),
            "kind": pa.array(kinds, pa.uint8()),
            "row": pa.array(rows, pa.uint32()),
        }
    )
    order = pc.sort_indices(table, sort_keys=[(column, "ascending") for column in ("key", "kind", "row")])
    ordered = table.take(order).combine_chunks()
    sorted_keys = (
        pa.concat_arrays(ordered["key"].chunks) if ordered["key"].num_chunks else pa.array([], pa.large_binary())
    )
    return sorted_keys, ordered["row"].to_numpy(), ordered["kind"].to_numpy()

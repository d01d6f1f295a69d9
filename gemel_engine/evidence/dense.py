"""Find the entities whose vectors are nearest to a query.

Few vectors are searched exactly, many are compressed by a product quantiser in inverted lists:

    dense.json      counts, and whether the index is exact
    vectors.npy     exact: vectors, (N, E) float32
    rows.npy        exact: entity of each vector, (N,)
    centroids.npy   compressed: centroids of the lists, (L, E)
    codebooks.npy   compressed: product quantiser, (bytes per code, 256, dimensions per byte)
    sizes.npy       compressed: number of vectors of each list, (L,)
    lists.bin       compressed: codes of each list, then its entities as 64-bit integers

faiss searches the mapped files in place, and all processes of a node share them. faiss trusts the
contents of its own file format, so that is not used: faiss's objects are built from arrays whose
shapes are checked, and an entity that is out of range is an error.

Shapes: N vectors, E vector width, L lists, B queries.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.arrays import fill_places, open_array, scratch_array
from gemel_engine.evidence.compressed import Compressed, RowArray, checked, write_compressed
from gemel_engine.evidence.gpu import GpuSearch, Search, can_search_on_gpu
from gemel_engine.extras import extra
from gemel_engine.retrieval.table import SIMILARITY_DECIMALS, FloatArray
from gemel_engine.storage.manifest import read_manifest, write_manifest

with extra("cpu", "gpu"):
    import faiss

FORMAT_VERSION = 1
_MANIFEST = "dense.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSettings:
    """How vectors are stored and searched.

    Attributes:
        exact_up_to: Greatest number of vectors of an exact index; a larger one is compressed.
        num_probes: Number of lists that a query is compared with, if the index is compressed.
    """

    exact_up_to: int = 200_000
    num_probes: int = 32

    def __post_init__(self) -> None:
        if self.exact_up_to < 0 or self.num_probes < 1:
            raise ConfigurationError(
                f"exact_up_to is {self.exact_up_to} and num_probes {self.num_probes}; give at least 0 and 1"
            )


class _Stored(Search, Protocol):
    """A search of vectors in files, which can be read one by one."""

    def entities(self) -> NDArray[np.integer[Any]]:
        """Return the entity of each vector, (N,)."""
        ...

    def vectors_at(self, numbers: NDArray[np.intp]) -> FloatArray:
        """Return some of the vectors, (n, E), by their numbers in `entities`."""
        ...


class DenseIndex:
    """Finds entities by the cosine similarity of their vectors; an entity may have several.

    Attributes:
        num_vectors: N, the number of vectors.
        width: E, the width of a vector.
        settings: How vectors are stored and searched.
    """

    def __init__(self, num_vectors: int, width: int, num_rows: int, settings: DenseSettings, search: _Stored) -> None:
        self.num_vectors, self.width = num_vectors, width
        self.settings = settings
        self._num_rows = num_rows
        self._search: Search = search
        self._on_cpu = search

    @classmethod
    def build(
        cls,
        directory: Path,
        vectors: FloatArray,
        rows: RowArray,
        num_rows: int,
        settings: DenseSettings | None = None,
    ) -> Self:
        """Write an index and open it.

        Args:
            directory: Output directory, created if it does not exist.
            vectors: Vectors of length one or zero, shape (N, E); may be mapped from a file.
            rows: Entity of each vector, shape (N,).
            num_rows: Number of entities.
            settings: How vectors are stored and searched; None: the defaults.
        """
        settings = settings or DenseSettings()
        directory.mkdir(parents=True, exist_ok=True)
        is_exact = len(vectors) <= settings.exact_up_to
        if is_exact:
            np.save(directory / "vectors.npy", vectors)
            np.save(directory / "rows.npy", rows)
        else:
            write_compressed(directory, vectors, rows)
        manifest = {"num_vectors": len(vectors), "width": vectors.shape[1], "num_rows": num_rows, "is_exact": is_exact}
        write_manifest(directory / _MANIFEST, FORMAT_VERSION, {**manifest, **asdict(settings)})
        return cls.open(directory)

    @classmethod
    def merge(
        cls,
        directory: Path,
        base: Path,
        new_rows: NDArray[np.int64],
        vectors: FloatArray,
        rows: RowArray,
        num_rows: int,
    ) -> Self:
        """Write the index of an index's vectors and further ones, and open it.

        The vectors of a compressed index keep their codes, and further ones are coded alike.

        Args:
            directory: Output directory, created if it does not exist.
            base: Directory of an index.
            new_rows: New row of each entity of that index; -1: its vectors are left out.
            vectors: Further vectors, of the same width, shape (M, E).
            rows: Entity of each further vector, shape (M,).
            num_rows: Number of entities.
        """
        old = cls.open(base)
        stored = old._on_cpu
        if isinstance(stored, _Exact):
            kept = new_rows[stored.rows]
            sources = [(stored.vectors, np.flatnonzero(kept >= 0)), (vectors, np.arange(len(rows)))]
            all_rows = np.concatenate([kept[kept >= 0], rows]).astype(np.uint32)
            order = np.argsort(all_rows, kind="stable")
            with scratch_array(directory / "merged.tmp", (len(order), old.width)) as merged:
                fill_places(merged, np.argsort(order), sources)
                return cls.build(directory, merged, all_rows[order], num_rows, old.settings)
        directory.mkdir(parents=True, exist_ok=True)
        assert isinstance(stored, Compressed)
        num_vectors = stored.write_merged(directory, new_rows, vectors, rows)
        for name in ("centroids.npy", "codebooks.npy"):
            shutil.copyfile(base / name, directory / name)
        counts = {"num_vectors": num_vectors, "width": old.width, "num_rows": num_rows, "is_exact": False}
        write_manifest(directory / _MANIFEST, FORMAT_VERSION, {**counts, **asdict(old.settings)})
        return cls.open(directory)

    @property
    def entities(self) -> NDArray[np.integer[Any]]:
        """Entity of each vector, (N,)."""
        return self._on_cpu.entities()

    @property
    def is_exact(self) -> bool:
        """Whether the vectors are stored as they are."""
        return isinstance(self._on_cpu, _Exact)

    def move_to_gpu(self) -> None:
        """Search a copy of the vectors on the current GPU from now on, where faiss can."""
        stored = self._on_cpu
        if isinstance(stored, _Exact) and can_search_on_gpu():
            index = faiss.IndexFlatIP(self.width)
            index.add(np.ascontiguousarray(stored.vectors))
            self._search = GpuSearch(index, stored.rows, stored)
        elif isinstance(stored, Compressed) and can_search_on_gpu(stored.index.code_size):
            self._search = GpuSearch(stored.index, None, stored)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map what `build` wrote.

        Raises:
            ArtifactError: A file is missing, damaged, or does not fit the others.
        """
        manifest = read_manifest(directory / _MANIFEST, FORMAT_VERSION)
        try:
            num_vectors, width, num_rows, exact_up_to, num_probes = (
                int(manifest[key]) for key in ("num_vectors", "width", "num_rows", "exact_up_to", "num_probes")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{directory / _MANIFEST} lacks counts ({error!r}); build it again") from error
        search: _Stored
        search = _Exact(directory) if manifest.get("is_exact") else Compressed(directory, num_probes)
        if (search.num_vectors, search.width) != (num_vectors, width):
            raise ArtifactError(f"the vectors in {directory} are not those of its manifest; build them again")
        return cls(num_vectors, width, num_rows, DenseSettings(exact_up_to=exact_up_to, num_probes=num_probes), search)

    def nearest(self, queries: FloatArray, limit: int) -> list[list[tuple[int, float]]]:
        """Return (entity, similarity) pairs of each query, by falling similarity, then by row.

        Similarities are rounded to 5 decimals.

        Args:
            queries: Vectors of length one, shape (B, E); a zero row finds nothing.
            limit: Number of nearest vectors per query; an entity with several of them appears once.

        Raises:
            ArtifactError: The files contain an entity that is out of range.
        """
        # One query at a time, because others in a batch could change the last bits of its result.
        return [self._nearest(query[None], min(limit, self.num_vectors)) if query.any() else [] for query in queries]

    def similarities(self, query: FloatArray, rows: Sequence[int]) -> dict[int, float]:
        """Return the similarity of a query with some entities, each with its most similar vector.

        Args:
            query: Vector of length one, (E,).
            rows: Entities; those without a vector are not in the result.
        """
        order, entities = self._by_entity
        first, last = (np.searchsorted(entities, np.array(rows, entities.dtype), side) for side in ("left", "right"))
        num_vectors = last - first
        if not num_vectors.any():
            return {}
        numbers = np.concatenate([order[start:stop] for start, stop in zip(first, last, strict=True)])
        cosines = np.round(self._on_cpu.vectors_at(numbers) @ query, SIMILARITY_DECIMALS).tolist()
        best: dict[int, float] = {}
        for row, cosine in zip(np.repeat(rows, num_vectors).tolist(), cosines, strict=True):
            best[row] = max(cosine, best.get(row, -1.0))
        return best

    @cached_property
    def _by_entity(self) -> tuple[NDArray[np.intp], NDArray[np.integer[Any]]]:
        """The numbers of all vectors by entity, and the entities in that order."""
        entities = self.entities
        order = np.argsort(entities, kind="stable")
        return order, entities[order]

    def _nearest(self, query: FloatArray, limit: int) -> list[tuple[int, float]]:
        similarities, rows = (result[0] for result in self._search(query, limit))
        is_found = rows != -1  # faiss pads with -1
        similarities, rows = np.round(similarities[is_found], SIMILARITY_DECIMALS), rows[is_found]
        order = np.lexsort((checked(rows, self._num_rows), -similarities))
        best: dict[int, float] = {}
        for row, similarity in zip(rows[order].tolist(), similarities[order].tolist(), strict=True):
            best.setdefault(row, similarity)
        return list(best.items())


class _Exact:
    def __init__(self, directory: Path) -> None:
        self.vectors = open_array(directory / "vectors.npy", np.float32, 2)
        self.rows = open_array(directory / "rows.npy", np.uint32, 1)
        self.num_vectors, self.width = self.vectors.shape
        if len(self.rows) != self.num_vectors:
            raise ArtifactError(f"{directory} has {len(self.rows)} rows for {self.num_vectors} vectors; build it again")

    def __call__(self, queries: FloatArray, limit: int) -> tuple[FloatArray, NDArray[np.int64]]:
        similarities, numbers = faiss.knn(queries, self.vectors, limit, metric=faiss.METRIC_INNER_PRODUCT)
        return similarities, self.rows[numbers].astype(np.int64)

    def entities(self) -> NDArray[np.integer[Any]]:
        return self.rows

    def vectors_at(self, numbers: NDArray[np.intp]) -> FloatArray:
        return self.vectors[numbers]

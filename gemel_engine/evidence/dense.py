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

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.arrays import chunks, fill_places, open_array, scratch_array
from gemel_engine.evidence.gpu import GpuSearch, Search, can_search_on_gpu
from gemel_engine.extras import extra
from gemel_engine.retrieval.table import SIMILARITY_DECIMALS, FloatArray
from gemel_engine.storage.manifest import read_manifest, write_manifest

with extra("cpu", "gpu"):
    import faiss

FORMAT_VERSION = 1
_MANIFEST = "dense.json"
_ID_BYTES = 8
_SAMPLES_PER_LIST = 64
_CHUNK = 1 << 16
_DIMENSIONS_PER_BYTE = 8

RowArray = NDArray[np.uint32]


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


class DenseIndex:
    """Finds entities by the cosine similarity of their vectors; an entity may have several.

    Attributes:
        num_vectors: N, the number of vectors.
        width: E, the width of a vector.
        settings: How vectors are stored and searched.
    """

    def __init__(self, num_vectors: int, width: int, num_rows: int, settings: DenseSettings, search: Search) -> None:
        self.num_vectors, self.width = num_vectors, width
        self.settings = settings
        self._num_rows = num_rows
        self._search = self._on_cpu = search

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
            _write_compressed(directory, vectors, rows)
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
        if isinstance(old._search, _Exact):
            kept = new_rows[old._search.rows]
            sources = [(old._search.vectors, np.flatnonzero(kept >= 0)), (vectors, np.arange(len(rows)))]
            all_rows = np.concatenate([kept[kept >= 0], rows]).astype(np.uint32)
            order = np.argsort(all_rows, kind="stable")
            with scratch_array(directory / "merged.tmp", (len(order), old.width)) as merged:
                fill_places(merged, np.argsort(order), sources)
                return cls.build(directory, merged, all_rows[order], num_rows, old.settings)
        directory.mkdir(parents=True, exist_ok=True)
        assert isinstance(old._search, _Compressed)
        num_vectors = old._search.write_merged(directory, new_rows, vectors, rows)
        for name in ("centroids.npy", "codebooks.npy"):
            shutil.copyfile(base / name, directory / name)
        counts = {"num_vectors": num_vectors, "width": old.width, "num_rows": num_rows, "is_exact": False}
        write_manifest(directory / _MANIFEST, FORMAT_VERSION, {**counts, **asdict(old.settings)})
        return cls.open(directory)

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
        elif isinstance(stored, _Compressed) and can_search_on_gpu(stored.index.code_size):
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
        search: Search
        search = _Exact(directory) if manifest.get("is_exact") else _Compressed(directory, num_probes)
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

    def _nearest(self, query: FloatArray, limit: int) -> list[tuple[int, float]]:
        similarities, rows = (result[0] for result in self._search(query, limit))
        is_found = rows != -1  # faiss pads with -1
        similarities, rows = np.round(similarities[is_found], SIMILARITY_DECIMALS), rows[is_found]
        order = np.lexsort((_checked(rows, self._num_rows), -similarities))
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


class _Compressed:
    """Searches faiss's inverted lists with a product quantiser, in a mapped file."""

    def __init__(self, directory: Path, num_probes: int) -> None:
        centroids = open_array(directory / "centroids.npy", np.float32, 2)
        codebooks = open_array(directory / "codebooks.npy", np.float32, 3)
        sizes = np.ascontiguousarray(open_array(directory / "sizes.npy", np.uint64, 1))
        num_lists, self.width = centroids.shape
        code_size, num_words, dimensions = codebooks.shape
        path = directory / "lists.bin"
        self.num_vectors = int(sizes.sum())
        num_bytes = self.num_vectors * (code_size + _ID_BYTES)
        fits = num_words == 256 and code_size * dimensions == self.width and len(sizes) == num_lists
        if not fits or not path.is_file() or path.stat().st_size != num_bytes or sizes.max() > self.num_vectors:
            raise ArtifactError(f"{path} is missing, or does not fit the arrays beside it; build the index again")
        self.index = _trained(centroids, codebooks)
        self._lists = _mapped_lists(path, sizes, code_size)  # faiss keeps no reference
        self.index.replace_invlists(self._lists)
        self.index.ntotal = self.num_vectors
        self.index.nprobe = num_probes

    def __call__(self, queries: FloatArray, limit: int) -> tuple[FloatArray, NDArray[np.int64]]:
        similarities, rows = self.index.search(queries, limit)
        return similarities, rows

    def write_merged(self, directory: Path, new_rows: NDArray[np.int64], vectors: FloatArray, rows: RowArray) -> int:
        """Write `sizes.npy` and `lists.bin` of the kept and of further vectors; return their number."""
        centroids = self.index.quantizer.reconstruct_n(0, self.index.nlist)
        codebooks = faiss.vector_to_array(self.index.pq.centroids).reshape(self.index.pq.M, 256, -1)
        added = _trained(centroids, codebooks)
        _add(added, vectors, rows)
        assert added.invlists is not None
        sizes = []
        with (directory / "lists.bin").open("wb") as file:
            for number in range(self.index.nlist):
                codes, entities = _list(self._lists, number, self.index.code_size)
                kept = new_rows[_checked(entities, len(new_rows))]
                more_codes, more_entities = _list(added.invlists, number, self.index.code_size)
                file.write(codes[kept >= 0].tobytes() + more_codes.tobytes())
                file.write(kept[kept >= 0].tobytes() + more_entities.tobytes())
                sizes.append(int((kept >= 0).sum()) + len(more_entities))
        np.save(directory / "sizes.npy", np.array(sizes, np.uint64))
        return sum(sizes)


def _trained(centroids: FloatArray, codebooks: FloatArray) -> faiss.IndexIVFPQ:
    num_lists, width = centroids.shape
    code_size = len(codebooks)
    quantiser = faiss.IndexFlatIP(width)
    quantiser.add(np.ascontiguousarray(centroids))
    index = faiss.IndexIVFPQ(quantiser, width, num_lists, code_size, 8, faiss.METRIC_INNER_PRODUCT)
    index.verbose = False
    faiss.copy_array_to_vector(codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def _add(index: faiss.IndexIVFPQ, vectors: FloatArray, rows: RowArray) -> None:
    for part in chunks(len(vectors), _CHUNK):
        index.add_with_ids(np.ascontiguousarray(vectors[part]), rows[part].astype(np.int64))


def _mapped_lists(path: Path, sizes: NDArray[np.uint64], code_size: int) -> faiss.OnDiskInvertedLists:
    lists = faiss.OnDiskInvertedLists(len(sizes), code_size, str(path))
    lists.read_only = True
    lists.set_all_lists_sizes(faiss.swig_ptr(sizes))
    lists.totsize = int(sizes.sum()) * (code_size + _ID_BYTES)
    offset = 0
    for number, size in enumerate(sizes.tolist()):
        place = lists.lists.at(number)  # type: ignore[attr-defined]  # a C++ vector, annotated as list
        place.capacity, place.offset = size, offset
        offset += size * (code_size + _ID_BYTES)
    lists.do_mmap()
    return lists


def _write_compressed(directory: Path, vectors: FloatArray, rows: RowArray) -> None:
    """Train inverted lists and a product quantiser on a sample, then write all codes."""
    num_vectors, width = vectors.shape
    num_lists = max(1, round(math.sqrt(num_vectors)))
    code_size = width // next(size for size in range(_DIMENSIONS_PER_BYTE, 0, -1) if width % size == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, num_lists, code_size, 8, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1
    num_samples = min(num_vectors, max(_SAMPLES_PER_LIST * num_lists, 1 << 15))
    chosen = np.sort(np.random.default_rng(0).choice(num_vectors, num_samples, replace=False))
    index.train(np.ascontiguousarray(vectors[chosen]))
    _add(index, vectors, rows)
    np.save(directory / "centroids.npy", index.quantizer.reconstruct_n(0, num_lists))
    codebooks = faiss.vector_to_array(index.pq.centroids).reshape(code_size, 256, width // code_size)
    np.save(directory / "codebooks.npy", codebooks)
    lists = index.invlists
    assert lists is not None
    sizes = [lists.list_size(number) for number in range(num_lists)]
    np.save(directory / "sizes.npy", np.array(sizes, np.uint64))
    with (directory / "lists.bin").open("wb") as file:
        for number in range(num_lists):
            for part in _list(lists, number, code_size):
                file.write(part.tobytes())


def _list(lists: faiss.InvertedLists, number: int, code_size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return codes (n, bytes per code) and entities (n,) of a list."""
    size = lists.list_size(number)
    if not size:  # faiss has no address of an empty list
        return np.zeros((0, code_size), np.uint8), np.zeros(0, np.int64)
    codes = faiss.rev_swig_ptr(lists.get_codes(number), size * code_size).reshape(size, code_size)
    return codes, faiss.rev_swig_ptr(lists.get_ids(number), size)


def _checked(entities: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    if len(entities) and not 0 <= entities.min() <= entities.max() < num_rows:
        raise ArtifactError(f"vectors of entity {entities.max()} of {num_rows}: build the evidence index again")
    return entities

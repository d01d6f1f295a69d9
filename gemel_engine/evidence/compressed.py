"""Compress many vectors by a product quantiser, and search them in inverted lists.

The files are described in `dense`.

Shapes: N vectors, E vector width, L lists, B queries.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.arrays import chunks, open_array
from gemel_engine.retrieval.table import FloatArray

_ID_BYTES = 8
_SAMPLES_PER_LIST = 64
_CHUNK = 1 << 16
_DIMENSIONS_PER_BYTE = 8

RowArray = NDArray[np.uint32]


class Compressed:
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
        self._index = _trained(centroids, codebooks)
        self._centroids, self._ends = centroids, np.cumsum(sizes.astype(np.int64))
        self._lists = _mapped_lists(path, sizes, code_size)  # faiss keeps no reference
        self._index.replace_invlists(self._lists)
        self._index.ntotal = self.num_vectors
        self._index.nprobe = num_probes

    def __call__(self, queries: FloatArray, limit: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Return inner products and entities of each query's nearest vectors, (B, limit) each."""
        similarities, rows = self._index.search(queries, limit)
        return similarities, rows

    def entities(self) -> NDArray[np.integer[Any]]:
        """Return the entity of each vector, (N,), list by list."""
        lists = (_list(self._lists, number, self._index.code_size)[1] for number in range(self._index.nlist))
        return np.concatenate([entities.astype(np.uint32) for entities in lists])

    def vectors_at(self, numbers: NDArray[np.intp]) -> FloatArray:
        """Return some of the vectors, (n, E), as their codes have them."""
        lists = np.searchsorted(self._ends, numbers, side="right")
        offsets = numbers - np.concatenate([[0], self._ends])[lists]
        codes = [
            _list(self._lists, number, self._index.code_size)[0][offset]
            for number, offset in zip(lists.tolist(), offsets.tolist(), strict=True)
        ]
        residuals = self._index.pq.decode(np.stack(codes))  # type: ignore[call-arg, func-returns-value]  # as in C++
        vectors: FloatArray = residuals + self._centroids[lists]
        return vectors

    def write_merged(self, directory: Path, new_rows: NDArray[np.int64], vectors: FloatArray, rows: RowArray) -> int:
        """Write `sizes.npy` and `lists.bin` of the kept and of further vectors; return their number."""
        centroids = self._index.quantizer.reconstruct_n(0, self._index.nlist)
        codebooks = faiss.vector_to_array(self._index.pq.centroids).reshape(self._index.pq.M, 256, -1)
        added = _trained(centroids, codebooks)
        _add(added, vectors, rows)
        assert added.invlists is not None
        sizes = []
        with (directory / "lists.bin").open("wb") as file:
            for number in range(self._index.nlist):
                codes, entities = _list(self._lists, number, self._index.code_size)
                kept = new_rows[checked(entities, len(new_rows))]
                more_codes, more_entities = _list(added.invlists, number, self._index.code_size)
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


def write_compressed(directory: Path, vectors: FloatArray, rows: RowArray) -> None:
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


def checked(entities: NDArray[np.int64], num_rows: int) -> NDArray[np.int64]:
    """Return entities that a file contains; raise an error if one is out of range."""
    if len(entities) and not 0 <= entities.min() <= entities.max() < num_rows:
        raise ArtifactError(f"vectors of entity {entities.max()} of {num_rows}: build the evidence index again")
    return entities

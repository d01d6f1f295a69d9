"""Arrays of the evidence index on disk, mapped into memory; an array may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.storage.arrays import map_array


def open_array(path: Path, dtype: DTypeLike, num_dimensions: int) -> NDArray[Any]:
    """Map an array that `numpy.save` wrote, read-only.

    Raises:
        ArtifactError: The file is missing or damaged, or its array has another type or number of
            dimensions.
    """
    array = map_array(path, "build the evidence index again")
    if array.dtype != dtype or array.ndim != num_dimensions:
        raise ArtifactError(f"{path} holds {array.dtype} of shape {array.shape}; build the evidence index again")
    return array


def create_array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Create a file of an array of float32 and map it, to be filled; it begins with zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if 0 in shape:  # nothing to map
        np.save(path, np.zeros(shape, np.float32))
        return np.zeros(shape, np.float32)
    array: NDArray[np.float32] = open_memmap(path, "w+", np.float32, shape)  # type: ignore[no-untyped-call]
    return array


@contextmanager
def scratch_array(path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    """Yield a mapped array of float32 whose file is removed at the end."""
    try:
        yield create_array(path, shape)
    finally:
        path.unlink(missing_ok=True)


def chunks(num_rows: int, size: int = 1 << 13) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows, `size` at a time."""
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def fill_places(
    target: NDArray[np.float32],
    places: NDArray[np.int64],
    sources: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]],
) -> None:
    """Copy chosen rows of arrays, one array after the other, to places of a target.

    Args:
        target: Array to fill, shape (N, E).
        places: Row of `target` of each chosen row, shape (N,).
        sources: Arrays of width E, each with the numbers of its chosen rows.
    """
    start = 0
    for vectors, chosen in sources:
        for part in chunks(len(chosen)):
            target[places[start : start + len(chosen)][part]] = vectors[chosen[part]]
        start += len(chosen)

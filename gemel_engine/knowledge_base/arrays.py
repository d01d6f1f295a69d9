"""The arrays of a prefix trie: their types, and their files, mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.storage.arrays import map_array
from gemel_engine.storage.manifest import file_sha256

UnsignedArray = NDArray[np.unsignedinteger[Any]]
IntArray = NDArray[np.integer[Any]]

_DTYPES = {
    "tokens": (np.dtype(np.uint16), np.dtype(np.uint32)),
    "first_child": (np.dtype(np.uint32),),
    "heights": (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32)),
    "terminals": (np.dtype(np.uint32),),
}


def smallest(values: IntArray, minimum: type[np.unsignedinteger[Any]]) -> UnsignedArray:
    """Return the values in the smallest sufficient unsigned type, at least `minimum`."""
    dtype = np.promote_types(np.min_scalar_type(values.max()), minimum)
    return values.astype(dtype)


def layout(array: UnsignedArray) -> dict[str, Any]:
    """Return the type and shape of an array, as the manifest contains them."""
    return {"dtype": array.dtype.str, "shape": list(array.shape)}


def open_array(path: Path, files: Mapping[str, Any], verify: bool) -> UnsignedArray:
    """Map an array of a trie into memory, read-only.

    Args:
        path: File that `numpy.save` wrote.
        files: Layout and checksum of each file, by name, from the manifest.
        verify: Whether to compare the checksum too.

    Raises:
        ArtifactError: The file is missing, damaged, or not the array in the manifest.
    """
    array: UnsignedArray = map_array(path, "build the knowledge base again")
    entry = files.get(path.name)
    if not isinstance(entry, dict) or entry != layout(array) | {"sha256": entry.get("sha256")} or array.ndim != 1:
        raise ArtifactError(f"{path} is not the array that trie.json describes; build the knowledge base again")
    if array.dtype not in _DTYPES[path.stem]:
        expected = " or ".join(map(str, _DTYPES[path.stem]))
        raise ArtifactError(f"{path} holds {array.dtype}, not {expected}; build the knowledge base again")
    if verify and file_sha256(path) != entry["sha256"]:
        raise ArtifactError(f"the checksum of {path} is not that of trie.json; build the knowledge base again")
    return array

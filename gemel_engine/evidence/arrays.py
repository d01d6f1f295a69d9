"""Arrays of the evidence index on disk, mapped into memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from gemel_engine.errors import ArtifactError


def open_array(path: Path, dtype: DTypeLike, num_dimensions: int) -> NDArray[Any]:
    """Map an array that `numpy.save` wrote, without unpickling.

    Raises:
        ArtifactError: The file is missing or damaged, or its array has another type or number of
            dimensions.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); build the evidence index again") from error
    if array.dtype != dtype or array.ndim != num_dimensions:
        raise ArtifactError(f"{path} holds {array.dtype} of shape {array.shape}; build the evidence index again")
    return array

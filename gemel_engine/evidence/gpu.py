"""Search vectors on a GPU with faiss: the results of a CPU within rounding.

B queries, N vectors.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemel_engine.extras import extra
from gemel_engine.retrieval.table import FloatArray

with extra("cpu", "gpu"):
    import faiss

_MOST_FOUND = 2048  # a GPU selects no more neighbours of one query
# Bytes of a code that GPUs search; for longer ones they keep tables in 16 bits, which loses decimals.
_CODE_SIZES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48)

logger = logging.getLogger(__name__)


class Search(Protocol):
    """A search of vectors."""

    def __call__(self, queries: FloatArray, limit: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Return inner products and entities of each query's `limit` nearest vectors: (B, limit)."""


class GpuSearch:
    """Searches a copy of a faiss index on the current GPU.

    Args:
        index: faiss's index.
        rows: Entity of each vector (N,); None: the index knows it.
        on_cpu: The same search on the CPU, for more neighbours than a GPU selects.
    """

    def __init__(self, index: Any, rows: NDArray[np.uint32] | None, on_cpu: Search) -> None:
        self._rows, self._on_cpu = rows, on_cpu
        self._resources = faiss.StandardGpuResources()  # in faiss-gpu alone
        self._index = faiss.index_cpu_to_gpu(self._resources, 0, index)

    def __call__(self, queries: FloatArray, limit: int) -> tuple[FloatArray, NDArray[np.int64]]:
        """Search as on the CPU."""
        if limit > _MOST_FOUND:
            return self._on_cpu(queries, limit)
        similarities, numbers = self._index.search(queries, limit)
        return similarities, numbers if self._rows is None else self._rows[numbers].astype(np.int64)


def can_search_on_gpu(code_size: int | None = None) -> bool:
    """Return whether faiss can search on a GPU, and codes of so many bytes there; log why not."""
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        logger.info("faiss searches on the CPU: it is not the package faiss-gpu, or finds no GPU")
    elif code_size is not None and code_size not in _CODE_SIZES:
        logger.info("faiss searches codes of %d bytes on the CPU: a GPU takes %s", code_size, _CODE_SIZES)
    else:
        return True
    return False

"""Find the entities whose pictures are most similar to a given one.

The similarity is the cosine of features that are standardised over all entities' pictures, as for
demonstrations.

Shapes: N pictures, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.arrays import open_array
from gemel_engine.evidence.dense import DenseIndex, DenseSettings
from gemel_engine.types import Features

_SMALLEST = 1e-6


class PictureIndex:
    """Finds entities by the similarity of their pictures; an entity may have several pictures."""

    def __init__(self, moments: NDArray[np.float32], index: DenseIndex) -> None:
        self._moments = moments  # mean and standard deviation: (2, C)
        self._index = index

    @classmethod
    def build(
        cls,
        directory: Path,
        features: Features,
        rows: NDArray[np.uint32],
        num_rows: int,
        settings: DenseSettings | None = None,
    ) -> Self:
        """Write an index and open it.

        Args:
            directory: Output directory, created if it does not exist.
            features: Features of the pictures, shape (N, C).
            rows: Entity of each picture, shape (N,).
            num_rows: Number of entities.
            settings: How vectors are stored and searched; None: the defaults.
        """
        directory.mkdir(parents=True, exist_ok=True)
        moments = np.stack([features.mean(axis=0), np.maximum(features.std(axis=0), _SMALLEST)]).astype(np.float32)
        np.save(directory / "moments.npy", moments)
        DenseIndex.build(directory, _standardised(features, moments), rows, num_rows, settings)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map what `build` wrote.

        Raises:
            ArtifactError: A file is missing, damaged, or does not fit the others.
        """
        moments, index = open_array(directory / "moments.npy", np.float32, 2), DenseIndex.open(directory)
        if moments.shape != (2, index.width):
            raise ArtifactError(f"{directory} has moments of shape {moments.shape}; build the evidence index again")
        return cls(moments, index)

    @property
    def num_pictures(self) -> int:
        """Number of pictures, N."""
        return self._index.num_vectors

    @property
    def width(self) -> int:
        """Vision width, C."""
        return self._index.width

    def features_of(self, row: int) -> Features | None:
        """Return the features (C,) of the first picture of an entity; None without a picture."""
        return None  # replaced when branch kb is merged

    def nearest(self, features: Sequence[Features | None], limit: int) -> list[list[tuple[int, float]]]:
        """Return (entity, similarity) pairs of the pictures most similar to each query.

        Args:
            features: Features of each query, shape (C,); None finds nothing.
            limit: Number of nearest pictures per query; an entity with several appears once.
        """
        queries = np.zeros((len(features), self._index.width), np.float32)
        for number, values in enumerate(features):
            if values is not None:
                queries[number] = _standardised(values, self._moments)
        return self._index.nearest(queries, limit)


def _standardised(features: Features, moments: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centre features (..., C), scale them, and normalise them to length one."""
    centred = (features - moments[0]) / moments[1]
    standardised: NDArray[np.float32] = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), _SMALLEST)
    return standardised.astype(np.float32)

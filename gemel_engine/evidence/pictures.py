"""Find the entities whose pictures are most similar to a given one.

The similarity is the cosine of features that are standardised over all entities' pictures, as for
demonstrations.

    features.npy    features as the image encoder computed them, sorted by entity, (N, C) float32
    entities.npy    entity of each picture, (N,)
    moments.npy     mean and standard deviation of the features, (2, C)
    dense.json      and other files of `dense`: the standardised features

Shapes: S entities, N pictures, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.arrays import chunks, create_array, fill_places, open_array, scratch_array
from gemel_engine.evidence.dense import DenseIndex, DenseSettings
from gemel_engine.retrieval.pictures import moments_of, standardised
from gemel_engine.types import Features


class PictureIndex:
    """Finds entities by the similarity of their pictures; an entity may have several pictures.

    Attributes:
        features: Features of all pictures, sorted by entity, shape (N, C).
        entities: Entity of each picture, shape (N,).
        moments: Mean and standard deviation by which features are standardised, shape (2, C).
        index: Index of the standardised features.
    """

    def __init__(
        self, features: Features, entities: NDArray[np.uint32], moments: NDArray[np.float32], index: DenseIndex
    ) -> None:
        self.features, self.entities, self.moments = features, entities, moments
        self.index = index

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
            features: Features of the pictures, shape (N, C); may be mapped from a file.
            rows: Entity of each picture, shape (N,); an entity's pictures keep their order.
            num_rows: Number of entities, S.
            settings: How vectors are stored and searched; None: the defaults.
        """
        ordered, entities = write_features(directory, features, rows)
        moments = _moments(ordered)
        np.save(directory / "moments.npy", moments)
        with scratch_array(directory / "standardised.tmp", ordered.shape) as vectors:
            for part in chunks(len(ordered)):
                vectors[part] = standardised(ordered[part], moments)
            DenseIndex.build(directory, vectors, entities, num_rows, settings)
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map what `build` wrote.

        Raises:
            ArtifactError: A file is missing, damaged, or does not fit the others.
        """
        moments, index = open_array(directory / "moments.npy", np.float32, 2), DenseIndex.open(directory)
        features = open_array(directory / "features.npy", np.float32, 2)
        entities = open_array(directory / "entities.npy", np.uint32, 1)
        shapes = features.shape, entities.shape, moments.shape
        if shapes != ((index.num_vectors, index.width), (index.num_vectors,), (2, index.width)):
            raise ArtifactError(f"the arrays in {directory} have the shapes {shapes}; build the evidence index again")
        return cls(features, entities, moments, index)

    @classmethod
    def merge(
        cls,
        directory: Path,
        base: Path,
        new_rows: NDArray[np.int64],
        features: Features,
        rows: NDArray[np.uint32],
        num_rows: int,
    ) -> Self:
        """Write the index of an index's pictures and further ones, and open it.

        It equals one built anew from all features, unless the index is compressed: then features
        are standardised as before, and its vectors keep their codes.

        Args:
            directory: Output directory, created if it does not exist.
            base: Directory of an index.
            new_rows: New row of each entity of that index; -1: its pictures are left out.
            features: Features of further pictures, of the same width, shape (M, C).
            rows: Entity of each further picture, shape (M,).
            num_rows: Number of entities, S.
        """
        old = cls.open(base)
        kept = new_rows[old.entities]
        sources = [(old.features, np.flatnonzero(kept >= 0)), (features, np.arange(len(rows)))]
        all_rows = np.concatenate([kept[kept >= 0], rows]).astype(np.uint32)
        with scratch_array(directory / "merged.tmp", (len(all_rows), old.index.width)) as merged:
            fill_places(merged, np.arange(len(all_rows)), sources)
            if old.index.is_exact:
                return cls.build(directory, merged, all_rows, num_rows, old.index.settings)
            write_features(directory, merged, all_rows)
        np.save(directory / "moments.npy", old.moments)
        DenseIndex.merge(directory, base, new_rows, standardised(features, old.moments), rows, num_rows)
        return cls.open(directory)

    def features_of(self, row: int) -> Features | None:
        """Return the features (C,) of an entity's first picture, not standardised; None without."""
        place = int(np.searchsorted(self.entities, np.uint32(row)))
        if place == len(self.entities) or self.entities[place] != row:
            return None
        return np.array(self.features[place])

    @property
    def width(self) -> int:
        """Vision width, C."""
        return self.index.width

    def nearest(self, features: Sequence[Features | None], limit: int) -> list[list[tuple[int, float]]]:
        """Return (entity, similarity) pairs of the pictures most similar to each query.

        Args:
            features: Features of each query, shape (C,); None finds nothing.
            limit: Number of nearest pictures per query; an entity with several appears once.
        """
        queries = np.zeros((len(features), self.index.width), np.float32)
        for number, values in enumerate(features):
            if values is not None:
                queries[number] = standardised(values, self.moments)
        return self.index.nearest(queries, limit)

    def similarities(self, features: Features, rows: Sequence[int]) -> dict[int, float]:
        """Return the similarity of a picture, of features (C,), with some entities that have pictures."""
        return self.index.similarities(standardised(features, self.moments), rows)


def write_features(
    directory: Path, features: Features, rows: NDArray[np.uint32]
) -> tuple[Features, NDArray[np.uint32]]:
    """Write features (N, C) and their entities (N,) sorted by entity; return both."""
    order = np.argsort(rows, kind="stable")
    ordered = create_array(directory / "features.npy", features.shape)
    for part in chunks(len(order)):
        ordered[part] = features[order[part]]
    entities = rows[order]
    np.save(directory / "entities.npy", entities)
    return ordered, entities


def _moments(features: Features) -> NDArray[np.float32]:
    """Return mean and standard deviation of features (N, C) as an array (2, C)."""
    parts = list(chunks(len(features)))
    mean = sum((features[part].sum(axis=0, dtype=np.float64) for part in parts), np.float64(0)) / len(features)
    squares = (np.square(features[part] - mean).sum(axis=0) for part in parts)
    deviation = np.sqrt(sum(squares, np.float64(0)) / len(features))
    return moments_of(mean, deviation)

"""Similarity of pictures: the cosine of features that are standardised over all demonstrations.

Shapes: N demonstrations, C width of image features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemel_engine.retrieval.table import SIMILARITY_DECIMALS, FloatArray

_SMALLEST = 1e-6


class Pictures:
    """The image features of demonstrations, by row number.

    Attributes:
        is_present: Whether each demonstration has a picture, (N,).
    """

    def __init__(self, features: FloatArray, is_present: NDArray[np.bool_]) -> None:
        """Keep features (N, C); those of a demonstration without a picture may have any values."""
        self._features = features
        self.is_present = is_present

    def __getitem__(self, row: int) -> FloatArray | None:
        """Return the features (C,) of a demonstration; None without a picture."""
        return self._features[row] if self.is_present[row] else None

    def standardised(self, rows: Sequence[int] | NDArray[np.int64]) -> FloatArray:
        """Return the standardised features of demonstrations with pictures, one row each."""
        return standardised(self._features[rows], self._moments)

    def cosines(self, vectors: FloatArray, features: FloatArray) -> FloatArray:
        """Return the cosines of `standardised` pictures (N, C) with one of features (C,), rounded."""
        cosines: FloatArray = np.round(vectors @ standardised(features, self._moments), SIMILARITY_DECIMALS)
        return cosines

    @cached_property
    def _moments(self) -> FloatArray:
        """Mean and standard deviation of the features, (2, C)."""
        present = self._features[self.is_present]
        return moments_of(present.mean(axis=0), present.std(axis=0))


def moments_of(mean: ArrayLike, deviation: ArrayLike) -> FloatArray:
    """Return mean and standard deviation (C,) of features as `standardised` takes them, (2, C)."""
    return np.stack([mean, np.maximum(deviation, _SMALLEST)]).astype(np.float32)


def standardised(features: FloatArray, moments: FloatArray) -> FloatArray:
    """Centre features (..., C), scale them, and normalise them to length one.

    Args:
        features: Features of pictures.
        moments: Result of `moments_of`.
    """
    centred = (features - moments[0]) / moments[1]
    scaled: FloatArray = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), _SMALLEST)
    return scaled.astype(np.float32)

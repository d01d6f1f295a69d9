"""Similarity of pictures: the cosine of features that are standardised over all demonstrations.

Shapes: N demonstrations, C width of image features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gemel_engine.retrieval.table import SIMILARITY_DECIMALS, FloatArray


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
        return self._standardise(self._features[rows])

    def cosines(self, standardised: FloatArray, features: FloatArray) -> FloatArray:
        """Return the cosines of `standardised` pictures with one of features (C,), rounded."""
        cosines: FloatArray = np.round(standardised @ self._standardise(features), SIMILARITY_DECIMALS)
        return cosines

    @cached_property
    def _moments(self) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the features, each (C,)."""
        present = self._features[self.is_present]
        return present.mean(axis=0), present.std(axis=0)

    def _standardise(self, features: FloatArray) -> FloatArray:
        """Centre and scale features (..., C), then scale rows to length 1."""
        mean, deviation = self._moments
        centred = (features - mean) / np.maximum(deviation, 1e-6)
        standardised: FloatArray = centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-6)
        return standardised

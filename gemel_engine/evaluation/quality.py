"""Measure how well a score separates right answers from wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemel_engine.decoding.confidence import Numbers, Outcomes

_NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceQuality:
    """How well a score separates right answers from wrong ones, on mentions it was not fitted on.

    Attributes:
        expected_calibration_error: Mean difference of confidence and accuracy over 10 bins of equal
            size.
        brier_score: Mean squared difference of confidence and outcome.
        area_under_risk_coverage: Mean error rate of the k most confident answers, over all k.
        reliability: (mean confidence, accuracy, number of mentions) of each bin.
        risk_coverage: Points (share of mentions answered, error rate among them), where the most
            confident answers come first.
    """

    expected_calibration_error: float
    brier_score: float
    area_under_risk_coverage: float
    reliability: tuple[tuple[float, float, int], ...]
    risk_coverage: tuple[tuple[float, float], ...]


def quality(confidence: Numbers, is_right: Outcomes) -> ConfidenceQuality:
    """Judge scores between 0 and 1 (N,) by the outcomes (N,); ties keep their order."""
    order = np.argsort(-confidence, kind="stable")
    bins = [part for part in np.array_split(order, _NUM_BINS) if len(part)]
    reliability = tuple((float(confidence[part].mean()), float(is_right[part].mean()), len(part)) for part in bins)
    risk = np.cumsum(~is_right[order]) / np.arange(1, len(order) + 1)
    points = np.unique(np.linspace(0, len(order) - 1, min(len(order), 200)).astype(int))
    return ConfidenceQuality(
        expected_calibration_error=sum(abs(mean - accuracy) * n for mean, accuracy, n in reliability) / len(order),
        brier_score=float(np.mean((confidence - is_right) ** 2)),
        area_under_risk_coverage=float(risk.mean()),
        reliability=reliability,
        risk_coverage=tuple((float((point + 1) / len(order)), float(risk[point])) for point in points),
    )

"""A judged run to show."""

from __future__ import annotations

import math

import numpy as np

from gemel_engine.evaluation.judge import Evaluation, Measured
from gemel_engine.evaluation.quality import ConfidenceQuality

RUN = {
    "rows": 3,
    "errors": {"image": 1},
    "certified_share": 0.5,
    "rollouts_per_mention": 1.5,
    "rows_linked_now": 3,
    "seconds": 2.0,
    "mentions_per_second": 1.5,
    "stage_seconds": {"image": 0.5, "generation": 1.5},
    "prefix_cache_hit_rate": None,
    "engine_unfilled_share": None,
    "feature_mapper": "ridge",
}

COLUMNS = ("certified", "is_nil", "num_rollouts")

NOTHING = Measured(math.nan, math.nan, math.nan, 0)

QUALITY = ConfidenceQuality(
    expected_calibration_error=0.1,
    brier_score=0.2,
    area_under_risk_coverage=0.3,
    reliability=tuple((place, place / 2, 10) for place in np.linspace(0.05, 0.95, 10).tolist()),
    risk_coverage=tuple((place, place / 2) for place in np.linspace(0.005, 1, 200).tolist()),
)


def evaluation(word: str = "bear", figure: Measured = Measured(0.5, 0.25, 0.75, 3)) -> Evaluation:  # noqa: B008
    return Evaluation(
        protocol="entity",
        num_mentions=3,
        num_nil=1,
        num_unknown=1,
        num_errors=1,
        num_without_gold=1,
        accuracy=figure,
        macro_accuracy=figure,
        hits_at_5=figure,
        mean_reciprocal_rank=figure,
        certified_share=figure,
        pool_recall=figure,
        baseline=figure,
        buckets={word: {word: figure, "none": NOTHING}},
    )

"""Fit a calibration to a run over mentions with gold labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel_engine.decoding.confidence import (
    LEAST_SCALE,
    Calibration,
    LogisticModel,
    Numbers,
    Outcomes,
    evidence_of,
    scoring_settings,
)
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.evaluation.gold import entities_to_judge, read_gold, surface_forms
from gemel_engine.evaluation.judge import Judge
from gemel_engine.evaluation.quality import quality
from gemel_engine.evaluation.run import LinkedRun
from gemel_engine.extras import extra

_NUM_FOLDS = 5
_FREEDOMS = (1.0, 0.3, 0.1, 0.03, 0.01)  # inverse strengths of regularisation
_LEAST = 20  # least number of mentions of each outcome for fitting
_LEAST_CALLED = 10  # least number of mentions called NIL for which a precision is computed

Folds = list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]


def fit_calibration(
    predictions: pa.Table,
    surface_forms: Sequence[str],
    is_right: Outcomes,
    is_nil: Outcomes,
    *,
    scoring: Mapping[str, Any],
    nil_precision: float = 0.8,
) -> Calibration:
    """Fit a calibration to the predictions of a run.

    Args:
        predictions: N rows of `PREDICTION_SCHEMA`; rows without a log-prob are ignored.
        surface_forms: Surface forms of the mentions (N). Mentions of one form share their
            demonstrations, so cross-validation keeps them in one fold.
        is_right: Whether each answer is right (N,).
        is_nil: Whether each mention's entity is not in the knowledge base (N,).
        scoring: Result of `scoring_settings` for the run.
        nil_precision: Required precision of `is_nil`, measured by cross-validation.

    Raises:
        InputError: An outcome has too few mentions, or they have too few surface forms.
        ConfigurationError: No threshold reaches the required precision.
    """
    usable = np.array(predictions["log_prob"].is_valid())
    surface_forms = list(compress(surface_forms, usable))
    evidence, forms = evidence_of(predictions.filter(usable), surface_forms), np.unique_inverse(surface_forms)[1]
    is_right, is_nil = is_right[usable], is_nil[usable]
    if min(is_right.sum(), (~is_right).sum()) < _LEAST:
        raise InputError(
            f"{is_right.sum()} of {len(is_right)} answers are right: calibration needs at least {_LEAST} right and "
            f"{_LEAST} wrong ones; link more mentions with gold labels"
        )
    right, left_out = _fitted(evidence, is_right, forms)
    judged = quality(left_out, is_right)
    fitted_on = {
        "num_mentions": float(len(is_right)),
        "accuracy": float(is_right.mean()),
        "expected_calibration_error": judged.expected_calibration_error,
        "brier_score": judged.brier_score,
    }
    nil, threshold = None, None
    if is_nil.sum() >= _LEAST:
        nil, left_out = _fitted(evidence, is_nil, forms)
        threshold, reached = _threshold(left_out, is_nil, nil_precision)
        fitted_on |= {"num_nil": float(is_nil.sum()), **reached}
    return Calibration(
        right=right,
        nil=nil,
        nil_threshold=threshold,
        scoring=dict(scoring),
        fitted_on=fitted_on,
    )


def fit_logistic(evidence: Numbers, outcomes: Outcomes, freedom: float) -> LogisticModel:
    """Fit a logistic regression to evidence (N, F) and outcomes (N,).

    `freedom` is the inverse strength of regularisation: a smaller one keeps weights nearer to 0.
    """
    with extra("report"):
        from sklearn.linear_model import LogisticRegression  # slow to import, rarely needed

    mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
    scale = np.where(scale > LEAST_SCALE, scale, 1.0)
    fitted = LogisticRegression(C=freedom, max_iter=1000).fit((evidence - mean) / scale, outcomes)
    return LogisticModel(
        mean=tuple(mean.tolist()),
        scale=tuple(scale.tolist()),
        weights=tuple(fitted.coef_[0].tolist()),
        bias=float(fitted.intercept_[0]),
    )


def _fitted(evidence: Numbers, outcomes: Outcomes, forms: npt.NDArray[np.intp]) -> tuple[LogisticModel, Numbers]:
    """Fit a model with the regularisation that cross-validation prefers.

    Returns:
        The model fitted to all mentions, and the cross-validated probability of each mention (N,).
    """
    with extra("report"):
        from sklearn.metrics import log_loss

    folds = _folds(evidence, outcomes, forms)
    left_out = {freedom: _left_out(evidence, outcomes, folds, freedom) for freedom in _FREEDOMS}
    best = min(left_out, key=lambda freedom: log_loss(outcomes, left_out[freedom]))
    return fit_logistic(evidence, outcomes, best), left_out[best]


def _folds(evidence: Numbers, outcomes: Outcomes, forms: npt.NDArray[np.intp]) -> Folds:
    """Split mentions into folds (fitted, judged) that share no surface form."""
    with extra("report"):
        from sklearn.model_selection import StratifiedGroupKFold

    folds = StratifiedGroupKFold(_NUM_FOLDS, shuffle=True, random_state=0)
    splits = list(folds.split(evidence, outcomes, forms)) if len(np.unique(forms)) >= _NUM_FOLDS else []
    if not splits or any(len(np.unique(outcomes[fitted])) < 2 for fitted, _ in splits):
        raise InputError(
            "the mentions of one outcome are of too few surface forms to judge a calibration by others: link more "
            "mentions with gold labels"
        )
    return splits


def _left_out(evidence: Numbers, outcomes: Outcomes, folds: Folds, freedom: float) -> Numbers:
    """Return the probability of each mention by a model fitted without its surface form."""
    probabilities = np.empty(len(outcomes))
    for fitted, judged in folds:
        probabilities[judged] = fit_logistic(evidence[fitted], outcomes[fitted], freedom)(evidence[judged])
    return probabilities


def _threshold(probabilities: Numbers, is_nil: Outcomes, wanted: float) -> tuple[float, dict[str, float]]:
    """Return the lowest threshold that reaches a wanted precision, and the metrics at it."""
    with extra("report"):
        from sklearn.metrics import precision_recall_curve, roc_auc_score

    precision, recall, thresholds = precision_recall_curve(is_nil, probabilities)
    num_called = len(probabilities) - np.searchsorted(np.sort(probabilities), thresholds)
    can_tell = num_called >= _LEAST_CALLED
    reaching = np.flatnonzero(can_tell & (precision[:-1] >= wanted))
    if not len(reaching):
        raise ConfigurationError(
            f"no threshold finds NIL with precision {wanted} among {_LEAST_CALLED} mentions or more; the highest "
            f"precision there is {precision[:-1][can_tell].max():.2f}: ask for less"
        )
    first = reaching[0]
    return float(thresholds[first]), {
        "nil_auc": float(roc_auc_score(is_nil, probabilities)),
        "nil_precision": float(precision[first]),
        "nil_recall": float(recall[first]),
    }


def calibrate_run(linked: LinkedRun, *, gold: str | None = None, nil_precision: float) -> Calibration:
    """Fit a calibration to a run over mentions with gold labels.

    Args:
        linked: The run.
        gold: Parquet file or directory with gold labels (see `read_gold`); the run's input by
            default.
        nil_precision: Required precision of `is_nil` (see `fit_calibration`).

    Raises:
        InputError: There are no labels, an outcome has too few mentions, or mentions have
            `candidate_ids`.
        ConfigurationError: No threshold of NIL reaches the required precision.
    """
    corpus = linked.settings["input"]
    labelled = read_gold(gold or corpus, corpus, stored_names=linked.stored_names)
    if "candidate_ids" in labelled.column_names and labelled["candidate_ids"].null_count < len(labelled):
        raise InputError(
            "some mentions of the run have candidate_ids, and a search over a few names gives other evidence than one "
            "over all: fit the calibration on a run without candidates"
        )
    entities = entities_to_judge(linked.open_knowledge_base(), labelled, [linked.predictions])
    predictions, is_right, is_nil = Judge(labelled, entities=entities).outcomes(linked.predictions)
    return fit_calibration(
        predictions,
        surface_forms(labelled, predictions),
        is_right,
        is_nil,
        nil_precision=nil_precision,
        scoring=scoring_settings(linked.settings),
    )

"""Fit a calibration to a run over mentions with gold labels."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gemel_engine.decoding.confidence import (
    EVIDENCE,
    LEAST_SCALE,
    Calibration,
    LogisticModel,
    Numbers,
    Outcomes,
    Term,
    evidence_of,
    scoring_settings,
)
from gemel_engine.errors import InputError
from gemel_engine.evaluation.answers import Answers, RankedAnswers, answers_of_model
from gemel_engine.evaluation.gold import entities_to_judge, read_gold, surface_forms
from gemel_engine.evaluation.judge import Judge
from gemel_engine.evaluation.quality import quality
from gemel_engine.evaluation.run import LinkedRun
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.extras import extra

logger = logging.getLogger(__name__)

NIL_SHARE = 0.2  # of the surface forms, whose entities are held out where labels have too few NIL

_SEED = 0
_NUM_FOLDS = 5
_FREEDOMS = (1.0, 0.3, 0.1, 0.03, 0.01)  # inverse strengths of regularisation
_SOURCES = (("is_asked", "logit_certainty"), EVIDENCE)  # of confidence, by the score: few numbers, or all
_LEAST = 20  # least number of mentions of each outcome for fitting
_LEAST_CALLED = 10  # least number of mentions called NIL for which a precision is computed

Folds = list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]


def calibrate_run(linked: LinkedRun, *, gold: str | None = None, nil_precision: float = 0.8) -> Calibration:
    """Fit a calibration to a run over mentions with gold labels.

    Args:
        linked: The run.
        gold: Table file or directory with gold labels (see `read_gold`); the run's input by
            default.
        nil_precision: Required precision of `is_nil`, measured by cross-validation. If no threshold
            reaches it, there is none.

    Raises:
        InputError: There are no labels, an outcome has too few mentions or surface forms, mentions
            have `candidate_ids`, or a run by the score has no candidate pools.
        ArtifactError: The knowledge base of the run was replaced.
    """
    linked.check_knowledge_base()
    corpus = linked.settings["input"]
    labelled = read_gold(gold or corpus, corpus, stored_names=linked.stored_names, with_pictures=False)
    if "candidate_ids" in labelled.column_names and labelled["candidate_ids"].null_count < len(labelled):
        raise InputError(
            "some mentions of the run have candidate_ids, and a search over a few names gives other evidence than one "
            "over all: fit the calibration on a run without candidates"
        )
    knowledge_base = linked.open_knowledge_base()
    judge = Judge(labelled, entities=entities_to_judge(knowledge_base, labelled, [linked.predictions]))
    rows, *_ = judge.outcomes(linked.predictions)
    gold_ids = judge.verdicts(linked.predictions)["entity_id"].to_pylist()
    usable = np.array(rows["error"].is_null())
    rows, gold_ids = rows.filter(pa.array(usable)), list(compress(gold_ids, usable))
    forms, scoring = surface_forms(labelled, rows), scoring_settings(linked.settings)
    contents = linked.checksums()
    if scoring["score"]["kind"] == "language_model":
        answers = answers_of_model(rows, forms, gold_ids)
        return fit_calibration(answers, answers, None, nil_precision, scoring=scoring, contents=contents)
    if not any(pool.as_py() for pool in rows["pool"]):
        raise InputError(
            f"no row of {linked.output} has a candidate pool, so that no score can be fitted: build the knowledge base "
            'with an evidence index, or set score.kind = "language_model", and link again'
        )
    ranked = RankedAnswers(rows, forms, gold_ids, knowledge_base)
    answers = of_nil = ranked.answers()
    if gold_ids.count(None) < _LEAST:
        of_nil = ranked.answers(held_out(forms))
    return fit_calibration(answers, of_nil, ranked.weights, nil_precision, scoring=scoring, contents=contents)


def held_out(forms: Sequence[str]) -> frozenset[str]:
    """Return the surface forms whose entities are held out, to learn what NIL looks like."""
    distinct = sorted(set(forms))
    return frozenset(random.Random(_SEED).sample(distinct, round(NIL_SHARE * len(distinct))))


def fit_calibration(
    answers: Answers,
    of_nil: Answers,
    weights: ScoreWeights | None,
    nil_precision: float,
    *,
    scoring: Mapping[str, Any],
    contents: Mapping[str, str],
) -> Calibration:
    """Fit a calibration to answers.

    Mentions of one surface form share their demonstrations and candidates, so cross-validation
    keeps them in one fold.

    Args:
        answers: Answers to labelled mentions.
        of_nil: Answers among which some are of NIL; NIL is not fitted if there are too few.
        weights: Weights of the score by which the answers were ranked; None: there is no score.
        nil_precision: Required precision of `is_nil`, measured by cross-validation.
        scoring: Result of `scoring_settings` for the run.
        contents: See `Calibration`.

    Raises:
        InputError: An outcome has too few mentions, or they have too few surface forms.
    """
    is_right, are_final = answers.are_right, answers.are_final
    num_right, num_final = int(is_right[are_final].sum()), int(are_final.sum())
    if min(num_right, num_final - num_right) < _LEAST:
        raise InputError(
            f"{num_right} of {num_final} answers are right: calibration needs at least {_LEAST} right and {_LEAST} "
            "wrong ones; link more mentions with gold labels"
        )
    right, left_out = _fitted(answers, is_right, _SOURCES if weights is not None else _SOURCES[-1:])
    judged = quality(left_out[are_final], is_right[are_final])
    fitted_on = {
        "num_mentions": float(num_final),
        "accuracy": num_right / num_final,
        "expected_calibration_error": judged.expected_calibration_error,
        "brier_score": judged.brier_score,
        "area_under_risk_coverage": judged.area_under_risk_coverage,
    }
    nil, threshold = None, None
    are_nil = of_nil.are_nil
    if are_nil[of_nil.are_final].sum() >= _LEAST:
        nil, left_out = _fitted(of_nil, are_nil, _SOURCES[-1:])
        final = of_nil.are_final
        threshold, reached = _threshold(left_out[final], are_nil[final], nil_precision)
        are_held_out = float(of_nil is not answers)
        fitted_on |= {"num_nil": float(are_nil[final].sum()), "nil_held_out": are_held_out, "seed": float(_SEED)}
        fitted_on |= reached
    return Calibration(
        weights=weights,
        right=right,
        nil=nil,
        nil_threshold=threshold,
        scoring=dict(scoring),
        contents=dict(contents),
        fitted_on=fitted_on,
    )


def fit_logistic(
    evidence: Numbers, outcomes: Outcomes, freedom: float, source: Sequence[str] = EVIDENCE
) -> LogisticModel:
    """Fit a logistic regression.

    Args:
        evidence: Numbers of evidence, (N, F).
        outcomes: Outcomes, (N,).
        freedom: Inverse strength of regularisation: a smaller one keeps weights nearer to 0.
        source: Names of the numbers that are used.
    """
    with extra("report"):
        from sklearn.linear_model import LogisticRegression  # slow to import, rarely needed

    mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
    varies = np.flatnonzero((scale > LEAST_SCALE) & np.isin(EVIDENCE, source))
    if not len(varies):
        return LogisticModel(terms={}, bias=float(np.log(outcomes.mean() / (1 - outcomes.mean()))))
    standardised = (evidence[:, varies] - mean[varies]) / scale[varies]
    fitted = LogisticRegression(C=freedom, max_iter=1000).fit(standardised, outcomes)
    columns = zip(varies.tolist(), fitted.coef_[0].tolist(), strict=True)
    terms = {EVIDENCE[c]: Term(mean=float(mean[c]), scale=float(scale[c]), weight=weight) for c, weight in columns}
    return LogisticModel(terms=terms, bias=float(fitted.intercept_[0]))


def _fitted(answers: Answers, outcomes: Outcomes, sources: Sequence[Sequence[str]]) -> tuple[LogisticModel, Numbers]:
    """Fit a model with the evidence and the regularisation that cross-validation prefers.

    Returns:
        The model fitted to all answers, and the cross-validated probability of each (N,).
    """
    with extra("report"):
        from sklearn.metrics import log_loss

    evidence, forms = evidence_of(answers.predictions, answers.forms), np.unique_inverse(answers.forms)[1]
    folds = _folds(evidence, outcomes, forms)
    left_out = {
        (tuple(source), freedom): _left_out(evidence, outcomes, folds, freedom, source)
        for source in sources
        for freedom in _FREEDOMS
    }
    best = min(left_out, key=lambda choice: log_loss(outcomes, left_out[choice]))
    return fit_logistic(evidence, outcomes, best[1], best[0]), left_out[best]


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


def _left_out(evidence: Numbers, outcomes: Outcomes, folds: Folds, freedom: float, source: Sequence[str]) -> Numbers:
    """Return the probability of each mention by a model fitted without its surface form."""
    probabilities = np.empty(len(outcomes))
    for fitted, judged in folds:
        probabilities[judged] = fit_logistic(evidence[fitted], outcomes[fitted], freedom, source)(evidence[judged])
    return probabilities


def _threshold(probabilities: Numbers, is_nil: Outcomes, wanted: float) -> tuple[float | None, dict[str, float]]:
    """Return the lowest threshold that reaches a wanted precision, None without one, and the metrics."""
    with extra("report"):
        from sklearn.metrics import precision_recall_curve, roc_auc_score

    found = {"nil_auc": float(roc_auc_score(is_nil, probabilities))}
    precision, recall, thresholds = precision_recall_curve(is_nil, probabilities)
    num_called = len(probabilities) - np.searchsorted(np.sort(probabilities), thresholds)
    can_tell = num_called >= _LEAST_CALLED
    reaching = np.flatnonzero(can_tell & (precision[:-1] >= wanted))
    if not len(reaching):
        logger.warning(
            "no threshold finds NIL with precision %g among %d mentions or more; the highest precision there is %.2f: "
            "is_nil stays empty; fit again with a lower one",
            wanted,
            _LEAST_CALLED,
            precision[:-1][can_tell].max(),
        )
        return None, found
    first = reaching[0]
    found |= {"nil_precision": float(precision[first]), "nil_recall": float(recall[first])}
    return float(thresholds[first]), found

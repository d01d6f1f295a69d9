"""Turns what a search says of its answer into the probability that the answer is right, and into NIL.

    calibration.json    two logistic regressions, the threshold of NIL, the settings of the run that they were fitted on

Fitted on linked mentions with gold labels. The evidence of an answer is its row of the output and the mention's surface
form, so fitting needs no model and applying costs nothing. What the search calls `probability` is the share of a name
among names; how often the best name is the right one is another question, and has to be learnt from mentions of which
one knows.

N mentions, F pieces of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.extras import extra
from gemel_engine.manifest import claimed, parse_manifest, read_manifest, write_manifest
from gemel_engine.types import Prediction, predictions_to_table

FORMAT_VERSION = 3
EVIDENCE = (
    "logit_probability",
    "log_prob",
    "log_unexplored_mass",
    "margin",
    "has_margin",
    "log_name_length",
    # Of the demonstrations in the prompt: those that show the answer's entity, and how many entities they show.
    "supporting_share",
    "is_supported",
    "is_supported_by_last",
    "entities_per_demonstration",
    "name_similarity",  # of the surface form and the answer's name
)

_MANIFEST = "calibration.json"
_SECTIONS = ("language_model", "prompt", "retrieval", "search")  # of a run's settings
_NUM_BINS = 10
_NUM_FOLDS = 5
_FREEDOMS = (1.0, 0.3, 0.1, 0.03, 0.01)  # inverse strengths of regularisation
_LEAST = 20  # mentions of each outcome, below which nothing is fitted
_LEAST_SCALE = 1e-6  # a smaller deviation is one of rounding, and would make a weight of it
_LEAST_CALLED = 10  # mentions called NIL, below which their precision says nothing
_HIGHEST_MARGIN = 10.0  # nats; what lies above says no more
_COMPARED = 100  # characters of a surface form and a name

Numbers = npt.NDArray[np.float64]
Outcomes = npt.NDArray[np.bool_]
Folds = list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]


_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# Evidence is at most thousands in size: with these limits no product of numbers gets near the end of float64.
Coefficient = Annotated[float, Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Field(ge=_LEAST_SCALE, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class LogisticModel:
    """A logistic regression on standardised evidence, one number for each of `EVIDENCE`.

    Attributes:
        mean: Of the evidence where it was fitted.
        scale: Its deviations; evidence that hardly varied has 1.
        weights: Of the standardised evidence.
        bias: Log-odds where all evidence is at its mean.
    """

    mean: tuple[Coefficient, ...]
    scale: tuple[Scale, ...]
    weights: tuple[Coefficient, ...]
    bias: Coefficient

    def __post_init__(self) -> None:
        if {len(self.mean), len(self.scale), len(self.weights)} != {len(EVIDENCE)}:
            raise ValueError(f"mean, scale and weights must be {len(EVIDENCE)} numbers each")

    @classmethod
    def fit(cls, evidence: Numbers, outcomes: Outcomes, freedom: float) -> Self:
        """Fit to evidence (N, F) and outcomes (N,); the smaller `freedom`, the more the weights are kept near 0."""
        with extra("report"):
            from sklearn.linear_model import LogisticRegression  # takes a second to import, and only fitting needs it

        mean, scale = evidence.mean(axis=0), evidence.std(axis=0)
        scale = np.where(scale > _LEAST_SCALE, scale, 1.0)
        fitted = LogisticRegression(C=freedom, max_iter=1000).fit((evidence - mean) / scale, outcomes)
        return cls(
            mean=tuple(mean.tolist()),
            scale=tuple(scale.tolist()),
            weights=tuple(fitted.coef_[0].tolist()),
            bias=float(fitted.intercept_[0]),
        )

    def __call__(self, evidence: Numbers) -> Numbers:
        """Probabilities (N,) for evidence (N, F)."""
        log_odds = (evidence - self.mean) / self.scale @ np.array(self.weights) + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -700, 700))), np.float64)


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Calibration:
    """What was fitted.

    Attributes:
        right: Probability that the entity is the right one.
        nil: Probability that the knowledge base lacks the mention's entity; None if no mention taught it.
        nil_threshold: `is_nil` is true from this probability on.
        scoring: Settings that shape the evidence; see `scoring_settings`.
        fitted_on: Counts, and how well it did on mentions left out of fitting in turn.
    """

    right: LogisticModel
    nil: LogisticModel | None
    nil_threshold: Share | None
    scoring: dict[str, dict[str, Any]]
    fitted_on: dict[str, float]

    def __post_init__(self) -> None:
        if (self.nil is None) != (self.nil_threshold is None):
            raise ValueError("nil and nil_threshold must both be given, or neither")
        if self.scoring.keys() != {*_SECTIONS} or not all(self.scoring.values()):
            raise ValueError(f"scoring must have settings of {', '.join(_SECTIONS)}")

    @classmethod
    def fit(
        cls,
        predictions: pa.Table,
        surface_forms: Sequence[str],
        is_right: Outcomes,
        is_nil: Outcomes,
        *,
        scoring: Mapping[str, Any],
        nil_precision: float = 0.8,
    ) -> Self:
        """Fit to a run over mentions with gold labels.

        Args:
            predictions: N rows of `PREDICTION_SCHEMA`; those with an error are left out.
            surface_forms: Of the mentions (N). Those of one form share their demonstrations, so they are left out of
                fitting together where it is judged.
            is_right: Whether each answer is right (N,).
            is_nil: Whether each mention's entity is not in the knowledge base (N,).
            scoring: `scoring_settings` of the run.
            nil_precision: The share of `is_nil` that shall be true, on mentions left out of fitting.

        Raises:
            InputError: There are too few mentions of an outcome, or they are of too few surface forms.
            ConfigurationError: No threshold reaches that precision.
        """
        usable = np.array(predictions["error"].is_null())
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
        return cls(
            right=right,
            nil=nil,
            nil_threshold=threshold,
            scoring=dict(scoring),
            fitted_on=fitted_on,
        )

    def apply(self, predictions: Sequence[Prediction], surface_forms: Sequence[str]) -> list[Prediction]:
        """Set `confidence`, `nil_probability` and `is_nil` of all predictions without an error."""
        has_answer = [prediction.error is None for prediction in predictions]
        usable = list(compress(predictions, has_answer))
        evidence = evidence_of(predictions_to_table(usable), list(compress(surface_forms, has_answer)))
        right = self.right(evidence).tolist()
        nil = self.nil(evidence).tolist() if self.nil is not None else [None] * len(usable)
        judged = iter(
            replace(
                prediction,
                confidence=confidence,
                nil_probability=nil_probability,
                is_nil=None if nil_probability is None else nil_probability >= self.nil_threshold,
            )
            for prediction, confidence, nil_probability in zip(usable, right, nil, strict=True)
        )
        return [next(judged) if prediction.error is None else prediction for prediction in predictions]

    def save(self, directory: Path) -> None:
        """Write `calibration.json`."""
        with claimed(directory, must_be_empty=False):
            write_manifest(directory / _MANIFEST, FORMAT_VERSION, asdict(self))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactError: It is missing, changed, of another format version, or has values that no fit gives.
        """
        path = directory / _MANIFEST
        return parse_manifest(read_manifest(path, FORMAT_VERSION), cls, path)

    def check_scoring(self, settings: Mapping[str, Any]) -> None:
        """See that a run gives the evidence that this was fitted on.

        Raises:
            ConfigurationError: The run has other settings.
        """
        differences = [
            f"{section}.{key}"
            for section, theirs in scoring_settings(settings).items()
            for key in theirs
            if self.scoring[section].get(key) != theirs[key]
        ]
        if differences:
            raise ConfigurationError(
                f"the calibration was fitted on a run with other settings of {', '.join(differences)}: fit it again on "
                "a run with these, or leave it out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfidenceQuality:
    """How well a score tells right answers from wrong ones, on mentions that it was not fitted on.

    Attributes:
        expected_calibration_error: Mean distance of confidence and accuracy over 10 bins of equal mass.
        brier_score: Mean squared distance of confidence and outcome.
        area_under_risk_coverage: Mean error rate of the k most confident answers, over all k.
        reliability: (mean confidence, accuracy, mentions) of each bin.
        risk_coverage: (share of mentions answered, error rate among them), the most confident first.
    """

    expected_calibration_error: float
    brier_score: float
    area_under_risk_coverage: float
    reliability: tuple[tuple[float, float, int], ...]
    risk_coverage: tuple[tuple[float, float], ...]


def scoring_settings(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of a run's settings, as in its `_run.json`, on which its evidence depends; no addresses."""
    retrieval = {key: value for key, value in settings["retrieval"].items() if key != "mention_encoder"}
    model = {"name": Path(settings["language_model"]["name"]).name}
    search = {key: value for key, value in settings["search"].items() if key != "width"}
    return {"language_model": model, "prompt": settings["prompt"], "retrieval": retrieval, "search": search}


def evidence_of(predictions: pa.Table, surface_forms: Sequence[str]) -> Numbers:
    """What speaks for and against the answers to N mentions, (N, F) in the order of `EVIDENCE`."""
    columns = {name: np.array(predictions[name].to_numpy(), np.float64) for name in ("probability", "log_prob")}
    probability = np.clip(columns["probability"], 1e-9, 1 - 1e-9)
    unexplored = np.clip(np.array(predictions["unexplored_mass"].to_numpy(), np.float64), 1e-9, 1.0)
    margin = np.array(predictions["margin"].to_numpy(), np.float64)  # NaN where one name was found
    has_margin = ~np.isnan(margin)
    shown = [ids or [] for ids in predictions["demonstration_entity_ids"].to_pylist()]
    answers = predictions["entity_id"].to_pylist()
    names = predictions["entity_name"].to_pylist()
    lengths = np.array([len(name) for name in names], np.float64)
    return np.column_stack(
        [
            np.log(probability / (1 - probability)),
            columns["log_prob"],
            np.log(unexplored),
            np.where(has_margin, np.minimum(margin, _HIGHEST_MARGIN), 0.0),
            has_margin,
            np.log(np.maximum(lengths, 1.0)),
            [ids.count(answer) / max(1, len(ids)) for ids, answer in zip(shown, answers, strict=True)],
            [answer in ids for ids, answer in zip(shown, answers, strict=True)],
            [ids[-1:] == [answer] for ids, answer in zip(shown, answers, strict=True)],
            [len(set(ids)) / max(1, len(ids)) for ids in shown],
            [_similarity(form, name) for form, name in zip(surface_forms, names, strict=True)],
        ]
    ).reshape(-1, len(EVIDENCE))


def _similarity(form: str, name: str) -> float:
    """Share of the characters of both that stand in common blocks, in any case."""
    return SequenceMatcher(None, form[:_COMPARED].casefold(), name[:_COMPARED].casefold(), autojunk=False).ratio()


def quality(confidence: Numbers, is_right: Outcomes) -> ConfidenceQuality:
    """Judge a score between 0 and 1 (N,) by the outcomes (N,); ties keep their order."""
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


def _fitted(evidence: Numbers, outcomes: Outcomes, forms: npt.NDArray[np.intp]) -> tuple[LogisticModel, Numbers]:
    """A model as free as is best for mentions that are left out, and the probabilities that it gives these."""
    with extra("report"):
        from sklearn.metrics import log_loss

    folds = _folds(evidence, outcomes, forms)
    left_out = {freedom: _left_out(evidence, outcomes, folds, freedom) for freedom in _FREEDOMS}
    best = min(left_out, key=lambda freedom: log_loss(outcomes, left_out[freedom]))
    return LogisticModel.fit(evidence, outcomes, best), left_out[best]


def _folds(evidence: Numbers, outcomes: Outcomes, forms: npt.NDArray[np.intp]) -> Folds:
    """Mentions to fit to and mentions to judge, none of which has a surface form of the others."""
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
    """The probability of each mention by a model that was fitted without any mention of its surface form."""
    probabilities = np.empty(len(outcomes))
    for fitted, judged in folds:
        probabilities[judged] = LogisticModel.fit(evidence[fitted], outcomes[fitted], freedom)(evidence[judged])
    return probabilities


def _threshold(probabilities: Numbers, is_nil: Outcomes, wanted: float) -> tuple[float, dict[str, float]]:
    """The lowest threshold of that precision, and what is reached with it."""
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

"""What a labelled run teaches: weights of the score, confidence in answers, and the decision for NIL.

    calibration.json    weights, two logistic regressions, the NIL threshold, and what the run was
                        on which they were fitted

A calibration is fitted on linked mentions with gold labels. The evidence for an answer comes from
its output row and the mention's surface form, so neither fitting nor applying needs a model.

N mentions, F numbers of evidence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from difflib import SequenceMatcher
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.errors import ConfigurationError
from gemel_engine.evidence.features import FEATURES, features_of
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.storage.manifest import claimed, parse_manifest, read_manifest, write_manifest
from gemel_engine.types import CARD_PREFIX, Prediction

FORMAT_VERSION = 4
EVIDENCE = (
    # Of the language model; 0 where evidence decided alone.
    "is_asked",
    "logit_probability",
    "log_prob",
    "log_unexplored_mass",
    # Of the ranking.
    "margin",
    "has_margin",
    "log_name_length",
    "name_similarity",  # between the surface form and the answer's name
    # Demonstrations in the prompt, without cards: the share with the answer's entity, whether any and whether the
    # last one has it, and the number of different entities per demonstration.
    "supporting_share",
    "is_supported",
    "is_supported_by_last",
    "entities_per_demonstration",
    # Of the candidate pool; 0 without one. Not its size: it would betray an entity that was held out for fitting.
    "logit_certainty",  # share of the answer in the softmax of the scores
    "bonus",
    *(f"answer_{name}" for name in FEATURES),
    *(f"lead_{name}" for name in FEATURES),  # of the answer before the second candidate
)

MANIFEST = "calibration.json"
_SECTIONS = ("language_model", "prompt", "retrieval", "search", "score")  # sections of a run's settings

LEAST_SCALE = 1e-6  # a smaller deviation is a rounding error, and dividing by it would amplify it

_HIGHEST_MARGIN = 10.0  # nats; higher margins are cut to this
_COMPARED = 100  # number of characters compared of a surface form and a name

Numbers = npt.NDArray[np.float64]
Outcomes = npt.NDArray[np.bool_]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# Evidence is at most in the thousands: within these limits no product can overflow float64.
Coefficient = Annotated[float, Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Field(ge=LEAST_SCALE, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Term:
    """One number of evidence in a logistic regression.

    Attributes:
        mean: Mean on the mentions used for fitting.
        scale: Standard deviation on these mentions.
        weight: Weight of the standardised number.
    """

    mean: Coefficient
    scale: Scale
    weight: Coefficient


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class LogisticModel:
    """A logistic regression on standardised evidence.

    Attributes:
        terms: Numbers of evidence by their names in `EVIDENCE`; a missing one has no weight.
        bias: Log-odds when all evidence is at its mean.
    """

    terms: dict[str, Term]
    bias: Coefficient

    def __post_init__(self) -> None:
        if unknown := sorted(self.terms.keys() - set(EVIDENCE)):
            raise ValueError(f"this release has no evidence {unknown[0]!r}")

    def __call__(self, evidence: Numbers) -> Numbers:
        """Return probabilities (N,) for evidence (N, F)."""
        log_odds = np.full(len(evidence), self.bias)
        for name, term in self.terms.items():
            log_odds += (evidence[:, EVIDENCE.index(name)] - term.mean) / term.scale * term.weight
        return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -700, 700))), np.float64)


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Calibration:
    """What was fitted to a labelled run.

    Attributes:
        weights: Weights of the score; None if the language model ranks alone.
        right: Model of the probability that the entity is the right one.
        nil: Model of the probability that the knowledge base lacks the mention's entity; None if it
            was fitted without such mentions.
        nil_threshold: Lowest probability at which `is_nil` is true; None: it stays empty.
        scoring: Settings on which the evidence depends; see `scoring_settings`.
        contents: Fingerprint of the run's language model, and checksums of its knowledge base, its
            input and its weights, by name, as far as the run recorded them.
        fitted_on: Counts of mentions, and quality measured by cross-validation.
    """

    weights: ScoreWeights | None
    right: LogisticModel
    nil: LogisticModel | None
    nil_threshold: Share | None
    scoring: dict[str, dict[str, Any]]
    contents: dict[str, str]
    fitted_on: dict[str, float]

    def __post_init__(self) -> None:
        if self.nil is None and self.nil_threshold is not None:
            raise ValueError("nil_threshold needs nil")
        if self.scoring.keys() != {*_SECTIONS} or not all(self.scoring.values()):
            raise ValueError(f"scoring must have settings of {', '.join(_SECTIONS)}")

    def apply(self, predictions: Sequence[Prediction], surface_forms: Sequence[str]) -> list[Prediction]:
        """Return predictions with `confidence` and the NIL fields; rows with an error stay as they are."""
        has_answer = [prediction.entity_id is not None for prediction in predictions]
        usable = list(compress(predictions, has_answer))
        evidence = evidence_of(usable, list(compress(surface_forms, has_answer)))
        right = self.right(evidence).tolist()
        nil = self.nil(evidence).tolist() if self.nil is not None else [None] * len(usable)
        judged = iter(
            replace(
                prediction,
                confidence=confidence,
                nil_probability=nil_probability,
                is_nil=None if self.nil_threshold is None else nil_probability >= self.nil_threshold,
            )
            for prediction, confidence, nil_probability in zip(usable, right, nil, strict=True)
        )
        return [
            next(judged) if is_linked else prediction
            for prediction, is_linked in zip(predictions, has_answer, strict=True)
        ]

    def save(self, directory: Path) -> None:
        """Write `calibration.json`."""
        with claimed(directory, must_be_empty=False):
            write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(self))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactError: It is missing, changed, of another format version, or has values that no
                fit produces.
        """
        path = directory / MANIFEST
        return parse_manifest(read_manifest(path, FORMAT_VERSION), cls, path)

    def check_scoring(self, settings: Mapping[str, Any]) -> None:
        """Validate that a run produces the same kind of evidence as the run used for fitting.

        Raises:
            ConfigurationError: The settings that shape the evidence differ.
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


def scoring_settings(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return those settings of a run's `_run.json` that shape its evidence, without addresses.

    The accepted risk is none of them: a calibration knows answers with and without the language
    model.
    """
    left_out = {"mention_encoder", "exclude_group"}
    retrieval = {key: value for key, value in settings["retrieval"].items() if key not in left_out}
    model = {"name": Path(settings["language_model"]["name"]).name}
    search = {key: value for key, value in settings["search"].items() if key != "width"}
    kind = (settings.get("score") or {"kind": "language_model"})["kind"]  # runs of before the score
    return {
        "language_model": model,
        "prompt": settings["prompt"],
        "retrieval": retrieval,
        "search": search,
        "score": {"kind": kind},
    }


def evidence_of(predictions: Sequence[Prediction], surface_forms: Sequence[str]) -> Numbers:
    """Return the evidence for and against N answers: (N, F), in the order of `EVIDENCE`.

    `confidence` must not be calibrated yet.
    """
    rows = [_evidence(*pair) for pair in zip(predictions, surface_forms, strict=True)]
    return np.array(rows, np.float64).reshape(-1, len(EVIDENCE))


def _evidence(prediction: Prediction, form: str) -> list[float]:
    name, margin = prediction.entity_name or "", prediction.margin
    return [
        *_of_language_model(prediction),
        0.0 if margin is None else min(margin, _HIGHEST_MARGIN),
        float(margin is not None),
        float(np.log(max(len(name), 1))),
        _similarity(form, name),
        *_of_demonstrations(prediction),
        *_of_pool(prediction, form),
    ]


def _of_language_model(prediction: Prediction) -> list[float]:
    if prediction.log_prob is None:
        return [0.0] * 4
    unexplored = np.clip(prediction.unexplored_mass or 0.0, 1e-9, 1.0)
    return [1.0, _logit(prediction.probability or 0.0), prediction.log_prob, float(np.log(unexplored))]


def _of_demonstrations(prediction: Prediction) -> list[float]:
    """Return what the demonstrations in the prompt say of the answer; a card supports no answer."""
    pairs = zip(prediction.demonstration_ids, prediction.demonstration_entity_ids, strict=False)  # old: no entities
    shown = [entity_id for shown_id, entity_id in pairs if not shown_id.startswith(CARD_PREFIX)]
    answer, number = prediction.entity_id, max(1, len(shown))
    return [shown.count(answer or "") / number, answer in shown, shown[-1:] == [answer], len(set(shown)) / number]


def _of_pool(prediction: Prediction, form: str) -> list[float]:
    if prediction.decided_by == "language_model" or not prediction.candidates:
        return [0.0] * (2 + 2 * len(FEATURES))
    # Of other entities than these two, features need the reasons alone.
    names = {candidate.entity_id: candidate.entity_name for candidate in prediction.candidates[:2]}
    ids, reasons = [item.entity_id for item in prediction.pool], [item.reasons for item in prediction.pool]
    of_pool = dict(zip(ids, features_of(form, [names.get(item, "") for item in ids], reasons), strict=True))
    # Outside of the pool an entity has no features, as in the score.
    features, *others = (of_pool.get(entity_id, np.zeros(len(FEATURES))) for entity_id in names)
    lead = features - others[0] if others else np.zeros(len(FEATURES))
    bonus = prediction.candidates[0].bonus or 0.0
    return [_logit(prediction.confidence or 0.0), bonus, *features.tolist(), *lead.tolist()]


def _logit(share: float) -> float:
    share = min(max(share, 1e-9), 1 - 1e-9)
    return float(np.log(share / (1 - share)))


def _similarity(form: str, name: str) -> float:
    """Return the share of characters in common blocks, from 0 to 1, ignoring case."""
    return SequenceMatcher(None, form[:_COMPARED].casefold(), name[:_COMPARED].casefold(), autojunk=False).ratio()

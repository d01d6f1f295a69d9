"""Probability that an answer is right, and the decision for NIL, from what the search reports.

    calibration.json    two logistic regressions, the NIL threshold, and the settings of the run
                        on which they were fitted

A calibration is fitted on linked mentions with gold labels. The evidence for an answer comes from
its output row and the mention's surface form, so neither fitting nor applying needs a model. The
search's `probability` is one name's share of the probability of all names. How often the best name
is the right one is a different question, and must be learnt from mentions with gold labels.

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
import pyarrow as pa
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.errors import ConfigurationError
from gemel_engine.storage.manifest import claimed, parse_manifest, read_manifest, write_manifest
from gemel_engine.types import CARD_PREFIX, Prediction, predictions_to_table

FORMAT_VERSION = 3
EVIDENCE = (
    "logit_probability",
    "log_prob",
    "log_unexplored_mass",
    "margin",
    "has_margin",
    "log_name_length",
    # Demonstrations in the prompt, without cards: the share with the answer's entity, whether any and whether the
    # last one has it, and the number of different entities per demonstration.
    "supporting_share",
    "is_supported",
    "is_supported_by_last",
    "entities_per_demonstration",
    "name_similarity",  # between the surface form and the answer's name
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
class LogisticModel:
    """A logistic regression on standardised evidence, with one number for each of `EVIDENCE`.

    Attributes:
        mean: Mean of the evidence on the mentions used for fitting.
        scale: Standard deviation of that evidence; 1 where it hardly varied.
        weights: Weights of the standardised evidence.
        bias: Log-odds when all evidence is at its mean.
    """

    mean: tuple[Coefficient, ...]
    scale: tuple[Scale, ...]
    weights: tuple[Coefficient, ...]
    bias: Coefficient

    def __post_init__(self) -> None:
        if {len(self.mean), len(self.scale), len(self.weights)} != {len(EVIDENCE)}:
            raise ValueError(f"mean, scale and weights must be {len(EVIDENCE)} numbers each")

    def __call__(self, evidence: Numbers) -> Numbers:
        """Return probabilities (N,) for evidence (N, F)."""
        log_odds = (evidence - self.mean) / self.scale @ np.array(self.weights) + self.bias
        return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -700, 700))), np.float64)


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class Calibration:
    """Fitted models of confidence and of NIL.

    Attributes:
        right: Model of the probability that the entity is the right one.
        nil: Model of the probability that the knowledge base lacks the mention's entity; None if it
            was fitted without such mentions.
        nil_threshold: Lowest probability at which `is_nil` is true.
        scoring: Settings on which the evidence depends; see `scoring_settings`.
        fitted_on: Counts of mentions, and quality measured by cross-validation.
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

    def apply(self, predictions: Sequence[Prediction], surface_forms: Sequence[str]) -> list[Prediction]:
        """Return predictions with `confidence` and the NIL fields, where the language model was asked."""
        has_answer = [prediction.log_prob is not None for prediction in predictions]
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
        return [
            next(judged) if is_asked else prediction
            for prediction, is_asked in zip(predictions, has_answer, strict=True)
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
    """Return those settings of a run's `_run.json` that shape its evidence, without addresses."""
    retrieval = {key: value for key, value in settings["retrieval"].items() if key != "mention_encoder"}
    model = {"name": Path(settings["language_model"]["name"]).name}
    search = {key: value for key, value in settings["search"].items() if key != "width"}
    score = dict(settings.get("score") or {"kind": "language_model", "weights": None, "risk": 0.0})
    score["weights"] = score["weights"] and Path(score["weights"]).name
    return {
        "language_model": model,
        "prompt": settings["prompt"],
        "retrieval": retrieval,
        "search": search,
        "score": score,
    }


def evidence_of(predictions: pa.Table, surface_forms: Sequence[str]) -> Numbers:
    """Return the evidence for and against N answers: (N, F), in the order of `EVIDENCE`."""
    columns = {name: np.array(predictions[name].to_numpy(), np.float64) for name in ("probability", "log_prob")}
    probability = np.clip(columns["probability"], 1e-9, 1 - 1e-9)
    unexplored = np.clip(np.array(predictions["unexplored_mass"].to_numpy(), np.float64), 1e-9, 1.0)
    margin = np.array(predictions["margin"].to_numpy(), np.float64)  # NaN for a single name
    has_margin = ~np.isnan(margin)
    shown = _demonstrated(predictions)
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


def _demonstrated(predictions: pa.Table) -> list[list[str]]:
    """Return the entities of the demonstrations in each prompt; a card supports no answer."""
    columns = (predictions[name].to_pylist() for name in ("demonstration_ids", "demonstration_entity_ids"))
    return [
        [
            entity_id
            for shown_id, entity_id in zip(ids or (), entity_ids or (), strict=False)  # an old output has no entities
            if not shown_id.startswith(CARD_PREFIX)
        ]
        for ids, entity_ids in zip(*columns, strict=True)
    ]


def _similarity(form: str, name: str) -> float:
    """Return the share of characters in common blocks, from 0 to 1, ignoring case."""
    return SequenceMatcher(None, form[:_COMPARED].casefold(), name[:_COMPARED].casefold(), autojunk=False).ratio()

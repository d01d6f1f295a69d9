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

MANIFEST = "calibration.json"
_SECTIONS = ("language_model", "prompt", "retrieval", "search")  # of a run's settings

LEAST_SCALE = 1e-6  # a smaller deviation is one of rounding, and would make a weight of it

_HIGHEST_MARGIN = 10.0  # nats; what lies above says no more
_COMPARED = 100  # characters of a surface form and a name

Numbers = npt.NDArray[np.float64]
Outcomes = npt.NDArray[np.bool_]

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
# Evidence is at most thousands in size: with these limits no product of numbers gets near the end of float64.
Coefficient = Annotated[float, Field(ge=-1e9, le=1e9)]
Scale = Annotated[float, Field(ge=LEAST_SCALE, le=1e9)]
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
            write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(self))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            ArtifactError: It is missing, changed, of another format version, or has values that no fit gives.
        """
        path = directory / MANIFEST
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

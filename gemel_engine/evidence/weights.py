"""The weights of the score: what each feature of a candidate adds to it.

    score.json      weights, the weight of the language model, risks by confidence, what was fitted

The score of an entity e for a mention m is

    S(e | m) = language_model · log P(name of e | prompt of m) + bonus(e, m)

where the bonus of a candidate is the weighted sum of its features, and that of any other entity 0.

Shapes: N candidates, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.evidence.features import FEATURES, features_of
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.storage.manifest import claimed, parse_manifest, read_manifest, write_manifest

MANIFEST = "score.json"
FORMAT_VERSION = 4
SHIPPED = Path(__file__).parent  # weights for users without labelled mentions

Weight = Annotated[float, Field(ge=-1e6, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ScoreWeights:
    """Fitted weights of the score.

    Attributes:
        features: Weight of each feature, by name; a missing feature has weight 0.
        language_model: Weight of the log-prob.
        risks: Pairs of a probability and the share of wrong answers among the mentions whose best
            candidate has at least that probability by evidence alone, measured on mentions that
            were left out of fitting; in ascending order.
        fitted_on: What the weights were fitted on: corpora, counts, settings.
    """

    features: dict[str, Weight]
    language_model: Annotated[float, Field(gt=0, le=1e6)]
    risks: tuple[tuple[Share, Share], ...]
    fitted_on: dict[str, Any]

    def __post_init__(self) -> None:
        if unknown := sorted(self.features.keys() - set(FEATURES)):
            raise ValueError(f"there is no feature {unknown[0]!r}; name some of {', '.join(FEATURES)}")
        if list(self.risks) != sorted(self.risks):
            raise ValueError("risks must be in ascending order")

    def bonuses(self, form: str, names: Sequence[str], reasons: Sequence[Mapping[str, float]]) -> NDArray[np.float64]:
        """Return the bonus of each of N candidates; see `features_of` for the arguments."""
        weights = np.array([self.features.get(name, 0.0) for name in FEATURES])
        bonuses: NDArray[np.float64] = features_of(form, names, reasons) @ weights
        return bonuses

    def parts(self, form: str, names: Sequence[str], reasons: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Return what each feature adds to the bonus of each candidate, without those that add nothing."""
        weights = [self.features.get(name, 0.0) for name in FEATURES]
        added = (features_of(form, names, reasons) * weights).tolist()
        return [{name: value for name, value in zip(FEATURES, row, strict=True) if value} for row in added]

    def threshold(self, risk: float) -> float | None:
        """Return the lowest probability at which evidence alone is wrong at most at this risk.

        All higher probabilities keep the risk, too. None: no probability does.
        """
        lowest = None
        for probability, measured in reversed(self.risks):
            if measured > risk:
                break
            lowest = probability
        return lowest

    def save(self, directory: Path) -> None:
        """Write `score.json`."""
        with claimed(directory, must_be_empty=False):
            write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(self))

    @classmethod
    def open(cls, directory: Path | None = None) -> Self:
        """Read what `save` wrote; None: the weights that ship with the package.

        Raises:
            ArtifactError: The file is missing, changed, of another format version, or has values
                that no fit produces.
        """
        path = (directory or SHIPPED) / MANIFEST
        return parse_manifest(read_manifest(path, FORMAT_VERSION), cls, path)


def bonuses_of(
    form: str,
    rows: Sequence[int],
    reasons: Sequence[Mapping[str, float]],
    weights: ScoreWeights,
    knowledge_base: KnowledgeBase,
) -> dict[int, float]:
    """Return the bonus of each entity of a pool by its row, the highest first.

    Args:
        form: Surface form.
        rows: Rows of N entities.
        reasons: Reasons of each in the pool.
        weights: Weights of the score.
        knowledge_base: Knowledge base of the entities.
    """
    names = [knowledge_base.entity(row).name for row in rows]
    bonuses = weights.bonuses(form, names, reasons).tolist() if names else []
    return dict(sorted(zip(rows, bonuses, strict=True), key=lambda pair: -pair[1]))


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probabilities (N,) of scores (N,)."""
    shifted = np.exp(scores - scores.max())
    probabilities: NDArray[np.float64] = shifted / shifted.sum()
    return probabilities

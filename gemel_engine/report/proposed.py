"""The candidate pool of a shown mention: its entities, why they are there, and what that adds."""

from __future__ import annotations

from dataclasses import dataclass

from gemel_engine.evidence.reasons import in_words
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.report.entities import ShownEntity
from gemel_engine.report.gallery import GalleryItem


@dataclass(frozen=True, slots=True)
class Proposed:
    """An entity of a candidate pool, and why it is there.

    Attributes:
        entity: The entity.
        reasons: Its reasons in words.
        parts: Name of each feature, what it adds to the bonus, and that as a share of the largest
            bonus of the pool, the largest first; empty without weights.
    """

    entity: ShownEntity
    reasons: list[str]
    parts: list[tuple[str, float, float]]


def proposed(item: GalleryItem, weights: ScoreWeights | None) -> list[Proposed]:
    """Return the candidate pool of an item.

    Args:
        item: The mention and its prediction.
        weights: Weights of the run's score; None: not known.
    """
    pool = item.prediction.get("pool") or ()
    entities = [item.entity(found["entity_id"]) for found in pool]
    reasons = [dict(found["reasons"] or ()) for found in pool]
    added: list[dict[str, float]] = [{} for _ in pool]
    if weights is not None:
        parts = weights.parts(item.mention.mention, [entity.name for entity in entities], reasons)
        added = [{} if entity.entity is None else of_one for entity, of_one in zip(entities, parts, strict=True)]
    largest = max((sum(of_one.values()) for of_one in added), default=0.0) or 1.0
    return [
        Proposed(
            entity,
            in_words(known),
            [
                (feature.replace("_", " "), value, value / largest)
                for feature, value in sorted(of_one.items(), key=lambda part: -part[1])
            ],
        )
        for entity, known, of_one in zip(entities, reasons, added, strict=True)
    ]

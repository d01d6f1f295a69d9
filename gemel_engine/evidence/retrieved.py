"""What retrieval finds for a mention, and its Arrow type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class PoolCandidate:
    """An entity that a mention may refer to.

    Attributes:
        row: Row of the entity in the knowledge base.
        score: Sum of the weighted reciprocal ranks; only its order is meaningful.
        reasons: Score by each source that proposed the entity, such as a count, and its positive
            similarities to form, text and picture.
    """

    row: int
    score: float
    reasons: dict[str, float]


class PromptItem(NamedTuple):
    """A demonstration or a card in a prompt.

    Attributes:
        row: Row of the demonstration index, or of the knowledge base for a card.
        is_card: Whether it is a card.
    """

    row: int
    is_card: bool = False


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What was found for a mention.

    Attributes:
        shared: Items at the beginning of the prompt, equal for all mentions of a surface form.
        own: Items before the question, chosen by the mention's text and picture.
        candidates: The candidate pool, the best first.
    """

    shared: tuple[PromptItem, ...] = ()
    own: tuple[PromptItem, ...] = ()
    candidates: tuple[PoolCandidate, ...] = ()

    @property
    def items(self) -> tuple[PromptItem, ...]:
        """All items in the order of the prompt, the last one before the question."""
        return self.shared + self.own


_ITEMS = pa.list_(pa.struct([("row", pa.int64()), ("is_card", pa.bool_())]))
RETRIEVED_TYPE = pa.struct(
    [
        ("shared", _ITEMS),
        ("own", _ITEMS),
        (
            "candidates",
            pa.list_(
                pa.struct(
                    [("row", pa.int64()), ("score", pa.float64()), ("reasons", pa.map_(pa.string(), pa.float64()))]
                )
            ),
        ),
    ]
)


def retrieved_to_array(retrieved: Sequence[Retrieved]) -> pa.Array:
    """Convert B results to an array of `RETRIEVED_TYPE`."""
    return pa.array(
        [
            {
                "shared": [item._asdict() for item in found.shared],
                "own": [item._asdict() for item in found.own],
                "candidates": [
                    {"row": item.row, "score": item.score, "reasons": list(item.reasons.items())}
                    for item in found.candidates
                ],
            }
            for found in retrieved
        ],
        RETRIEVED_TYPE,
    )


def row_to_retrieved(row: Mapping[str, Any] | None) -> Retrieved:
    """Convert a value of `RETRIEVED_TYPE`; null means that nothing was looked for."""
    if row is None:
        return Retrieved()
    return Retrieved(
        tuple(PromptItem(**item) for item in row["shared"]),
        tuple(PromptItem(**item) for item in row["own"]),
        tuple(PoolCandidate(item["row"], item["score"], dict(item["reasons"])) for item in row["candidates"]),
    )

"""Judge found mentions by gold mentions: precision, recall and F1 of places, and with their entities.

A found mention is right if a gold mention has the same document, start and end; with entities, if
that has the same entity, too. Gold mentions without an entity (NIL) count for places alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import NamedTuple, Self

from gemel_engine.errors import InputError
from gemel_engine.evaluation.run import LinkedRun
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column
from gemel_engine.types import MENTION_COLUMNS, mention_columns

_FOUND_COLUMNS = {**MENTION_COLUMNS, "document_start": Column.like(MENTION_COLUMNS["mention_start"].type)}
_FOUND_REQUIRED = ("mention_id", "mention", "group", "document_start")
_GOLD_COLUMNS = ("group", "mention", "mention_start", "text", "entity_id")


class Place(NamedTuple):
    """Where a mention is: the id of its document, and its first character and that after the last."""

    document_id: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of what was found with gold.

    Attributes:
        num_right: Number of right ones.
        num_found: Number found.
        num_gold: Number in gold.
        precision: Share of those found that are right; 0 if none was found.
        recall: Share of gold that was found; 0 without gold.
        f1: Harmonic mean of precision and recall.
    """

    num_right: int
    num_found: int
    num_gold: int
    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, found: Set[object], gold: Set[object]) -> Self:
        """Compare two sets."""
        num_right = len(found & gold)
        precision, recall = num_right / max(1, len(found)), num_right / max(1, len(gold))
        f1 = 2 * num_right / max(1, len(found) + len(gold))
        return cls(num_right, len(found), len(gold), precision, recall, f1)


@dataclass(frozen=True, slots=True)
class JudgedSpans:
    """Found mentions, compared with gold.

    Attributes:
        mentions: Agreement of the places.
        linked: Agreement of the places together with their entities; None if nothing was linked.
    """

    mentions: Agreement
    linked: Agreement | None = None

    def to_json(self) -> bytes:
        """Return all figures as JSON."""
        return json.dumps(asdict(self), indent=2).encode()


def judge_spans(
    found: Mapping[str, Place], gold: Mapping[Place, str | None], entity_ids: Mapping[str, str | None] | None = None
) -> JudgedSpans:
    """Compare found mentions with gold.

    Args:
        found: Place of each found mention, by `mention_id`.
        gold: Entity of each gold mention; None: NIL or unknown.
        entity_ids: Entity that each found mention was linked to; None: nothing was linked.
    """
    mentions = Agreement.of({*found.values()}, gold.keys())
    if entity_ids is None:
        return JudgedSpans(mentions)
    linked = {(found[mention_id], entity_id) for mention_id, entity_id in entity_ids.items() if entity_id is not None}
    return JudgedSpans(mentions, Agreement.of(linked, {item for item in gold.items() if item[1] is not None}))


def judge_spans_of_run(run: LinkedRun, gold: str) -> JudgedSpans:
    """Compare the mentions and answers of a linking run over found mentions with gold.

    Raises:
        InputError: The run's input are not found mentions, or the gold mentions are unusable.
    """
    ids, entities, is_nil = (run.predictions[name].to_pylist() for name in ("mention_id", "entity_id", "is_nil"))
    answers = {
        mention_id: None if nil else entity_id for mention_id, entity_id, nil in zip(ids, entities, is_nil, strict=True)
    }
    found = read_found(run.settings["input"])
    if answers.keys() != found.keys():
        raise InputError(f"{run.settings['input']} has other mentions than {run.output}: link them again")
    return judge_spans(found, read_gold_spans(gold), answers)


def read_found(uri: str) -> dict[str, Place]:
    """Return the place of each mention that `gemel find-mentions` found, by `mention_id`.

    Raises:
        InputError: The table is unreadable, or not of found mentions.
    """
    rows = parquet.read_tables(uri, _FOUND_COLUMNS, _FOUND_REQUIRED, _FOUND_REQUIRED).to_pylist()
    return {
        row["mention_id"]: Place(row["group"], row["document_start"], row["document_start"] + len(row["mention"]))
        for row in rows
    }


def has_places_alone(uri: str, stored_names: Mapping[str, str]) -> bool:
    """Return whether gold mentions have no `mention_id`, but a document and a surface form.

    Args:
        uri: Table, or directory of tables.
        stored_names: The run's `columns`, whose name of `mention_id` counts, too.
    """
    columns = {"mention_id": mention_columns(stored_names, or_own=True)["mention_id"]}
    names = next(parquet.open_tables(uri, columns)).names
    return "mention_id" not in names and {"group", "mention"} <= set(names)


def read_gold_spans(uri: str) -> dict[Place, str | None]:
    """Return the entity of each gold mention, None where it has none.

    Without `mention_start`, the rows of a document with equal mentions are the `occurrences` of
    that surface form in its text, in their order.

    Raises:
        InputError: The table is unreadable, or a mention has no place in its document.
    """
    rows = parquet.read_tables(uri, MENTION_COLUMNS, _GOLD_COLUMNS, ("group", "mention")).to_pylist()
    gold: dict[Place, str | None] = {}
    num_seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        document_id, mention, start = row["group"], row["mention"], row.get("mention_start")
        if start is None and mention and (starts := occurrences(row.get("text") or "", mention)):
            start = starts[min(num_seen[document_id, mention], len(starts) - 1)]
            num_seen[document_id, mention] += 1
        if not document_id or not mention or start is None or start < 0:
            raise InputError(
                f"{uri} has the mention {mention!r} of the document {document_id!r}, whose place is not known: give "
                "its `group`, and `mention_start` or a `text` that has it"
            )
        gold[Place(document_id, start, start + len(mention))] = row.get("entity_id")
    return gold


def occurrences(text: str, mention: str) -> list[int]:
    """Return where a surface form is in a text as whole words, or anywhere if it is nowhere so."""
    form = re.escape(mention)
    return [match.start() for match in re.finditer(rf"(?<!\w){form}(?!\w)", text)] or [
        match.start() for match in re.finditer(form, text)
    ]

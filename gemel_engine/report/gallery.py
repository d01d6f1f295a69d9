"""Draw a sample of a run's mentions, with their texts, pictures and demonstrations.

Only the row groups that contain a drawn mention are read in full, and only drawn rows are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import InputError
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.report.entities import ShownEntity, shown_entities
from gemel_engine.report.pictures import SMALL_EDGE, Thumbnail, read_rows, thumbnails
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import CARD_PREFIX, Mention, mention_columns

_COLUMNS = ("mention_id", "text", "mention", "mention_start", "image_bytes", "image_uri")
_KINDS = ("right", "certified", "is_nil")
_MENTION_EDGE = 256  # pixels, twice those of the page, for dense displays
_MAX_PICTURED = 10  # number of candidates of a mention whose pictures are shown


@dataclass(frozen=True, slots=True)
class ShownDemonstration:
    """A demonstration and its picture."""

    demonstration: Demonstration
    picture: Thumbnail


@dataclass(frozen=True, slots=True, kw_only=True)
class GalleryItem:
    """One mention, its prediction, and the gold label if known.

    Attributes:
        mention: The mention; text and surface form are empty if they could not be read.
        picture: Picture of the mention.
        prediction: Row of the run's output, by column.
        gold_id: Gold entity; None for NIL, or if unknown.
        gold_name: Name of the gold entity; None if unknown.
        right: Whether the answer is right; None if it was not judged.
        demonstrations: Demonstrations, and entities of cards, in the order of the prompt, the last
            one before the question.
        entities: Entities by id, among them the mention's candidates and its candidate pool where
            the knowledge base knows them.
    """

    mention: Mention
    picture: Thumbnail
    prediction: Mapping[str, Any]
    gold_id: str | None = None
    gold_name: str | None = None
    right: bool | None = None
    demonstrations: tuple[ShownDemonstration | ShownEntity, ...] = ()
    entities: Mapping[str, ShownEntity] = field(default_factory=dict)

    def entity(self, entity_id: str) -> ShownEntity:
        """Return an entity by its id; without a record if it is unknown."""
        return self.entities.get(entity_id, ShownEntity(entity_id))


def gallery_items(
    predictions: pa.Table,
    mentions: str,
    index: DemonstrationIndex | None = None,
    *,
    size: int,
    seed: int = 0,
    stored_names: Mapping[str, str] | None = None,
    judged: pa.Table | None = None,
    training: str | None = None,
    knowledge_base: KnowledgeBase | None = None,
    entities: str | None = None,
    image_source: ImagePolicy | None = None,
) -> list[GalleryItem]:
    """Draw mentions of a run, the same number of each kind as far as possible.

    A kind is a combination of right or wrong, certified or not, NIL or not, error or not.

    Args:
        predictions: Output of the run.
        mentions: Table file or directory of the mentions that were linked.
        index: Demonstrations of the run; None: without demonstrations.
        size: Number of mentions to draw; all of them if there are fewer.
        seed: Seed of the draw; equal seeds draw equal mentions.
        stored_names: The corpus' names of columns that have another name there; the training split
            may have them, too.
        judged: Verdicts (see `Judge.verdicts`) on any of the mentions: columns `mention_id`,
            `entity_id` (gold, null for NIL), `entity_name` and `right` (both nullable).
        training: Table file or directory with the pictures of the demonstrations; None: without.
        knowledge_base: Knowledge base of the run; None: entities without names and descriptions.
        entities: Table of the pictures of entities; None: only addresses in the knowledge base.
        image_source: Policy for reading image addresses; None: no address is read.

    Raises:
        InputError: A drawn mention is not in the corpus, or a corpus can't be read.
    """
    judged = _of_the_same_rows(judged, predictions["mention_id"])
    drawn = _draw(predictions.append_column("right", judged["right"]), size, seed)
    rows, gold = _rows(predictions, drawn), _rows(judged, drawn)
    corpus = read_drawn_mentions(mentions, {row["mention_id"] for row in rows}, stored_names)
    pictures = thumbnails(corpus, image_source, _MENTION_EDGE)
    known: dict[str, ShownEntity] = {}
    if knowledge_base is not None:
        asked, pictured = _entities_of(rows)
        known = shown_entities(knowledge_base, asked, pictured, table=entities, image_source=image_source)
    shown = _shown_demonstrations(index, rows, training, stored_names, image_source) | _shown_cards(rows, known)
    return [
        GalleryItem(
            mention=_mention(corpus[row["mention_id"]]),
            picture=pictures[row["mention_id"]],
            prediction=row,
            gold_id=truth["entity_id"],
            gold_name=truth["entity_name"],
            right=truth["right"],
            demonstrations=tuple(shown[name] for name in row["demonstration_ids"] or () if name in shown),
            entities=known,
        )
        for row, truth in zip(rows, gold, strict=True)
    ]


def _of_the_same_rows(judged: pa.Table | None, mention_ids: pa.ChunkedArray) -> pa.Table:
    """Return the verdict on each of the mentions, null where there is none."""
    types = {"mention_id": pa.string(), "entity_id": pa.string(), "entity_name": pa.string(), "right": pa.bool_()}
    if judged is None:
        return pa.table({name: pa.nulls(len(mention_ids), kind) for name, kind in types.items()})
    judged = judged.select(list(types)).cast(pa.schema(list(types.items())))
    return judged.take(pc.index_in(mention_ids, value_set=judged["mention_id"]).combine_chunks())


def _rows(table: pa.Table, drawn: NDArray[np.intp]) -> list[dict[str, Any]]:
    """Return rows one by one: Arrow's `take` joins all chunks, and they may have more than 2 GiB of text."""
    return [row for place in drawn.tolist() for row in table.slice(place, 1).to_pylist()]


def _draw(predictions: pa.Table, size: int, seed: int) -> NDArray[np.intp]:
    """Draw rows in rounds, each with one row of every kind that is left, in random order."""
    columns = [predictions[name].cast(pa.int8()).fill_null(-1) for name in _KINDS]
    columns.append(predictions["error"].is_valid().cast(pa.int8()))
    order = np.random.default_rng(seed).permutation(len(predictions))
    kinds = np.stack([column.to_numpy() for column in columns], axis=1)[order]
    _, kind_of_row = np.unique(kinds, axis=0, return_inverse=True)
    round_of_row = np.empty_like(order)
    for kind in range(kind_of_row.max(initial=-1) + 1):
        members = np.flatnonzero(kind_of_row == kind)
        round_of_row[members] = np.arange(len(members))
    drawn: NDArray[np.intp] = order[np.argsort(round_of_row, kind="stable")[:size]]
    return drawn


def read_drawn_mentions(
    uri: str, mention_ids: Collection[str], stored_names: Mapping[str, str] | None = None, *, complete: bool = True
) -> dict[str, dict[str, Any]]:
    """Read rows of a corpus by `mention_id`; see `read_rows` and `mention_columns`.

    Raises:
        InputError: The corpus can't be read, or `complete` is set and a mention is missing.
    """
    columns = mention_columns(stored_names or {}, or_own=True)
    found = read_rows(uri, {name: columns[name] for name in _COLUMNS}, mention_ids)
    missing = set(mention_ids) - found.keys() if complete else ()
    if missing:
        raise InputError(f"{uri} has no mention {min(missing)!r}: give the mentions that the run linked")
    return found


def _entities_of(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Return the ids of the entities that rows show: of all, and of those with pictures."""
    candidates = [[item["entity_id"] for item in row["candidates"] or ()] for row in rows]
    pictured = [entity_id for entity_ids in candidates for entity_id in entity_ids[:_MAX_PICTURED]]
    pictured += [shown_id.removeprefix(CARD_PREFIX) for shown_id in _cards(rows)]
    pools = [item["entity_id"] for row in rows for item in row.get("pool") or ()]
    return [*chain.from_iterable(candidates), *pools, *pictured], list(dict.fromkeys(pictured))


def _cards(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [shown_id for row in rows for shown_id in row["demonstration_ids"] or () if shown_id.startswith(CARD_PREFIX)]


def _shown_cards(
    rows: Sequence[Mapping[str, Any]], known: Mapping[str, ShownEntity]
) -> dict[str, ShownDemonstration | ShownEntity]:
    """Return the entities of the cards of all rows, by the ids of the cards."""
    ids = {shown_id: shown_id.removeprefix(CARD_PREFIX) for shown_id in _cards(rows)}
    return {shown_id: known.get(entity_id, ShownEntity(entity_id)) for shown_id, entity_id in ids.items()}


def _shown_demonstrations(
    index: DemonstrationIndex | None,
    rows: Sequence[Mapping[str, Any]],
    training: str | None,
    stored_names: Mapping[str, str] | None,
    image_source: ImagePolicy | None,
) -> dict[str, ShownDemonstration | ShownEntity]:
    """Return the demonstrations of all rows with their pictures, by `mention_id`."""
    if index is None:
        return {}
    shown_ids = dict.fromkeys(shown_id for row in rows for shown_id in row["demonstration_ids"] or ())
    mention_ids = [shown_id for shown_id in shown_ids if not shown_id.startswith(CARD_PREFIX)]
    pictured = {} if training is None else read_drawn_mentions(training, mention_ids, stored_names, complete=False)
    pictures = thumbnails(pictured, image_source, SMALL_EDGE)
    return {
        mention_id: ShownDemonstration(index[row], pictures.get(mention_id, Thumbnail()))
        for mention_id, row in zip(mention_ids, index.rows(mention_ids), strict=True)
    }


def _mention(row: Mapping[str, Any]) -> Mention:
    return Mention(row["mention_id"], row["text"] or "", row["mention"] or "", row.get("mention_start"))

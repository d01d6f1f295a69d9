"""Draw a sample of a run's mentions, with their texts, pictures and demonstrations.

Only the row groups that contain a drawn mention are read in full, and only drawn rows are kept.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import InputError, MentionError
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.storage import parquet
from gemel_engine.types import MENTION_COLUMNS, Mention
from gemel_engine.vision.decode import decode_image
from gemel_engine.vision.fetch import fetch_image

_COLUMNS = ("mention_id", "text", "mention", "mention_start", "image_bytes", "image_uri")
_KINDS = ("right", "certified", "is_nil")
_FETCH_THREADS = 16
_MAX_PIXELS = 50_000_000
_MAX_THUMBNAIL_BYTES = 20_000
_MENTION_EDGE, _DEMONSTRATION_EDGE = 256, 80  # pixels, twice those of the page, for dense displays


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture, or the reason why it is missing.

    Attributes:
        data: WebP file of at most 20 kB; None if there is no picture, or it can't be shown.
        fault: Reason why the picture can't be shown; None if it can, or if there is none.
    """

    data: bytes | None = None
    fault: str | None = None


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
        demonstrations: Demonstrations in the order of the prompt, the last one before the question.
    """

    mention: Mention
    picture: Thumbnail
    prediction: Mapping[str, Any]
    gold_id: str | None = None
    gold_name: str | None = None
    right: bool | None = None
    demonstrations: tuple[ShownDemonstration, ...] = ()


def gallery_items(
    predictions: pa.Table,
    mentions: str,
    index: DemonstrationIndex | None = None,
    *,
    size: int,
    seed: int = 0,
    judged: pa.Table | None = None,
    training: str | None = None,
    image_source: ImagePolicy | None = None,
) -> list[GalleryItem]:
    """Draw mentions of a run, the same number of each kind as far as possible.

    A kind is a combination of right or wrong, certified or not, NIL or not, error or not.

    Args:
        predictions: Output of the run.
        mentions: Parquet file or directory of the mentions that were linked.
        index: Demonstrations of the run; None: without demonstrations.
        size: Number of mentions to draw; all of them if there are fewer.
        seed: Seed of the draw; equal seeds draw equal mentions.
        judged: Verdicts (see `Judge.verdicts`) on any of the mentions: columns `mention_id`,
            `entity_id` (gold, null for NIL), `entity_name` and `right` (both nullable).
        training: Parquet file or directory with the pictures of the demonstrations; None: without.
        image_source: Policy for reading image addresses; None: no address is read.

    Raises:
        InputError: A drawn mention is not in the corpus, or a corpus can't be read.
    """
    judged = _of_the_same_rows(judged, predictions["mention_id"])
    drawn = _draw(predictions.append_column("right", judged["right"]), size, seed)
    rows, gold = predictions.take(drawn).to_pylist(), judged.take(drawn).to_pylist()
    corpus = read_drawn_mentions(mentions, {row["mention_id"] for row in rows})
    pictures = _thumbnails(corpus, image_source, _MENTION_EDGE)
    shown = _shown_demonstrations(index, rows, training, image_source)
    return [
        GalleryItem(
            mention=_mention(corpus[row["mention_id"]]),
            picture=pictures[row["mention_id"]],
            prediction=row,
            gold_id=truth["entity_id"],
            gold_name=truth["entity_name"],
            right=truth["right"],
            demonstrations=tuple(
                shown[mention_id] for mention_id in row["demonstration_ids"] or () if mention_id in shown
            ),
        )
        for row, truth in zip(rows, gold, strict=True)
    ]


def shrink(data: bytes, edge: int) -> bytes:
    """Shrink an untrusted picture to a WebP file of at most `edge` x `edge` pixels and 20 kB.

    Raises:
        ImageError: The data is not a picture.
    """
    image = decode_image(data, _MAX_PIXELS)
    image.thumbnail((edge, edge))
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=75)
        if buffer.tell() <= _MAX_THUMBNAIL_BYTES:
            return buffer.getvalue()
        image = image.reduce(2)


def _of_the_same_rows(judged: pa.Table | None, mention_ids: pa.ChunkedArray) -> pa.Table:
    """Return the verdict on each of the mentions, null where there is none."""
    types = {"mention_id": pa.string(), "entity_id": pa.string(), "entity_name": pa.string(), "right": pa.bool_()}
    if judged is None:
        return pa.table({name: pa.nulls(len(mention_ids), kind) for name, kind in types.items()})
    judged = judged.select(list(types)).cast(pa.schema(list(types.items())))
    return judged.take(pc.index_in(mention_ids, value_set=judged["mention_id"]).combine_chunks())


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


def read_drawn_mentions(uri: str, mention_ids: Collection[str], *, complete: bool = True) -> dict[str, dict[str, Any]]:
    """Read rows of a corpus by `mention_id`: first all ids, then the row groups that contain them.

    Raises:
        InputError: The corpus can't be read, or `complete` is set and a mention is missing.
    """
    wanted = pa.array(sorted(mention_ids), pa.large_string())
    found: dict[str, dict[str, Any]] = {}
    kinds = {name: MENTION_COLUMNS[name] for name in _COLUMNS}
    for table in parquet.open_tables(uri, kinds, ["mention_id"]) if len(wanted) else ():
        is_wanted = [
            pc.is_in(piece["mention_id"], value_set=wanted).to_numpy() for piece in table.pieces(["mention_id"])
        ]
        rows = np.flatnonzero(np.concatenate(is_wanted)) if is_wanted else np.empty(0, np.int64)
        found |= {row["mention_id"]: row for row in table.take(_COLUMNS, rows).to_pylist()}
    missing = set(mention_ids) - found.keys() if complete else ()
    if missing:
        raise InputError(f"{uri} has no mention {min(missing)!r}: give the mentions that the run linked")
    return found


def _shown_demonstrations(
    index: DemonstrationIndex | None,
    rows: Sequence[Mapping[str, Any]],
    training: str | None,
    image_source: ImagePolicy | None,
) -> dict[str, ShownDemonstration]:
    """Return the demonstrations of all rows with their pictures, by `mention_id`."""
    if index is None:
        return {}
    mention_ids = list(dict.fromkeys(mention_id for row in rows for mention_id in row["demonstration_ids"] or ()))
    pictured = {} if training is None else read_drawn_mentions(training, mention_ids, complete=False)
    pictures = _thumbnails(pictured, image_source, _DEMONSTRATION_EDGE)
    return {
        mention_id: ShownDemonstration(index[row], pictures.get(mention_id, Thumbnail()))
        for mention_id, row in zip(mention_ids, index.rows(mention_ids), strict=True)
    }


def _mention(row: Mapping[str, Any]) -> Mention:
    return Mention(row["mention_id"], row["text"] or "", row["mention"] or "", row.get("mention_start"))


def _thumbnails(
    rows: Mapping[str, Mapping[str, Any]], image_source: ImagePolicy | None, edge: int
) -> dict[str, Thumbnail]:
    """Shrink the pictures of rows of a corpus; one that can't be shown does not stop the others."""

    def thumbnail(row: Mapping[str, Any]) -> Thumbnail:
        data, uri = row.get("image_bytes"), row.get("image_uri")
        try:
            if data is None and uri and image_source is not None:
                data = fetch_image(uri, image_source)
            return Thumbnail() if data is None else Thumbnail(shrink(data, edge))
        except MentionError as error:
            return Thumbnail(fault=str(error))

    with ThreadPoolExecutor(_FETCH_THREADS) as threads:
        return dict(zip(rows, threads.map(thumbnail, rows.values()), strict=True))

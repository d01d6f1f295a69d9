"""Reads demonstrations for an index: a training split, its entities' names and its pictures.

Shapes: C vision width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import ImageFetchError, InputError, MentionError
from gemel_engine.knowledge_base.names import are_demonstrable, normalised_name
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import IDENTIFIER
from gemel_engine.types import Features, are_features, mention_columns
from gemel_engine.verbosity import bar_interval
from gemel_engine.vision.fetch import fetch_image

if TYPE_CHECKING:
    from gemel_engine.vision.encoder import ImageEncoder

_ENTITIES_PER_READ = 65_536
_MENTIONS_PER_READ = 32  # also the largest number of pictures encoded at once

logger = logging.getLogger(__name__)


class PictureReader:
    """Encodes pictures that are given by their bytes or their address.

    Attributes:
        encoder: The image encoder.
        num_unusable: Number of pictures so far that could not be fetched or decoded.
    """

    def __init__(self, encoder: ImageEncoder, policy: ImagePolicy, max_pixels: int) -> None:
        from gemel_engine.vision.encoder import PictureEncoder  # imports torch, which tables do without

        self.encoder = encoder
        self.num_unusable = 0
        self._policy = policy
        self._pictures = PictureEncoder(encoder, max_pixels, _MENTIONS_PER_READ)

    def encode(self, pictures: Sequence[bytes | str | None]) -> list[Features | None]:
        """Return features (C,) of each picture, None where there is none or it is unusable."""
        features: list[Features | None] = []
        for encoded in self._pictures.encode(map(self._file, pictures)):
            if isinstance(encoded, MentionError):
                logger.info("a demonstration goes without its picture: %s", encoded)
                self.num_unusable += 1
            features.append(None if isinstance(encoded, MentionError) else encoded)
        return features

    def _file(self, picture: bytes | str | None) -> bytes | ImageFetchError | None:
        if not isinstance(picture, str):
            return picture
        try:
            return fetch_image(picture, self._policy)
        except ImageFetchError as error:
            return error


def read_names(entities_uri: str) -> dict[str, str]:
    """Read the names of entities by id, normalised as in a knowledge base.

    Args:
        entities_uri: Table file or directory with the columns `entity_id` and `name`.

    Raises:
        InputError: There is no such table, or it lacks a column.
    """
    batches = _read_batches(entities_uri, _ENTITIES_PER_READ, ("entity_id", "name"))
    return {row["entity_id"]: normalised_name(row["name"]) for rows in batches for row in rows if row["name"]}


def read_demonstrations(
    mentions_uri: str,
    names: Mapping[str, str],
    pictures: PictureReader | None = None,
    stored_names: Mapping[str, str] | None = None,
) -> list[Demonstration]:
    """Read a training split; mentions that can't be demonstrations are left out and counted.

    Such mentions lack a surface form, an entity or its name, or contain a prompt marker, with which they
    would read as several demonstrations.

    Args:
        mentions_uri: Table, or directory of tables, with the columns `mention_id`, `text`, `mention`,
            `entity_id`, and optionally `entity_name` (for entities that `names` lacks), `group`,
            `image_features`, and for mentions without features `image_bytes` or `image_uri`.
        names: Names of entities by id.
        pictures: Reader that computes missing image features; None to use only those in the table.
        stored_names: The table's names of columns that have another name there.

    Raises:
        InputError: There is no such table, it lacks a column, a `mention_id` or a text, or contains
            image features that are not finite.
    """
    optional = ("entity_name", "group", "image_features", *(() if pictures is None else ("image_bytes", "image_uri")))
    demonstrations: list[Demonstration] = []
    num_left_out = 0
    required = ("mention_id", "text", "mention", "entity_id")
    batches = _read_batches(mentions_uri, _MENTIONS_PER_READ, required, optional, stored_names)
    with tqdm(desc="read demonstrations", unit=" mentions", delay=5, mininterval=bar_interval()) as progress:
        for rows in batches:
            for row in rows:
                row["name"] = names.get(row["entity_id"]) or normalised_name(row.get("entity_name") or "")
            kept = [row for row in rows if row["entity_id"] and row["name"] and row["mention"]]
            parts = [pa.array([row[part] or "" for row in kept], pa.string()) for part in ("text", "mention", "name")]
            kept = list(compress(kept, are_demonstrable(*parts)))
            num_left_out += len(rows) - len(kept)
            demonstrations.extend(_demonstrations(kept, pictures))
            progress.update(len(rows))
    if num_left_out:
        logger.warning(
            "left out %d mentions that lack a surface form, an entity or its name, or hold a prompt marker",
            num_left_out,
        )
    if pictures is not None and pictures.num_unusable:
        logger.warning("%d demonstrations go without their pictures, which are unusable", pictures.num_unusable)
    return demonstrations


def _demonstrations(rows: list[dict[str, Any]], pictures: PictureReader | None) -> Iterator[Demonstration]:
    features: list[Features | None] = [
        None if row.get("image_features") is None else np.array(row["image_features"]).astype(np.float32)
        for row in rows
    ]
    if pictures is not None:
        files = [
            None if known is not None else row.get("image_bytes") or row.get("image_uri")
            for row, known in zip(rows, features, strict=True)
        ]
        encoded = pictures.encode(files)
        features = [new if known is None else known for known, new in zip(features, encoded, strict=True)]
    for row, row_features in zip(rows, features, strict=True):
        mention_id, text = row["mention_id"], row["text"]
        if not mention_id or text is None:
            raise InputError(f"mention {mention_id!r} with text {text!r}: give every mention an id and a text")
        if row_features is not None and not are_features(row_features, len(row_features)):
            raise InputError(f"mention {mention_id!r} has image_features that are not finite; extract them again")
        group = row.get("group") or mention_id
        yield Demonstration(mention_id, text, row["mention"], row["entity_id"], row["name"], group, row_features)


def _read_batches(
    uri: str,
    num_rows: int,
    required: Sequence[str],
    optional: Sequence[str] = (),
    stored_names: Mapping[str, str] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a table, `num_rows` at a time, identifiers and texts as strings."""
    columns = mention_columns(stored_names or {}) | {"name": IDENTIFIER}
    kinds = {name: columns[name] for name in (*required, *optional)}
    for table in parquet.open_tables(uri, kinds, required):
        for piece in table.pieces((*required, *optional), max_rows=num_rows):
            try:
                yield piece.to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"{table.file.uri} has text that is not UTF-8 ({error}): write it again") from error

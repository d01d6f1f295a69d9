"""Read rows of tables by their ids, and shrink their pictures."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import MentionError
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column
from gemel_engine.vision.decode import decode_image
from gemel_engine.vision.fetch import fetch_image

SMALL_EDGE = 80  # pixels, twice those of the page, for dense displays
_FETCH_THREADS = 16
_MAX_PIXELS = 50_000_000
_MAX_THUMBNAIL_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small picture, or the reason why it is missing.

    Attributes:
        data: WebP file of at most 20 kB; None if there is no picture, or it can't be shown.
        fault: Reason why the picture can't be shown; None if it can, or if there is none.
    """

    data: bytes | None = None
    fault: str | None = None


def read_rows(uri: str, columns: Mapping[str, Column], ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """Read rows of a table by their ids: first all ids, then the row groups that contain them.

    Args:
        uri: Table file or directory.
        columns: Columns to read where they exist; the first one, which must, has the ids.
        ids: Ids of the rows to read.

    Returns:
        The rows that were found, by id.

    Raises:
        InputError: The table can't be read.
    """
    key, wanted = next(iter(columns)), pa.array(sorted(ids), pa.large_string())
    found: dict[str, dict[str, Any]] = {}
    for table in parquet.open_tables(uri, columns, [key]) if len(wanted) else ():
        is_wanted = [pc.is_in(piece[key], value_set=wanted).to_numpy() for piece in table.pieces([key])]
        rows = np.flatnonzero(np.concatenate(is_wanted)) if is_wanted else np.empty(0, np.int64)
        found |= {row[key]: row for row in table.take(list(columns), rows).to_pylist()}
    return found


def thumbnails(
    rows: Mapping[str, Mapping[str, Any]], image_source: ImagePolicy | None, edge: int
) -> dict[str, Thumbnail]:
    """Shrink the pictures of rows; one that can't be shown does not stop the others.

    Args:
        rows: Rows by id, with `image_bytes` or `image_uri` where they have a picture.
        image_source: Policy for reading image addresses; None: no address is read.
        edge: Maximum width and height in pixels.
    """

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

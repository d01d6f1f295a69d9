"""Documents, and the mentions that are made of what is found in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from gemel_engine.errors import ConfigurationError
from gemel_engine.finding.base import Span
from gemel_engine.pipeline.corpus import Shard, plan_shards, read_rows
from gemel_engine.storage.columns import Column
from gemel_engine.types import MENTION_COLUMNS

_PICTURES = ("image_uri", "image_bytes", "image_features")
DOCUMENT_COLUMNS: dict[str, Column] = {
    "document_id": MENTION_COLUMNS["group"],
    "text": MENTION_COLUMNS["text"],
    **{name: MENTION_COLUMNS[name] for name in _PICTURES},
}
DOCUMENT_REQUIRED_COLUMNS = ("document_id", "text")

# The mentions of a corpus of documents: what linking reads, and where it was in the document.
FOUND_COLUMNS = {
    name: MENTION_COLUMNS[name].type for name in ("mention_id", "text", "mention", "mention_start", "group")
} | {"document_start": pa.int64()}


def plan_documents(uri: str, rows_per_shard: int, stored_names: Mapping[str, str]) -> list[Shard]:
    """Validate the columns and ids of a corpus of documents and cut it into shards.

    Args:
        uri: Address of the corpus.
        rows_per_shard: Maximum number of documents of a shard.
        stored_names: The corpus' names of columns that have another name there.

    Raises:
        ConfigurationError: A name is given for a column that documents lack.
        InputError: A column is missing, repeated or of the wrong type, a file is unreadable, or a
            `document_id` is missing, repeated or not UTF-8.
    """
    if unknown := sorted(stored_names.keys() - DOCUMENT_COLUMNS):
        raise ConfigurationError(
            f"columns.{unknown[0]} is set, but documents have no such column: leave it out, or link mentions, without "
            "find_mentions"
        )
    return plan_shards(
        uri, rows_per_shard, (), stored_names, columns=DOCUMENT_COLUMNS, required=DOCUMENT_REQUIRED_COLUMNS
    )


def read_documents(shard: Shard, columns: Sequence[str] = tuple(DOCUMENT_COLUMNS)) -> pa.Table:
    """Read the documents of a shard.

    Raises:
        InputError: The file has changed since the run was planned.
    """
    return read_rows(shard, columns, kinds=DOCUMENT_COLUMNS, id_column=DOCUMENT_REQUIRED_COLUMNS[0])


def mentions_of(documents: pa.Table, spans: Sequence[Sequence[Span]], max_text_characters: int) -> pa.Table:
    """Return a row for each mention: `FOUND_COLUMNS`, and the columns of pictures.

    The id of a mention is that of its document, a colon, and its offset in the document.

    Args:
        documents: Columns of `DOCUMENT_COLUMNS`.
        spans: Mentions of each document; their starts differ.
        max_text_characters: See `passage`.
    """
    ids, texts = documents["document_id"].to_pylist(), documents["text"].to_pylist()
    rows = []
    for document_id, text, of_document in zip(ids, texts, spans, strict=True):
        for span in of_document:
            excerpt, offset = passage(text, span, max_text_characters)
            mention = text[span.start : span.stop]
            rows.append((f"{document_id}:{span.start}", excerpt, mention, span.start - offset, document_id, span.start))
    columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(FOUND_COLUMNS.values())]
    table = pa.table(columns, names=list(FOUND_COLUMNS))
    document_of = pa.array(np.repeat(np.arange(len(spans)), [len(of_document) for of_document in spans]))
    for name in _PICTURES:
        if name in documents.column_names:
            table = table.append_column(name, documents[name].take(document_of))
    return table


def passage(text: str, span: Span, limit: int) -> tuple[str, int]:
    """Return the part of a text around a mention, and its offset; a short text is returned whole.

    Args:
        text: The text.
        span: The mention, which is never cut.
        limit: Maximum number of characters; the text is cut at spaces if some are near.
    """
    room = max(0, limit - (span.stop - span.start))
    start = max(0, min(span.start - room // 2, len(text) - room - (span.stop - span.start)))
    stop = min(len(text), start + room + span.stop - span.start)
    if start > 0 and (space := text.find(" ", start - 1, (start + span.start) // 2)) >= 0:
        start = space + 1
    if stop < len(text) and (space := text.rfind(" ", (span.stop + stop) // 2, stop + 1)) >= 0:
        stop = space
    return text[start:stop], start

"""Read the gold labels of mentions, and the entities that judging needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from hashlib import blake2b
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.errors import InputError, shown
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import Column
from gemel_engine.types import mention_columns

_GOLD_COLUMNS = ("mention_id", "entity_id", "mention", "text", "candidate_ids")
_PICTURES = ("image_bytes", "image_uri", "image_features")
_DIGESTED = ("image_bytes", "image_uri")


def surface_forms(gold: pa.Table, predictions: pa.Table) -> list[str]:
    """Return the surface form of each prediction; every prediction must have a gold row.

    Raises:
        InputError: A surface form is not known, since the input of the run has changed.
    """
    form_of = dict(zip(gold["mention_id"].to_pylist(), gold["mention"].to_pylist(), strict=True))
    ids = predictions["mention_id"].to_pylist()
    if (lost := next((mention_id for mention_id in ids if form_of[mention_id] is None), None)) is not None:
        raise InputError(
            f"the input of the run no longer has mention {shown(lost)}: restore it, or give labels with the columns "
            "mention and text"
        )
    return [form_of[mention_id] for mention_id in ids]


def read_gold(
    uri: str,
    linked: str | None = None,
    *,
    stored_names: Mapping[str, str] | None = None,
    with_pictures: bool = True,
    with_digests: bool = False,
) -> pa.Table:
    """Read the small columns of mentions with gold labels.

    Args:
        uri: Table, or directory of tables.
        linked: Input of the run that linked these mentions; None if there is no run.
            `candidate_ids` is read from it alone, and so is every other column if the labels have
            no `text`.
        stored_names: The run's `columns`; labels may also have the engine's own names.
        with_pictures: Whether to return which mentions have a picture. Files whose footers don't
            say that all have one are read for it, pictures included.
        with_digests: Whether to return what pictures have in common, too; all are read then.

    Returns:
        Table with columns `mention_id`, `entity_id` and, where they exist, `mention`, `text`,
        `candidate_ids`; `has_picture`; `image_uri` and `image_digest` (of `image_bytes`).

    Raises:
        InputError: The mentions have no labels.
    """
    columns = mention_columns(stored_names or {}, or_own=True)
    with_pictures |= with_digests
    labels = _small_columns(uri, columns, with_pictures=with_pictures, with_digests=with_digests, with_labels=True)
    if linked is None or linked == uri:
        return labels
    ours = [name for name in labels.column_names if name != "candidate_ids"]
    labels = labels.select(ours if "text" in ours else ["mention_id", "entity_id"])
    ids = labels["mention_id"]
    with_digests &= not {"image_digest", "image_uri"} <= {*labels.column_names}
    wanted = frozenset(ids.cast(pa.large_binary()).to_pylist())
    described = _small_columns(linked, columns, wanted, with_pictures=with_pictures, with_digests=with_digests)
    place = pc.index_in(ids, described["mention_id"].combine_chunks())
    for name in described.column_names:
        if name not in labels.column_names:
            labels = labels.append_column(name, described[name].take(place))
    return labels


def _small_columns(
    uri: str,
    columns: Mapping[str, Column],
    wanted: Set[bytes] | None = None,
    *,
    with_pictures: bool,
    with_digests: bool,
    with_labels: bool = False,
) -> pa.Table:
    """Read the columns of `read_gold`, of all mentions or of those with wanted ids.

    Raises:
        InputError: `with_labels` is set and there is no column `entity_id`.
    """
    tables = []
    for table in parquet.open_tables(uri, columns, ["mention_id"]):
        if with_labels and "entity_id" not in table.names:
            raise InputError(
                f"{table.file.uri} has no column entity_id, only {', '.join(table.names)}: name a table of mentions "
                "with gold labels"
            )
        pictures = [name for name in _PICTURES if with_pictures and name in table.names]
        all_pictured = any(not table.may_have_nulls(name) for name in pictures)
        read = [*_GOLD_COLUMNS, *(() if all_pictured else pictures), *(_DIGESTED if with_digests else ())]
        if wanted is None:
            pieces = table.pieces(read)
        else:
            ids = table.read(["mention_id"])["mention_id"].cast(pa.large_binary()).to_pylist()  # may be no UTF-8
            pieces = table.taken(read, np.flatnonzero([mention_id in wanted for mention_id in ids]))
        for piece in chain([table.schema(read).empty_table()], pieces):
            tables.append(_described(piece, pictures, all_pictured=all_pictured, with_digests=with_digests))
    return pa.concat_tables(tables, promote_options="default")


def _described(mentions: pa.Table, pictures: Sequence[str], *, all_pictured: bool, with_digests: bool) -> pa.Table:
    """Select the small columns of mentions, and add `has_picture` and `image_digest`."""
    names = [*_GOLD_COLUMNS, *(["image_uri"] if with_digests else [])]
    table = mentions.select([name for name in names if name in mentions.column_names])
    if pictures:
        has_picture = np.full(len(mentions), all_pictured)
        for name in () if all_pictured else pictures:
            has_picture |= mentions[name].is_valid().to_numpy()
        table = table.append_column("has_picture", pa.array(has_picture))
    if with_digests and "image_bytes" in mentions.column_names:
        digests = [_digest(value) for value in mentions["image_bytes"]]
        table = table.append_column("image_digest", pa.array(digests, pa.binary()))
    return table


def _digest(value: pa.Scalar) -> bytes | None:
    return blake2b(value.as_buffer(), digest_size=16).digest() if value.is_valid else None


def entities_to_judge(knowledge_base: KnowledgeBase, gold: pa.Table, predictions: Sequence[pa.Table]) -> pa.Table:
    """Look up the gold entities, the candidates, and the entities named like a surface form.

    Returns:
        Table with columns `entity_id`, `name` and `popularity`.
    """
    candidates = (pc.list_flatten(table["candidates"]) for table in predictions)
    ids = [gold["entity_id"], *(pc.struct_field(column, "entity_id") for column in candidates)]
    names = gold["mention"] if "mention" in gold.column_names else pa.chunked_array([[]], pa.string())
    return knowledge_base.records(
        pa.chunked_array([chunk.cast(pa.large_string()) for column in ids for chunk in column.chunks]),
        names.cast(pa.large_string()),
    )

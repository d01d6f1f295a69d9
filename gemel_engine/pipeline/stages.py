"""Stages that the linking and training jobs share: functions from tables to tables.

Each function or class is one stage, which adapts the columns to functions of other modules. These
are imported where they run, so that a process that only reads rows does not load the libraries of
models. A row that fails keeps its `error`, and later stages skip it. This module does not use Ray.

Shapes: C is the vision width.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa

from gemel_engine.config.settings import JobConfig
from gemel_engine.errors import ImageFetchError, InvalidMentionError, MentionError
from gemel_engine.evidence.retrieved import Retrieved, retrieved_to_array
from gemel_engine.fingerprints import Contents, check_content
from gemel_engine.pipeline.corpus import Shard, read_rows
from gemel_engine.pipeline.isolation import isolate
from gemel_engine.types import Features, Mention, fault_of
from gemel_engine.vision.decode import decoder_peak_bytes
from gemel_engine.vision.fetch import fetch_images

logger = logging.getLogger(__name__)

Annotate = Callable[[pa.Table, Shard], pa.Table]  # adds columns to all rows of a shard

_COLUMNS = ("mention_id", "text", "mention", "mention_start", "candidate_ids", "group")
IMAGE_COLUMNS = ("image_bytes", "image_uri")
# Columns with the seconds that each stage spent.
STAGE_SECONDS = {"image": "image_seconds", "retrieval": "retrieval_seconds", "generation": "generation_seconds"}
# Columns with the largest memory of the stage's process up to the time when it finished a row.
STAGE_PEAK_BYTES = {
    "image": "image_peak_bytes",
    "retrieval": "retrieval_peak_bytes",
    "generation": "generation_peak_bytes",
}
# All columns of costs. The cost of a batch is spread evenly over its rows: any rows can be summed. For want of rows the
# engine had nothing to do for `waiting_seconds`, and fewer than half of its slots filled for `unfilled_seconds`.
COSTS = (
    *STAGE_SECONDS.values(),
    "prompt_tokens",
    "cached_tokens",
    "waiting_seconds",
    "unfilled_seconds",
    "rollouts",
    "rows_kept",
    "rows_extended",
)
PEAKS = tuple(STAGE_PEAK_BYTES.values())


def read_mentions(batch: pa.Table, output: str, also: Sequence[str], annotate: Annotate | None = None) -> pa.Table:
    """Read a shard and order it by surface form, so that prompts that begin alike are adjacent.

    Args:
        batch: One row, the fields of the `Shard`.
        output: Output directory of the run.
        also: Columns to read beside the small ones, if the corpus has them.
        annotate: Function that adds columns.

    Returns:
        The rows with three more columns: `shard`, `row` (in the shard's file) and `error` (null, or
        why the row can't be linked); and the columns of `annotate`.
    """
    (fields,) = batch.to_pylist()
    shard = Shard(**fields)
    table = isolate(partial(_read_rows, shard=shard, also=also), places_of(shard), output, "reading")
    if annotate is not None:
        table = annotate(table, shard)
    return table.sort_by([("mention", "ascending"), ("row", "ascending")])


def places_of(shard: Shard) -> pa.Table:
    """Return `shard`, `row` and an empty `error` for each row of a shard, as `isolate` divides them."""
    rows = np.arange(shard.start, shard.stop)
    shards, errors = np.full(len(rows), shard.index, np.int32), pa.nulls(len(rows), pa.string())
    return pa.table({"shard": shards, "row": rows, "error": errors})


def part_of(shard: Shard, places: pa.Table) -> Shard:
    """Return the part of a shard that has some adjacent places, without the digest if it is not all of it."""
    first = places["row"][0].as_py()
    part = replace(shard, start=first, stop=first + places.num_rows)
    return part if part == shard else replace(part, ids="")  # the digest covers all ids of the shard


def _read_rows(places: pa.Table, shard: Shard, also: Sequence[str]) -> pa.Table:
    """Read adjacent rows of a shard; if all have an `error`, read only their ids."""
    part = part_of(shard, places)
    if places["error"].null_count == 0:
        table, errors = read_rows(part, ("mention_id",)), places["error"].to_pylist()
        for name in ("text", "mention"):
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    else:
        table, errors = without_invalid_text(read_rows(part, (*_COLUMNS, *also)))
    for row, fault in enumerate(map(fault_of, _all_mentions(table))):
        if fault is not None and errors[row] is None:
            errors[row] = str(fault)
    for name in ("shard", "row"):
        table = table.append_column(name, places[name])
    return table.append_column("error", pa.array(errors, pa.string()))


class EncodeImages:
    """Adds missing `image_features` (C,), null without a picture; drops the pictures."""

    def __init__(self, config: JobConfig, contents: Contents | None = None) -> None:
        from gemel_engine.assembly import load_picture_encoder

        self._output = config.output
        self._policy = config.image_source
        self._skips_kept = not config.retrieval.num_candidates
        self._encoder = load_picture_encoder(config.vision)
        check_content(contents, "image_encoder", config.vision.image_encoder, self._encoder.fingerprint)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a batch's pictures."""
        return isolate(self._encode, batch, self._output, "images")

    def _encode(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        errors = batch["error"].to_pylist()
        features = column_values(batch, "image_features")
        needed = [
            error is None and item is None and not (keeps_previous and self._skips_kept)
            for error, item, keeps_previous in zip(errors, features, which_keep_previous(batch), strict=True)
        ]
        for row, item in enumerate(self._encoder.encode(self._files(batch, needed))):
            if isinstance(item, MentionError):
                errors[row] = str(item)
            elif item is not None:
                features[row] = item
        columns = ("image_features", *IMAGE_COLUMNS)
        batch = batch.drop_columns([column for column in columns if column in batch.column_names])
        batch = batch.append_column("image_features", pa.array(features, pa.list_(pa.float32())))
        return with_use(with_errors(batch, errors), "image", started, beside_bytes=decoder_peak_bytes())

    def _files(self, batch: pa.Table, needed: list[bool]) -> Iterator[bytes | ImageFetchError | None]:
        """Yield the image file of each row, None if it needs none; fetch those given by address."""
        files = repeat(None) if "image_bytes" not in batch.column_names else (f.as_py() for f in batch["image_bytes"])
        rows = zip(needed, files, column_values(batch, "image_uri"), strict=False)
        pictures = ((uri or None if file is None else file) if is_needed else None for is_needed, file, uri in rows)
        return fetch_images(pictures, self._policy)


class Retrieve:
    """Adds `retrieved`: demonstrations, cards and candidates, as `RETRIEVED_TYPE`."""

    def __init__(self, config: JobConfig, contents: Contents | None = None) -> None:
        from gemel_engine.assembly import open_retriever

        self._output = config.output
        self._skips_kept = not config.retrieval.num_candidates
        self._retriever = open_retriever(config, contents)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Retrieve for a batch."""
        return isolate(self._retrieve, batch, self._output, "retrieval")

    def _retrieve(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        mentions, features = mentions_without_error(batch), image_features_of(batch)
        is_skipped = which_keep_previous(batch) if self._skips_kept else [False] * batch.num_rows
        rows = [row for row, mention in enumerate(mentions) if mention is not None and not is_skipped[row]]
        found = self._retriever.retrieve(
            [mention for row in rows if (mention := mentions[row]) is not None], [features[row] for row in rows]
        )
        retrieved = [Retrieved()] * len(mentions)
        for row, item in zip(rows, found, strict=True):
            retrieved[row] = item
        batch = batch.append_column("retrieved", retrieved_to_array(retrieved))
        return with_use(batch, "retrieval", started)


def without_invalid_text(
    table: pa.Table, kind: type[MentionError] = InvalidMentionError
) -> tuple[pa.Table, list[str | None]]:
    """Replace text that is not UTF-8 by null; return the table and the error of each row."""
    errors: list[str | None] = [None] * table.num_rows
    for position, field in enumerate(table.schema):
        try:
            table[position].validate(full=True)
        except pa.ArrowInvalid:
            values = []
            for row, value in enumerate(table[position]):
                try:
                    values.append(value.as_py())
                except UnicodeDecodeError:
                    values.append(None)
                    errors[row] = str(kind(f"{field.name} is not UTF-8: write it again"))
            table = table.set_column(position, field, pa.array(values, field.type))
    return table, errors


def _all_mentions(batch: pa.Table) -> Iterator[Mention]:
    """Yield the mention of each row, including rows with an error."""
    for row in batch.select([column for column in _COLUMNS if column in batch.column_names]).to_pylist():
        candidate_ids = row.pop("candidate_ids", None)
        yield Mention(**row, candidate_ids=None if candidate_ids is None else tuple(candidate_ids))


def mentions_without_error(batch: pa.Table) -> list[Mention | None]:
    """Return the mention of each row, None for a row with an error."""
    errors = batch["error"].to_pylist()
    return [mention if error is None else None for mention, error in zip(_all_mentions(batch), errors, strict=True)]


def image_features_of(batch: pa.Table) -> list[Features | None]:
    """Return the image features (C,) of each row, None without a picture."""
    if "image_features" not in batch.column_names:
        return [None] * batch.num_rows
    vectors = (row.values for row in batch["image_features"])  # Arrow arrays, not Python lists
    with np.errstate(over="ignore"):  # values too large become infinite, and the row gets an error
        return [None if row is None else row.to_numpy(zero_copy_only=False).astype(np.float32) for row in vectors]


def which_keep_previous(batch: pa.Table) -> list[bool]:
    """Return whether each row keeps its previous prediction, so that no model is needed for it."""
    return [bool(keeps_previous) for keeps_previous in column_values(batch, "keeps_previous")]


def column_values(batch: pa.Table, name: str) -> list[Any]:
    """Return the values of a column, None for each row if the batch lacks the column."""
    return batch[name].to_pylist() if name in batch.column_names else [None] * batch.num_rows


def with_errors(batch: pa.Table, errors: list[str | None]) -> pa.Table:
    """Return the batch with other values in its column `error`."""
    return batch.set_column(batch.column_names.index("error"), "error", pa.array(errors, pa.string()))


def with_use(batch: pa.Table, stage: str, started: float, beside_bytes: int = 0) -> pa.Table:
    """Add the seconds that a stage spent on a batch, and the largest memory of this process.

    Args:
        batch: Finished rows of the stage.
        stage: Stage, a key of `STAGE_SECONDS`.
        started: Start of the work on the batch, by `time.monotonic`.
        beside_bytes: Largest memory of a helper process, added to that of this process.
    """
    batch = with_cost(batch, STAGE_SECONDS[stage], time.monotonic() - started)
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + beside_bytes  # Linux counts in KiB
    return batch.append_column(STAGE_PEAK_BYTES[stage], pa.array(np.full(batch.num_rows, peak)))


def with_cost(batch: pa.Table, name: str, cost: float) -> pa.Table:
    """Add a column with the cost of a batch, spread evenly over its rows."""
    num_rows = max(1, batch.num_rows)
    return batch.append_column(name, pa.array(np.full(batch.num_rows, cost / num_rows)))

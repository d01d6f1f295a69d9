"""Stages that only the linking job has: sort the corpus, generate names, write parts."""

from __future__ import annotations

import logging
import os
import time
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import storage
from gemel_engine.config.settings import LinkConfig
from gemel_engine.contents import check_contents
from gemel_engine.decoding.scheduler import Usage
from gemel_engine.display import make_visible
from gemel_engine.errors import EngineDiedError, error_kind
from gemel_engine.evidence.retrieved import row_to_retrieved
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.pipeline.chain import Stage, reading_stages
from gemel_engine.pipeline.corpus import SMALL_SCHEMA, Shard, read_rows
from gemel_engine.pipeline.isolation import isolate
from gemel_engine.pipeline.output import write_part
from gemel_engine.pipeline.stages import (
    COSTS,
    PEAKS,
    column_values,
    image_features_of,
    mentions_without_error,
    which_keep_previous,
    with_cost,
    with_use,
)
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import Prediction, predictions_to_table, row_to_prediction

logger = logging.getLogger(__name__)
logger.addFilter(make_visible)  # removes secrets from tracebacks, in actors too

# A receipt for finished rows of a shard; costs and peaks of a stage that the run lacks are null.
RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("num_by_evidence", pa.int64(), nullable=False),
        pa.field("error_kinds", pa.list_(pa.string()), nullable=False),  # one per row with an error
        *(pa.field(name, pa.float64()) for name in (*COSTS, *PEAKS)),
    ]
)


def read_with_places(batch: pa.Table) -> pa.Table:
    """Read a range of rows; add `place`, the position of each row in the ordered corpus."""
    (fields,) = batch.drop_columns(["places"]).to_pylist()
    table = read_rows(Shard(**fields), SMALL_SCHEMA.names)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in SMALL_SCHEMA
    ]
    return pa.table(columns, schema=SMALL_SCHEMA).append_column("place", batch["places"].combine_chunks().flatten())


def write_ordered(batch: pa.Table, directory: str, rows_per_shard: int) -> pa.Table:
    """Store a block of the ordered corpus, one row group per shard; return a receipt."""
    first = batch["place"][0].as_py()
    data = parquet_bytes(batch.drop_columns(["place"]), rows_per_shard)
    storage.write_bytes(f"{directory}/{first:012d}.parquet", data)
    return pa.table({"num_rows": [batch.num_rows]})


class GenerateEntityNames:
    """Turns mentions into predictions; an incremental run starts from the previous predictions."""

    _last_end: float | None = None  # of the work on a batch

    def __init__(self, config: LinkConfig, contents: Contents | None = None) -> None:
        from gemel_engine.assembly import start_generator  # imports torch

        check_contents(contents, config)
        self._output, self._carried = config.output, config.output_columns
        self._checks_prompts = config.retrieval.num_candidates > 0
        previous = PreviousRun.of(config)
        added_names = None if previous is None else previous.added_names()
        self._generator = start_generator(config, added_names=added_names)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the predictions of a batch, with `shard`, `row` and the columns of costs."""
        return isolate(self._generate, batch, self._output, "generation")

    def _generate(self, batch: pa.Table) -> pa.Table:
        started, usage = time.monotonic(), Usage()
        waiting_seconds = 0.0 if self._last_end is None else started - self._last_end
        prompt_tokens, cached_tokens = self._cache_counts()
        mentions, features = mentions_without_error(batch), image_features_of(batch)
        rows = [row for row, mention in enumerate(mentions) if mention is not None]
        retrieved = [row_to_retrieved(item) for item in column_values(batch, "retrieved")]
        previous = [None if row is None else row_to_prediction(row) for row in column_values(batch, "previous")]
        if self._checks_prompts:
            for row in rows:
                before, mention = previous[row], mentions[row]
                if before is not None and mention is not None:
                    can_continue = self._generator.can_continue(mention, features[row], retrieved[row], before)
                    previous[row] = before if can_continue else None
        try:
            linked = self._generator.generate(
                [mention for mention in mentions if mention is not None],
                [features[row] for row in rows],
                [retrieved[row] for row in rows],
                [previous[row] for row in rows],
                usage,
            )
        except EngineDiedError:
            logger.exception("this process ends with its engine")
            os._exit(1)  # the mark of these rows stays; Ray restarts the actor and its engine
        ids, errors = batch["mention_id"].to_pylist(), batch["error"].to_pylist()
        predictions = [Prediction(mention_id, error=error) for mention_id, error in zip(ids, errors, strict=True)]
        for row, prediction in zip(rows, linked, strict=True):
            predictions[row] = prediction
        table = predictions_to_table(predictions)
        for carried in self._carried:
            table = table.append_column(SMALL_SCHEMA.field(carried), _carried_values(batch, carried))
        for column in ("shard", "row", *COSTS, *PEAKS):
            if column in batch.column_names:
                table = table.append_column(column, batch[column])
        table = with_use(table, "generation", started)
        now = self._cache_counts()
        num_rollouts = sum(
            (after.num_rollouts or 0) - (0 if before is None else before.num_rollouts or 0)
            for before, after in zip(previous, predictions, strict=True)
            if after.error is None
        )
        keep_previous = which_keep_previous(batch)
        num_kept = sum(keep_previous[row] and previous[row] is not None for row in range(batch.num_rows))
        costs = {
            "prompt_tokens": now[0] - prompt_tokens,
            "cached_tokens": now[1] - cached_tokens,
            "waiting_seconds": waiting_seconds,
            "unfilled_seconds": usage.unfilled_seconds,
            "rollouts": num_rollouts,
            "rows_kept": num_kept,
            "rows_extended": len(previous) - previous.count(None) - num_kept,
        }
        for name, cost in costs.items():
            table = with_cost(table, name, cost)
        self._last_end = time.monotonic()
        return table

    def _cache_counts(self) -> tuple[int, int]:
        statistics = self._generator.engine.cache_statistics
        return statistics.num_prompt_tokens, statistics.num_cached_tokens


def _carried_values(batch: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of the input for the output, of nulls if the input lacks it."""
    values = batch[name] if name in batch.column_names else pa.chunked_array([pa.nulls(len(batch))])
    return values.cast(SMALL_SCHEMA.field(name).type)


def write_parts(batch: pa.Table, output: str) -> pa.Table:
    """Store the predictions of a batch by shard; return one row of `RECEIPT_SCHEMA` per shard."""
    receipts = []
    for index in pc.unique(batch["shard"]).to_pylist():
        part = batch.filter(pc.equal(batch["shard"], index))
        costs = {name: pc.sum(part[name]).as_py() for name in COSTS if name in part.column_names}
        peaks = {name: pc.max(part[name]).as_py() for name in PEAKS if name in part.column_names}
        receipt = {
            "shard": index,
            "part": write_part(output, index, part.drop_columns(["shard", *costs, *peaks])),
            "num_rows": part.num_rows,
            "num_by_evidence": pc.sum(pc.equal(part["decided_by"], "evidence")).as_py() or 0,
            "error_kinds": [error_kind(error) for error in part["error"].drop_null().to_pylist()],
        }
        receipts.append(receipt | costs | peaks)
    return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)


def linking_stages(config: LinkConfig, contents: Contents | None) -> list[Stage]:
    """Return the stages of a run, from shards to the receipts of written parts."""
    previous = PreviousRun.of(config)
    return [
        *reading_stages(config, contents, annotate=None if previous is None else previous.attach),
        Stage(GenerateEntityNames, (config, contents), config.resources.generation),
        Stage(partial(write_parts, output=config.output)),
    ]

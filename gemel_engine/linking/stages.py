"""What the linking job does to a block of rows: sort, generate, write parts."""

from __future__ import annotations

import logging
import os
import time

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import storage
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import EngineDiedError
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.incremental import EarlierRun
from gemel_engine.pipeline.corpus import SMALL_SCHEMA, Shard, read_rows
from gemel_engine.pipeline.isolation import isolate
from gemel_engine.pipeline.output import write_part
from gemel_engine.pipeline.stages import (
    COSTS,
    PEAKS,
    _are_settled,
    _column,
    _features,
    _mentions,
    _with_cost,
    _with_use,
)
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import Prediction, predictions_to_table, row_to_prediction

logger = logging.getLogger(__name__)


# What is said of finished rows of a shard; costs and peaks are null where the stage is none of the run's.
RECEIPT_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
        pa.field("error_kinds", pa.list_(pa.string()), nullable=False),  # of each row with an error
        *(pa.field(name, pa.float64()) for name in (*COSTS, *PEAKS)),
    ]
)


def read_with_places(batch: pa.Table) -> pa.Table:
    """Read a range of rows; adds `place`, that of each row in the ordered corpus, which the batch brings."""
    (fields,) = batch.drop_columns(["places"]).to_pylist()
    table = read_rows(Shard(**fields), SMALL_SCHEMA.names)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in SMALL_SCHEMA
    ]
    return pa.table(columns, schema=SMALL_SCHEMA).append_column("place", batch["places"].combine_chunks().flatten())


def write_ordered(batch: pa.Table, directory: str, rows_per_shard: int) -> pa.Table:
    """Store a block of the ordered corpus, each shard a row group; returns a receipt."""
    first = batch["place"][0].as_py()
    data = parquet_bytes(batch.drop_columns(["place"]), rows_per_shard)
    storage.write_bytes(f"{directory}/{first:012d}.parquet", data)
    return pa.table({"num_rows": [batch.num_rows]})


class GenerateEntityNames:
    """Turns mentions into predictions; where an earlier run is carried on, its predictions into those of this run."""

    def __init__(self, config: LinkConfig, contents: Contents | None = None) -> None:
        from gemel_engine.assembly import check_contents, start_generator

        check_contents(contents, config)
        self._output = config.output
        earlier = EarlierRun.of(config)
        added_names = None if earlier is None else earlier.added_names()
        self._generator = start_generator(config, added_names=added_names)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Link a batch; keeps `shard`, `row` and the costs."""
        return isolate(self._generate, batch, self._output, "generation")

    def _generate(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        prompt_tokens, cached_tokens = self._cache_counts()
        mentions, features = _mentions(batch), _features(batch)
        rows = [row for row, mention in enumerate(mentions) if mention is not None]
        demonstrations = [item or [] for item in _column(batch, "demonstrations")]
        earlier = [None if row is None else row_to_prediction(row) for row in _column(batch, "previous")]
        try:
            linked = self._generator.generate(
                [mention for mention in mentions if mention is not None],
                [features[row] for row in rows],
                [demonstrations[row] for row in rows],
                [earlier[row] for row in rows],
            )
        except EngineDiedError:
            logger.exception("this process ends with its engine")
            os._exit(1)  # the mark of these rows stays; whoever runs the stage starts both again
        ids, errors = batch["mention_id"].to_pylist(), batch["error"].to_pylist()
        predictions = [Prediction(mention_id, error=error) for mention_id, error in zip(ids, errors, strict=True)]
        for row, prediction in zip(rows, linked, strict=True):
            predictions[row] = prediction
        table = predictions_to_table(predictions)
        for column in ("shard", "row", *COSTS, *PEAKS):
            if column in batch.column_names:
                table = table.append_column(column, batch[column])
        table = _with_use(table, "generation", started)
        now = self._cache_counts()
        num_rollouts = sum(
            (after.num_rollouts or 0) - (0 if before is None else before.num_rollouts or 0)
            for before, after in zip(earlier, predictions, strict=True)
            if after.error is None
        )
        num_kept = sum(_are_settled(batch))
        costs = {
            "prompt_tokens": now[0] - prompt_tokens,
            "cached_tokens": now[1] - cached_tokens,
            "rollouts": num_rollouts,
            "rows_kept": num_kept,
            "rows_extended": len(earlier) - earlier.count(None) - num_kept,
        }
        for name, cost in costs.items():
            table = _with_cost(table, name, cost)
        return table

    def _cache_counts(self) -> tuple[int, int]:
        statistics = getattr(self._generator.engine, "cache_statistics", None)
        return (0, 0) if statistics is None else (statistics.num_prompt_tokens, statistics.num_cached_tokens)


def write_parts(batch: pa.Table, output: str, plan: dict[int, Shard]) -> pa.Table:
    """Store a batch's predictions, shard by shard; returns a receipt for each, of `RECEIPT_SCHEMA`."""
    receipts = []
    for index in pc.unique(batch["shard"]).to_pylist():
        part = batch.filter(pc.equal(batch["shard"], index))
        costs = {name: pc.sum(part[name]).as_py() for name in COSTS if name in part.column_names}
        peaks = {name: pc.max(part[name]).as_py() for name in PEAKS if name in part.column_names}
        receipt = {
            "shard": index,
            "part": write_part(output, plan[index], part.drop_columns([*costs, *peaks])),
            "num_rows": part.num_rows,
            "error_kinds": [error.partition(":")[0] for error in part["error"].drop_null().to_pylist()],
        }
        receipts.append(receipt | costs | peaks)
    return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)

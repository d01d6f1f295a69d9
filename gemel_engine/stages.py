"""What the linking and training jobs do to a block of rows: tables in, tables out.

Each function or class is one stage; it adapts columns, and what it does stands in other modules, which are imported
where they run: a process that only reads rows does not load four libraries of models. A row that fails carries its
`error` to the end, and later stages leave it alone. Nothing here knows Ray.

C vision width.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import parquet, shards, storage
from gemel_engine.config import JobConfig, LinkConfig, TrainConfig
from gemel_engine.errors import EngineDiedError, ImageFetchError, MentionError
from gemel_engine.fingerprints import Contents, check_content, check_contents, read_manifest_at
from gemel_engine.image_file import decoder_peak_bytes
from gemel_engine.image_source import fetch_image
from gemel_engine.poison import isolate
from gemel_engine.relinking import EarlierRun
from gemel_engine.shards import Shard
from gemel_engine.storage import download_directory
from gemel_engine.types import (
    Features,
    Mention,
    Prediction,
    check_features,
    fault_of,
    predictions_to_table,
    row_to_prediction,
)

logger = logging.getLogger(__name__)

_COLUMNS = ("mention_id", "text", "mention", "mention_start", "candidate_ids", "group")
IMAGE_COLUMNS = ("image_bytes", "image_uri")
_FETCH_THREADS = 16
_FETCHED_AHEAD = 64  # image files that are held at once, at most
# What a stage spent on a batch, spread evenly over its rows, so that it can be summed wherever the rows end up.
COSTS = (
    "image_seconds",
    "retrieval_seconds",
    "generation_seconds",
    "prompt_tokens",
    "cached_tokens",
    "rollouts",
    "rows_kept",
    "rows_extended",
)
# The most memory that the process of a stage had held by the time when it was done with a row.
PEAKS = ("image_peak_bytes", "retrieval_peak_bytes", "generation_peak_bytes")
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


def read_mentions(batch: pa.Table, output: str, also: Sequence[str], earlier: EarlierRun | None = None) -> pa.Table:
    """Read a shard, ordered by surface form, so that equal prompts' beginnings follow each other.

    Reads the columns of `also` beside the small ones, where the corpus has them. Adds `shard`, `row` (in the
    shard's file) and `error` (null so far, or why the row can't be linked); for a run that carries on an earlier one
    also what that says of each row. `output` is the run's directory.
    """
    (fields,) = batch.to_pylist()
    shard = Shard(**fields)
    rows = np.arange(shard.start, shard.stop)
    places = pa.table(
        {
            "shard": np.full(len(rows), shard.index, np.int32),
            "row": rows,
            "error": pa.nulls(len(rows), pa.string()),
        }
    )
    table = isolate(partial(_read_rows, shard=shard, also=also), places, output, "reading")
    if earlier is not None:
        table = earlier.attach(table, shard)
    return table.sort_by([("mention", "ascending"), ("row", "ascending")])


def _read_rows(places: pa.Table, shard: Shard, also: Sequence[str]) -> pa.Table:
    """Read rows of a shard that follow each other; of a row with an error the id alone."""
    first, are_unreadable = places["row"][0].as_py(), places["error"].null_count == 0
    part = replace(shard, start=first, stop=first + places.num_rows)
    if are_unreadable:
        table, errors = shards.read_rows(part, ("mention_id",)), places["error"].to_pylist()
        for name in ("text", "mention"):
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    else:
        table, errors = _without_invalid_text(shards.read_rows(part, (*_COLUMNS, *also)))
    for row, fault in enumerate(map(fault_of, _all_mentions(table))):
        if fault is not None and errors[row] is None:
            errors[row] = str(fault)
    for name in ("shard", "row"):
        table = table.append_column(name, places[name])
    return table.append_column("error", pa.array(errors, pa.string()))


def read_with_places(batch: pa.Table) -> pa.Table:
    """Read a range of rows; adds `place`, that of each row in the ordered corpus, which the batch brings."""
    (fields,) = batch.drop_columns(["places"]).to_pylist()
    table = shards.read_rows(Shard(**fields), shards.SMALL_SCHEMA.names)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
        for field in shards.SMALL_SCHEMA
    ]
    return pa.table(columns, schema=shards.SMALL_SCHEMA).append_column(
        "place", batch["places"].combine_chunks().flatten()
    )


def write_ordered(batch: pa.Table, directory: str, rows_per_shard: int) -> pa.Table:
    """Store a block of the ordered corpus, each shard a row group; returns a receipt."""
    first = batch["place"][0].as_py()
    data = shards.parquet_bytes(batch.drop_columns(["place"]), rows_per_shard)
    storage.write_bytes(f"{directory}/{first:012d}.parquet", data)
    return pa.table({"num_rows": [batch.num_rows]})


class EncodeImages:
    """Adds `image_features` (C,), null without a picture; drops the picture. Features that a row has already stay."""

    def __init__(self, config: JobConfig, contents: Contents | None = None) -> None:
        from gemel_engine.linker import load_picture_encoder

        self._output = config.output
        self._policy = config.image_source
        self._encoder = load_picture_encoder(config.vision)
        check_content(contents, "image_encoder", config.vision.image_encoder, self._encoder.fingerprint)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a batch's pictures."""
        return isolate(self._encode, batch, self._output, "images")

    def _encode(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        errors = batch["error"].to_pylist()
        features = _column(batch, "image_features")
        needed = [
            error is None and item is None and not is_settled
            for error, item, is_settled in zip(errors, features, _are_settled(batch), strict=True)
        ]
        for row, item in enumerate(self._encoder.encode(self._files(batch, needed))):
            if isinstance(item, MentionError):
                errors[row] = str(item)
            elif item is not None:
                features[row] = item
        columns = ("image_features", *IMAGE_COLUMNS)
        batch = batch.drop_columns([column for column in columns if column in batch.column_names])
        batch = batch.append_column("image_features", pa.array(features, pa.list_(pa.float32())))
        return _with_use(_with_errors(batch, errors), "image", started, beside_bytes=decoder_peak_bytes())

    def _files(self, batch: pa.Table, needed: list[bool]) -> Iterator[bytes | ImageFetchError | None]:
        """The image file of each row that needs one; a row that has both a file and an address keeps the file."""
        files = repeat(None) if "image_bytes" not in batch.column_names else (f.as_py() for f in batch["image_bytes"])
        ahead: deque[bytes | Future[bytes | ImageFetchError] | None] = deque()
        with ThreadPoolExecutor(_FETCH_THREADS) as threads:
            for is_needed, file, uri in zip(needed, files, _column(batch, "image_uri"), strict=False):
                if not is_needed:
                    ahead.append(None)
                else:
                    ahead.append(threads.submit(self._fetch, uri) if file is None and uri else file)
                if len(ahead) == _FETCHED_AHEAD:
                    yield _result(ahead.popleft())
            yield from map(_result, ahead)

    def _fetch(self, uri: str) -> bytes | ImageFetchError:
        try:
            return fetch_image(uri, self._policy)
        except ImageFetchError as error:
            return error


class RetrieveDemonstrations:
    """Adds `demonstrations`: rows of the index, the most similar last."""

    def __init__(self, config: JobConfig, contents: Contents | None = None) -> None:
        from gemel_engine.linker import DemonstrationRetriever
        from gemel_engine.retrieval import DemonstrationIndex

        directory = config.demonstrations
        assert directory is not None, "else there is no such stage"
        self._output = config.output
        check_content(contents, "demonstrations", directory, read_manifest_at(f"{directory}/index.json"))
        self._retriever = DemonstrationRetriever(
            config.retrieval,
            DemonstrationIndex.open(download_directory(directory)),
            device="cuda" if config.resources.retrieval.num_gpus else "cpu",
        )
        fingerprint = self._retriever.encoder.fingerprint
        check_content(contents, "mention_encoder", config.retrieval.mention_encoder, fingerprint)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Retrieve a batch's demonstrations."""
        return isolate(self._retrieve, batch, self._output, "retrieval")

    def _retrieve(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        mentions, features = _mentions(batch), _features(batch)
        are_settled = _are_settled(batch)
        rows = [row for row, mention in enumerate(mentions) if mention is not None and not are_settled[row]]
        found = self._retriever.retrieve(
            [mention for row in rows if (mention := mentions[row]) is not None], [features[row] for row in rows]
        )
        retrieved: list[list[int]] = [[] for _ in mentions]
        for row, demonstrations in zip(rows, found, strict=True):
            retrieved[row] = demonstrations
        batch = batch.append_column("demonstrations", pa.array(retrieved, pa.list_(pa.int32())))
        return _with_use(batch, "retrieval", started)


class GenerateEntityNames:
    """Turns mentions into predictions; where an earlier run is carried on, its predictions into those of this run."""

    def __init__(self, config: LinkConfig, contents: Contents | None = None) -> None:
        from gemel_engine.generation import EntityNameGenerator

        check_contents(contents, config)
        self._output = config.output
        earlier = EarlierRun.of(config)
        added_names = None if earlier is None else earlier.added_names()
        self._generator = EntityNameGenerator.start(config, added_names=added_names)

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


class CheckExamples:
    """Sets the `error` of mentions that can't be trained on: an unknown entity, too long a text, bad features."""

    def __init__(self, config: TrainConfig, prefix_length: int, vision_width: int | None) -> None:
        import torch

        from gemel_engine.knowledge_base import KnowledgeBase
        from gemel_engine.knowledge_base_update import local_knowledge_base
        from gemel_engine.model import load_tokenizer
        from gemel_engine.prompt import PromptBuilder

        self._output = config.output
        self._knowledge_base = KnowledgeBase.open(local_knowledge_base(config.knowledge_base))
        self._builder = PromptBuilder(load_tokenizer(config.language_model.name), config.prompt)
        self._stand_in = torch.empty(prefix_length, 0)
        self._width = vision_width

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Check a batch."""
        return isolate(self._check_rows, batch, self._output, "examples")

    def _check_rows(self, batch: pa.Table) -> pa.Table:
        errors = batch["error"].to_pylist()
        entity_ids = [entity_id or "" for entity_id in batch["entity_id"].to_pylist()]
        names = self._knowledge_base.names_of_entities(entity_ids)
        features = _column(batch, "image_features")
        for row, mention in enumerate(_mentions(batch)):
            if mention is None:
                continue
            if names[row] is None:
                errors[row] = f"unknown_entity: {entity_ids[row]!r} is not in the knowledge base"
                continue
            try:
                self._check(mention, features[row])
            except MentionError as error:
                errors[row] = str(error)
        return _with_errors(batch, errors)

    def _check(self, mention: Mention, features: list[float] | None) -> None:
        self._builder.question(mention.text, mention.mention, None if features is None else self._stand_in)
        if features is not None:
            with np.errstate(over="ignore"):
                check_features(np.array(features, np.float32), self._width or len(features))


def write_examples(batch: pa.Table, directory: str) -> pa.Table:
    """Store prepared mentions; returns a receipt."""
    (first,) = batch.select(["shard", "row"]).slice(0, 1).to_pylist()
    name = f"shard-{first['shard']:05d}-{first['row']:08d}.parquet"
    storage.write_bytes(f"{directory}/{name}", shards.parquet_bytes(batch))
    usable = pc.and_(pc.is_null(batch["error"]), pc.is_valid(batch["image_features"]))
    return pa.table({"num_rows": [batch.num_rows], "num_pictures": [pc.sum(usable).as_py() or 0]})


def read_file(batch: pa.Table) -> pa.Table:
    """Read the Parquet file that a row names."""
    with parquet.open_table(batch["uri"][0].as_py()) as table:
        return table.read()


def write_parts(batch: pa.Table, output: str, plan: dict[int, Shard]) -> pa.Table:
    """Store a batch's predictions, shard by shard; returns a receipt for each, of `RECEIPT_SCHEMA`."""
    receipts = []
    for index in pc.unique(batch["shard"]).to_pylist():
        part = batch.filter(pc.equal(batch["shard"], index))
        costs = {name: pc.sum(part[name]).as_py() for name in COSTS if name in part.column_names}
        peaks = {name: pc.max(part[name]).as_py() for name in PEAKS if name in part.column_names}
        receipt = {
            "shard": index,
            "part": shards.write_part(output, plan[index], part.drop_columns([*costs, *peaks])),
            "num_rows": part.num_rows,
            "error_kinds": [error.partition(":")[0] for error in part["error"].drop_null().to_pylist()],
        }
        receipts.append(receipt | costs | peaks)
    return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)


def _without_invalid_text(table: pa.Table) -> tuple[pa.Table, list[str | None]]:
    """Null in place of text that is not UTF-8, which Parquet promises and nobody checks; and the error of such rows."""
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
                    errors[row] = f"invalid_mention: {field.name} is not UTF-8: write it again"
            table = table.set_column(position, field, pa.array(values, field.type))
    return table, errors


def _all_mentions(batch: pa.Table) -> Iterator[Mention]:
    """The mention of each row, those with an error included."""
    for row in batch.select([column for column in _COLUMNS if column in batch.column_names]).to_pylist():
        candidate_ids = row.pop("candidate_ids", None)
        yield Mention(**row, candidate_ids=None if candidate_ids is None else tuple(candidate_ids))


def _mentions(batch: pa.Table) -> list[Mention | None]:
    """The mention of each row, None where it has an error."""
    errors = batch["error"].to_pylist()
    return [mention if error is None else None for mention, error in zip(_all_mentions(batch), errors, strict=True)]


def _features(batch: pa.Table) -> list[Features | None]:
    """The image features (C,) of each row, None without a picture."""
    if "image_features" not in batch.column_names:
        return [None] * batch.num_rows
    vectors = (row.values for row in batch["image_features"])  # arrays, not lists of Python's numbers
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is an error of the row
        return [None if row is None else row.to_numpy(zero_copy_only=False).astype(np.float32) for row in vectors]


def _are_settled(batch: pa.Table) -> list[bool]:
    """Whether nothing is to be asked of a model about each row, since an earlier run's prediction stands."""
    return [bool(is_settled) for is_settled in _column(batch, "is_settled")]


def _result(file: bytes | Future[bytes | ImageFetchError] | None) -> bytes | ImageFetchError | None:
    return file.result() if isinstance(file, Future) else file


def _column(batch: pa.Table, name: str) -> list[Any]:
    """A column's values; None for each row where the batch does not have it."""
    return batch[name].to_pylist() if name in batch.column_names else [None] * batch.num_rows


def _with_errors(batch: pa.Table, errors: list[str | None]) -> pa.Table:
    return batch.set_column(batch.column_names.index("error"), "error", pa.array(errors, pa.string()))


def _with_use(batch: pa.Table, stage: str, started: float, beside_bytes: int = 0) -> pa.Table:
    """Add the seconds since a stage started on a batch, and the most memory that this process has ever held.

    Args:
        batch: The rows that the stage is done with.
        stage: Prefix of the two columns.
        started: When it began, by `time.monotonic`.
        beside_bytes: What a process that works for this one has held.
    """
    batch = _with_cost(batch, f"{stage}_seconds", time.monotonic() - started)
    peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + beside_bytes  # Linux counts in KiB
    return batch.append_column(f"{stage}_peak_bytes", pa.array(np.full(batch.num_rows, peak)))


def _with_cost(batch: pa.Table, name: str, cost: float) -> pa.Table:
    num_rows = max(1, batch.num_rows)
    return batch.append_column(name, pa.array(np.full(batch.num_rows, cost / num_rows)))

"""The linking job: Ray Data streams shards of mentions through actors that encode, retrieve and generate.

    read mentions → EncodeImages → RetrieveDemonstrations → GenerateEntityNames → write parts → commit shards

A stage class only adapts columns; what it does stands in modules that don't know Ray, and is imported where it runs: a
process that only reads rows does not load four libraries of models. One block is one shard, or a part of it. A row that
fails carries its `error` to the end, and later stages leave it alone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from gemel_engine import shards, storage
from gemel_engine.config import LinkConfig, PoolSettings, config_json
from gemel_engine.errors import ImageFetchError, TooManyFailuresError
from gemel_engine.image_source import fetch_image
from gemel_engine.shards import Shard
from gemel_engine.types import Mention, Prediction, predictions_to_table

if TYPE_CHECKING:
    from gemel_engine.generation import Artifacts

logger = logging.getLogger(__name__)

_COLUMNS = ("mention_id", "text", "mention", "mention_start", "candidate_ids")
_IMAGE_COLUMNS = ("image_bytes", "image_uri")
_FETCH_THREADS = 16
# Settings that may differ between a run and its continuation: they change no row of the output.
_NOT_IDENTITY = ("resources", "output", "max_failed_fraction", "verify_artifacts")
# What a stage spent on a batch, spread evenly over its rows, so that it can be summed wherever the rows end up.
_COSTS = ("image_seconds", "retrieval_seconds", "generation_seconds", "prompt_tokens", "cached_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """What came of a run.

    Attributes:
        rows: Rows of the output, all shards.
        errors: Rows that ended in an error, by kind.
        certified_share: Share of the linked rows whose name is proved to be the best.
        rollouts_per_mention: Mean over the linked rows.
        shards: Shards of the output.
        shards_skipped: Those that an earlier run had finished.
        rows_linked_now: Rows of the shards that this run finished; what follows is of these.
        seconds: From the start of the job to its last shard.
        mentions_per_second: Rows over seconds, start-up included.
        stage_seconds: Time that each stage's actors were busy.
        prefix_cache_hit_rate: Share of the prompt tokens sent to the engine that it had in its cache.
        feature_mapper: `trained`, `untrained` (random weights) or `none`.
    """

    rows: int
    errors: dict[str, int]
    certified_share: float | None
    rollouts_per_mention: float | None
    shards: int
    shards_skipped: int
    rows_linked_now: int
    seconds: float
    mentions_per_second: float
    stage_seconds: dict[str, float]
    prefix_cache_hit_rate: float | None
    feature_mapper: str

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"rows={self.rows} errors={sum(self.errors.values())} certified={_percent(self.certified_share)} "
            f"mentions_per_s={self.mentions_per_second:.2f} cache_hits={_percent(self.prefix_cache_hit_rate)} "
            f"feature_mapper={self.feature_mapper}"
        )


def link_corpus(config: LinkConfig) -> LinkReport:
    """Link a corpus: every input row becomes exactly one output row.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable (nothing has been started then), or more
            rows failed than `max_failed_fraction` allows (the output is complete then).
    """
    from gemel_engine.generation import open_artifacts
    from gemel_engine.linker import check_encoders

    started = time.monotonic()
    plan = shards.plan_shards(config.input, config.rows_per_shard)
    artifacts = open_artifacts(config, verify=config.verify_artifacts)
    check_encoders(config, artifacts)
    shards.claim_output(config.output, _identity(config, plan))
    finished = shards.finished_shards(config.output)
    remaining = [shard for shard in plan if shard.name not in finished]
    costs: Counter[str] = Counter()
    if remaining:
        connect()
        receipts = stream_parts(config, remaining).iter_batches(batch_size=None, batch_format="pyarrow")
        costs = _commit_as_completed(config.output, remaining, receipts)
    storage.remove_tree(f"{config.output}/_parts")
    report = _report(config, artifacts, plan, remaining, costs, time.monotonic() - started)
    storage.write_bytes(f"{config.output}/report.json", json.dumps(asdict(report), indent=2).encode())
    logger.info("linked %s: %s", config.output, report.summary())
    _check_failures(config, report)
    return report


def stream_parts(config: LinkConfig, remaining: Sequence[Shard]) -> Dataset:
    """The pipeline, up to the receipts of the parts that it wrote; nothing runs until it is consumed."""
    dataset: Dataset = ray.data.from_items([asdict(shard) for shard in remaining], override_num_blocks=len(remaining))
    dataset = dataset.map_batches(
        partial(read_mentions, config=config), batch_size=1, batch_format="pyarrow", num_cpus=0.25
    )
    pools = config.resources
    if config.vision.image_encoder is not None:
        dataset = dataset.map_batches(EncodeImages, fn_constructor_args=(config,), **_pool(pools.images))
    if config.demonstrations is not None and config.retrieval.num_demonstrations:
        dataset = dataset.map_batches(RetrieveDemonstrations, fn_constructor_args=(config,), **_pool(pools.retrieval))
    dataset = dataset.map_batches(GenerateEntityNames, fn_constructor_args=(config,), **_pool(pools.generation))
    return dataset.map_batches(
        partial(write_parts, output=config.output, plan={shard.index: shard for shard in remaining}),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
    )


def read_mentions(batch: pa.Table, config: LinkConfig) -> pa.Table:
    """Read a shard, ordered by surface form, so that equal prompts' beginnings follow each other.

    Adds `shard`, `row` (in the input file) and `error` (null so far, or why the row can't be linked).
    """
    (fields,) = batch.to_pylist()
    shard = Shard(**fields)
    with_images = config.vision.image_encoder is not None
    table = shards.read_rows(shard, (*_COLUMNS, *_IMAGE_COLUMNS) if with_images else _COLUMNS)
    num_rows = table.num_rows
    table = table.append_column("shard", pa.array(np.full(num_rows, shard.index, np.int32)))
    table = table.append_column("row", pa.array(np.arange(shard.start, shard.stop)))
    errors = [_fault(row) for row in table.select([c for c in _COLUMNS if c in table.column_names]).to_pylist()]
    table = table.append_column("error", pa.array(errors, pa.string()))
    return table.sort_by([("mention", "ascending"), ("row", "ascending")])


class EncodeImages:
    """Adds `image_features` (C,), null without a picture; drops the picture."""

    def __init__(self, config: LinkConfig) -> None:
        from gemel_engine.linker import load_picture_encoder

        self._policy = config.image_source
        self._encoder = load_picture_encoder(config.vision)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a batch's pictures."""
        started = time.monotonic()
        errors = batch["error"].to_pylist()
        pictures = self._pictures(batch, errors)
        features: list[Any] = self._encoder.encode(pictures)
        for row, item in enumerate(features):
            if isinstance(item, Exception):
                errors[row], features[row] = str(item), None
        batch = batch.drop_columns([column for column in _IMAGE_COLUMNS if column in batch.column_names])
        batch = batch.append_column("image_features", pa.array(features, pa.list_(pa.float32())))
        return _with_cost(_with_errors(batch, errors), "image_seconds", time.monotonic() - started)

    def _pictures(self, batch: pa.Table, errors: list[str | None]) -> list[bytes | None]:
        """The content of each row's image file; a row that has both a file and an address keeps the file."""
        pictures = _column(batch, "image_bytes")
        addresses = {
            row: uri
            for row, uri in enumerate(_column(batch, "image_uri"))
            if uri and pictures[row] is None and errors[row] is None
        }
        with ThreadPoolExecutor(_FETCH_THREADS) as threads:
            for row, content in zip(addresses, threads.map(self._fetch, addresses.values()), strict=True):
                if isinstance(content, ImageFetchError):
                    errors[row] = str(content)
                else:
                    pictures[row] = content
        return [None if error else picture for picture, error in zip(pictures, errors, strict=True)]

    def _fetch(self, uri: str) -> bytes | ImageFetchError:
        try:
            return fetch_image(uri, self._policy)
        except ImageFetchError as error:
            return error


class RetrieveDemonstrations:
    """Adds `demonstrations`: rows of the index, the most similar last."""

    def __init__(self, config: LinkConfig) -> None:
        from gemel_engine.generation import open_artifacts
        from gemel_engine.linker import DemonstrationRetriever

        index = open_artifacts(config).index
        assert index is not None, "the stage runs only with demonstrations"
        self._retriever = DemonstrationRetriever(config.retrieval, index)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Retrieve a batch's demonstrations."""
        started = time.monotonic()
        mentions = _mentions(batch)
        found = iter(self._retriever.retrieve([mention for mention in mentions if mention is not None]))
        retrieved = [[] if mention is None else next(found) for mention in mentions]
        batch = batch.append_column("demonstrations", pa.array(retrieved, pa.list_(pa.int32())))
        return _with_cost(batch, "retrieval_seconds", time.monotonic() - started)


class GenerateEntityNames:
    """Turns mentions into predictions."""

    def __init__(self, config: LinkConfig) -> None:
        from gemel_engine.generation import EntityNameGenerator

        self._generator = EntityNameGenerator(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Link a batch; keeps `shard`, `row` and the costs."""
        started = time.monotonic()
        prompt_tokens, cached_tokens = self._cache_counts()
        mentions = _mentions(batch)
        rows = [row for row, mention in enumerate(mentions) if mention is not None]
        features = [None if item is None else np.array(item, np.float32) for item in _column(batch, "image_features")]
        demonstrations = [item or [] for item in _column(batch, "demonstrations")]
        linked = self._generator.generate(
            [mention for mention in mentions if mention is not None],
            [features[row] for row in rows],
            [demonstrations[row] for row in rows],
        )
        ids, errors = batch["mention_id"].to_pylist(), batch["error"].to_pylist()
        predictions = [Prediction(mention_id, error=error) for mention_id, error in zip(ids, errors, strict=True)]
        for row, prediction in zip(rows, linked, strict=True):
            predictions[row] = prediction
        table = predictions_to_table(predictions)
        for column in ("shard", "row", *_COSTS):
            if column in batch.column_names:
                table = table.append_column(column, batch[column])
        table = _with_cost(table, "generation_seconds", time.monotonic() - started)
        now = self._cache_counts()
        table = _with_cost(table, "prompt_tokens", now[0] - prompt_tokens)
        return _with_cost(table, "cached_tokens", now[1] - cached_tokens)

    def _cache_counts(self) -> tuple[int, int]:
        statistics = getattr(self._generator.engine, "cache_statistics", None)
        return (0, 0) if statistics is None else (statistics.num_prompt_tokens, statistics.num_cached_tokens)


def write_parts(batch: pa.Table, output: str, plan: dict[int, Shard]) -> pa.Table:
    """Store a batch's predictions, shard by shard; returns a receipt for each: shard, number of rows, part, costs."""
    receipts = []
    for index in pc.unique(batch["shard"]).to_pylist():
        part = batch.filter(pc.equal(batch["shard"], index))
        costs = {name: pc.sum(part[name]).as_py() for name in _COSTS if name in part.column_names}
        uri = shards.write_part(output, plan[index], part.drop_columns(list(costs)))
        receipts.append({"shard": index, "num_rows": part.num_rows, "part": uri, **costs})
    return pa.Table.from_pylist(receipts)


def connect() -> None:
    """Join the cluster that the job was submitted to, or start Ray on this machine."""
    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=True)
    else:
        ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False)
    DataContext.get_current().enable_rich_progress_bars = False


def _commit_as_completed(output: str, remaining: Sequence[Shard], receipts: Iterable[pa.Table]) -> Counter[str]:
    """Commit each shard as soon as receipts cover its rows; returns the summed costs."""
    commit = ray.remote(num_cpus=0)(shards.commit_shard)
    plan = {shard.index: shard for shard in remaining}
    num_missing = {shard.index: shard.stop - shard.start for shard in remaining}
    parts: dict[int, list[str]] = defaultdict(list)
    costs: Counter[str] = Counter()
    commits = []
    for receipt in _rows(receipts):
        index = receipt["shard"]
        parts[index].append(receipt["part"])
        num_missing[index] -= receipt["num_rows"]
        costs.update({name: receipt[name] for name in _COSTS if name in receipt})
        if num_missing[index] == 0:
            commits.append(commit.remote(output, plan[index], parts.pop(index)))
    ray.get(commits)
    return costs


def _rows(batches: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _report(
    config: LinkConfig,
    artifacts: Artifacts,
    plan: Sequence[Shard],
    remaining: Sequence[Shard],
    costs: Counter[str],
    seconds: float,
) -> LinkReport:
    table = shards.summarise(config.output, ("error", "certified", "num_rollouts"))
    linked = table.filter(pc.is_null(table["error"]))
    rows_now = sum(shard.stop - shard.start for shard in remaining)
    mapper = artifacts.feature_mapper
    return LinkReport(
        rows=table.num_rows,
        errors=dict(Counter(error.partition(":")[0] for error in table["error"].drop_null().to_pylist())),
        certified_share=pc.mean(linked["certified"]).as_py(),
        rollouts_per_mention=pc.mean(linked["num_rollouts"]).as_py(),
        shards=len(plan),
        shards_skipped=len(plan) - len(remaining),
        rows_linked_now=rows_now,
        seconds=seconds,
        mentions_per_second=rows_now / seconds,
        stage_seconds={name.removesuffix("_seconds"): costs[name] for name in _COSTS if name.endswith("_seconds")},
        prefix_cache_hit_rate=costs["cached_tokens"] / costs["prompt_tokens"] if costs["prompt_tokens"] else None,
        feature_mapper="none" if mapper is None else "trained" if mapper.metadata.trained else "untrained",
    )


def _check_failures(config: LinkConfig, report: LinkReport) -> None:
    num_failed = sum(report.errors.values())
    if num_failed > config.max_failed_fraction * report.rows:
        raise TooManyFailuresError(
            f"{num_failed} of {report.rows} rows failed ({report.errors}), more than max_failed_fraction "
            f"{config.max_failed_fraction} allows; the output {config.output} is complete: see its column `error`"
        )


def _identity(config: LinkConfig, plan: Sequence[Shard]) -> dict[str, Any]:
    """What makes up a run: settings, input files and artifacts."""
    settings = {key: value for key, value in json.loads(config_json(config)).items() if key not in _NOT_IDENTITY}
    manifests = {
        "knowledge_base": f"{config.knowledge_base}/knowledge_base.json",
        "demonstrations": config.demonstrations and f"{config.demonstrations}/index.json",
        "feature_mapper": config.vision.feature_mapper and f"{config.vision.feature_mapper}/mapper.json",
    }
    artifacts = {name: json.loads(storage.read_bytes(uri)) for name, uri in manifests.items() if uri}
    return {"settings": settings, "plan": shards.plan_identity(plan), "artifacts": artifacts}


def _fault(row: dict[str, Any]) -> str | None:
    """Why a row can't be linked, or None."""
    mention, text, start = row["mention"], row["text"], row.get("mention_start")
    if not mention or not mention.strip():
        return "invalid_mention: the mention is empty: give the surface form"
    if not text:
        return "invalid_mention: the text is empty: give the sentence around the mention"
    if start is not None and text[start : start + len(mention)] != mention:
        return f"invalid_mention: the text has not {mention[:50]!r} at mention_start {start}: correct the offset"
    return None


def _mentions(batch: pa.Table) -> list[Mention | None]:
    """The mention of each row, None where it has an error."""
    rows = batch.select([column for column in _COLUMNS if column in batch.column_names]).to_pylist()
    for row in rows:
        if row.get("candidate_ids") is not None:
            row["candidate_ids"] = tuple(row["candidate_ids"])
    errors = batch["error"].to_pylist()
    return [Mention(**row) if error is None else None for row, error in zip(rows, errors, strict=True)]


def _column(batch: pa.Table, name: str) -> list[Any]:
    """A column's values; None for each row where the batch does not have it."""
    return batch[name].to_pylist() if name in batch.column_names else [None] * batch.num_rows


def _with_errors(batch: pa.Table, errors: list[str | None]) -> pa.Table:
    return batch.set_column(batch.column_names.index("error"), "error", pa.array(errors, pa.string()))


def _with_cost(batch: pa.Table, name: str, cost: float) -> pa.Table:
    num_rows = max(1, batch.num_rows)
    return batch.append_column(name, pa.array(np.full(batch.num_rows, cost / num_rows)))


def _pool(settings: PoolSettings) -> dict[str, Any]:
    """Arguments of `map_batches` for a stage of actors; a batch is a block.

    Threads are set in the actor's environment, since Ray builds an actor in one thread and calls it in another.
    """
    threads = {} if settings.num_threads is None else {"OMP_NUM_THREADS": str(settings.num_threads)}
    return {
        "batch_size": None,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(min_size=settings.min_actors, max_size=settings.max_actors),
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        **({"runtime_env": {"env_vars": threads}} if threads else {}),
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"

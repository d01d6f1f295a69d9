"""Predicts a linking run: links windows of its corpus by its own pipeline, in a directory beside its output.

A run works on the corpus in the order of surface forms, where prompts begin alike. A sample of single rows would miss
what these share and cost too much; so what is drawn is windows of that order. `capacity.py` says which, and what
follows from what they cost.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.config.components import PoolSettings, ResourceSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.capacity import ClusterPlan, Estimate, StageCost, Workload, draw_windows
from gemel_engine.linking.job import checked_plan, ordered_plan, stream_receipts
from gemel_engine.linking.progress import Tally
from gemel_engine.pipeline.corpus import Shard, order_by_surface_form, order_within_shards, plan_shards, take_rows
from gemel_engine.pipeline.output import read_columns
from gemel_engine.pipeline.ray_data import connect
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import PREDICTION_SCHEMA

_POOLS = {"image": "images", "retrieval": "retrieval", "generation": "generation"}  # a stage's name in the settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What windows of a corpus cost, one actor of each stage at work.

    Attributes:
        rows: Of each window, in the order in which they were linked. The first warmed up: an engine's first batch
            takes longer.
        stage_seconds: Of each stage, the seconds that its actor spent on each window.
        first_seconds: Until the first window was done: Ray, the sort, the start of the actors, and the window.
        tally: The receipts of all windows.
        output_bytes: Of all windows in one file; one each would be mostly frame.
    """

    rows: list[int]
    stage_seconds: dict[str, list[float]]
    first_seconds: float
    tally: Tally
    output_bytes: int

    def costs(self) -> dict[str, StageCost]:
        """Of each stage, by the windows that did not warm up."""
        return {name: StageCost.fit(self.rows[1:], seconds[1:]) for name, seconds in self.stage_seconds.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A predicted run.

    Attributes:
        num_rows: Of the corpus.
        sample_rows: Of the windows.
        num_windows: That were linked.
        rows_per_shard: Of the configuration; predictions are for it.
        start_seconds: Before the first row: checks, Ray, the sort of a small corpus, models.
        stage_costs: Of each stage.
        seconds_per_row: Of an actor of each stage, in shards of that size.
        peak_bytes: The most memory that a process of each stage held, files that processes share included.
        input_bytes: Of the corpus.
        output_bytes: Of the run's output.
        cache_hit_rate: Share of prompt tokens that were in the prefix cache.
        computed_tokens_per_row: Those that were not.
        rollouts_per_row: Mean.
        errors: Rows of the sample that ended in an error, by kind.
        clusters: What each cluster makes of it.
    """

    num_rows: int
    sample_rows: int
    num_windows: int
    rows_per_shard: int
    start_seconds: float
    stage_costs: dict[str, StageCost]
    seconds_per_row: dict[str, Estimate]
    peak_bytes: dict[str, int]
    input_bytes: int
    output_bytes: int
    cache_hit_rate: float | None
    computed_tokens_per_row: float
    rollouts_per_row: float
    errors: dict[str, int]
    clusters: tuple[ClusterPlan, ...]

    def to_json(self) -> bytes:
        """All of it."""
        return json.dumps(asdict(self), indent=2, allow_nan=False).encode()


def plan_run(
    config: LinkConfig,
    *,
    sample_rows: int = 1000,
    actors: Sequence[int] = (),
    price_per_actor_hour: float | None = None,
    seed: int = 0,
) -> RunPlan:
    """Link a sample of a corpus and predict the run over all of it.

    Args:
        config: The run. Its output is not touched.
        sample_rows: To be linked, at most.
        actors: Of generation, for each cluster to be predicted; none: `resources.generation.max_actors`. The other
            pools are those of the configuration, at their largest.
        price_per_actor_hour: Of a generation actor and what stands beside it.
        seed: Of the sample.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable, or not fit for such a sample.
    """
    pools = {name: getattr(config.resources, pool).max_actors for name, pool in _POOLS.items()}
    _check_clusters(actors, price_per_actor_hour)
    started = time.monotonic()
    plan, _, contents = checked_plan(config)
    num_rows = sum(shard.stop - shard.start for shard in plan)
    windows = draw_windows(num_rows, sample_rows, seed)
    places = order_by_surface_form(plan)
    order = order_within_shards(plan) if places is None else np.argsort(places)
    check_seconds = time.monotonic() - started
    sample = link_windows(config, plan, [order[start:stop] for start, stop in windows], contents)
    costs = sample.costs()
    of_first_window = sum(cost.seconds(1, sample.rows[0]).value for cost in costs.values())
    workload = Workload(
        num_rows=num_rows,
        num_shards=len(plan) if places is None else -(-num_rows // config.rows_per_shard),
        rows_per_shard=config.rows_per_shard,
        start_seconds=check_seconds + max(0.0, sample.first_seconds - of_first_window),
        stages=costs,
    )
    rows_of_shard = min(num_rows, config.rows_per_shard)
    return RunPlan(
        num_rows=num_rows,
        sample_rows=sample.tally.rows,
        num_windows=len(windows),
        rows_per_shard=config.rows_per_shard,
        start_seconds=workload.start_seconds,
        stage_costs=costs,
        seconds_per_row={name: cost.seconds(1, rows_of_shard).times(1 / rows_of_shard) for name, cost in costs.items()},
        peak_bytes=sample.tally.peak_bytes,
        input_bytes=sum(file.size for file in storage.list_parquet(config.input)),
        output_bytes=round(sample.output_bytes / sample.tally.rows * num_rows),
        cache_hit_rate=sample.tally.cache_hit_rate,
        computed_tokens_per_row=sample.tally.computed_tokens / sample.tally.rows,
        rollouts_per_row=sample.tally.rollouts / sample.tally.rows,
        errors=dict(sample.tally.errors),
        clusters=tuple(
            workload.on({name: pools[name] for name in costs} | {"generation": number}, price_per_actor_hour)
            for number in actors or (pools["generation"],)
        ),
    )


def _check_clusters(actors: Sequence[int], price_per_actor_hour: float | None) -> None:
    if min(actors, default=1) < 1 or (price_per_actor_hour or 0.0) < 0:
        raise ConfigurationError(
            f"actors is {list(actors)} and price_per_actor_hour {price_per_actor_hour}: a cluster needs at least one "
            "actor, and a price is not negative"
        )


def link_windows(
    config: LinkConfig, plan: Sequence[Shard], windows: Sequence[NDArray[np.int64]], contents: Contents | None = None
) -> Sample:
    """Link windows of a corpus, each as one shard, with one actor for each stage.

    Args:
        config: The run.
        plan: Its corpus.
        windows: Rows, numbered in the order of the plan.
        contents: What each model and artifact is.
    """
    scratch = f"{config.output.rstrip('/')}-plan-{uuid.uuid4().hex[:8]}"
    try:
        _write_windows(plan, windows, f"{scratch}/windows")
        longest = max(map(len, windows))
        sampled = replace(
            config,
            input=f"{scratch}/windows",
            output=f"{scratch}/linked",
            rows_per_shard=longest,
            resources=_one_of_each(config.resources),
        )
        started = time.monotonic()
        connect()
        drawn = plan_shards(sampled.input, longest)
        if len(plan) > 1:
            ordered_plan(sampled, drawn)  # for the time that it takes: windows stay as they are
        tallies: dict[int, Tally] = {}
        whole, first_seconds = Tally(), 0.0
        with closing(stream_receipts(sampled, drawn, contents)) as receipts:  # its actors end before the directory goes
            for receipt in receipts:
                tallies.setdefault(receipt["shard"], Tally()).add(receipt)
                whole.add(receipt)
                first_seconds = first_seconds or time.monotonic() - started
        return Sample(
            rows=[tally.rows for tally in tallies.values()],
            stage_seconds={
                name: [tally.stage_seconds[name] for tally in tallies.values()] for name in whole.stage_seconds
            },
            first_seconds=first_seconds,
            tally=whole,
            output_bytes=_bytes_in_one_file(f"{sampled.output}/_parts"),
        )
    finally:
        storage.remove_tree(scratch)


def _write_windows(plan: Sequence[Shard], windows: Sequence[NDArray[np.int64]], directory: str) -> None:
    """A file for each window, its rows in their order."""
    wanted = np.sort(np.concatenate(windows))
    rows = take_rows(plan, wanted)
    for number, window in enumerate(windows):
        table = rows.take(np.searchsorted(wanted, window))
        storage.write_bytes(f"{directory}/{number:05d}.parquet", parquet_bytes(table))


def _bytes_in_one_file(parts: str) -> int:
    return len(parquet_bytes(read_columns(parts, PREDICTION_SCHEMA.names)))


def _one_of_each(resources: ResourceSettings) -> ResourceSettings:
    def single(pool: PoolSettings) -> PoolSettings:
        return replace(pool, min_actors=1, max_actors=1)

    return ResourceSettings(
        images=single(resources.images),
        retrieval=single(resources.retrieval),
        generation=single(resources.generation),
    )


def format_size(num_bytes: float) -> str:
    """In the largest unit of which there is one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"

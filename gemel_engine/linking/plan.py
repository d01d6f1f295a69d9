"""Predicts a linking run from windows of its corpus, linked by its own pipeline.

A run links the corpus in the order of surface forms, so that prompts of neighbouring rows begin
alike. Single rows would not share these prompts and would cost too much, so the sample consists of
windows of that order. `capacity.py` draws the windows and computes the prediction. The sample is
linked in a temporary directory in the output, which need not be claimed and stays as it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.config.resources import PoolSettings, ResourceSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.contents import without_missing_evidence
from gemel_engine.errors import ConfigurationError
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.capacity import ClusterPlan, Estimate, StageCost, Workload, draw_windows
from gemel_engine.linking.job import checked_plan, settled
from gemel_engine.linking.on_ray import receipts_on_ray
from gemel_engine.linking.progress import Tally
from gemel_engine.pipeline.corpus import (
    Shard,
    count_rows,
    order_by_surface_form,
    order_within_shards,
    plan_shards,
    take_rows,
)
from gemel_engine.pipeline.output import RunDirectory, read_columns
from gemel_engine.pipeline.ray_data import connect
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import PREDICTION_SCHEMA

# The setting in `resources` of each stage's pool.
_POOLS = {"image": "images", "retrieval": "retrieval", "generation": "generation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The measured cost of windows of a corpus, linked by one actor of each stage.

    Attributes:
        rows: Number of rows of each window, in the order in which they were linked. The first
            window is the warm-up: an engine's first batch takes longer.
        stage_seconds: Seconds that the actor of each stage spent on each window.
        first_seconds: Seconds until the first window was done: start of Ray and of the actors, and the
            window itself.
        tally: Sum of the receipts of all windows.
        output_bytes: Size of the output of all windows as one Parquet file; separate files would be
            mostly metadata.
    """

    rows: list[int]
    stage_seconds: dict[str, list[float]]
    first_seconds: float
    tally: Tally
    output_bytes: int

    def costs(self) -> dict[str, StageCost]:
        """Fit the cost of each stage to all windows but the warm-up."""
        return {name: StageCost.fit(self.rows[1:], seconds[1:]) for name, seconds in self.stage_seconds.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A predicted run.

    Attributes:
        num_rows: Number of rows of the corpus.
        sample_rows: Number of rows of all windows.
        num_windows: Number of windows that were linked.
        rows_per_shard: Setting of the configuration, on which the predictions depend.
        start_seconds: Seconds before the first row: checks, Ray, models.
        stage_costs: Fitted cost of each stage.
        seconds_per_row: Predicted seconds per row for one actor of each stage, in shards of
            `rows_per_shard`.
        peak_bytes: Largest memory of a process of each stage, shared files included.
        input_bytes: Size of the corpus.
        output_bytes: Predicted size of the output.
        cache_hit_rate: Share of prompt tokens that were in the prefix cache; None without tokens.
        computed_tokens_per_row: Mean number of prompt tokens that were not in the prefix cache.
        rollouts_per_row: Mean number of rollouts.
        errors: Number of sample rows with an error, by kind.
        clusters: Prediction for each cluster.
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
        """Return all fields as JSON."""
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
        config: The run. Its output is left as it was.
        sample_rows: Maximum number of rows to link.
        actors: Number of generation actors of each cluster to predict; empty:
            `resources.generation.max_actors`. The other pools have their `max_actors`.
        price_per_actor_hour: Price per generation-actor hour, including its helper actors.
        seed: Seed of the sample.

    Raises:
        GemelError: The configuration, the input, an artifact or the sample's size is unusable.
    """
    _check_request(config, actors, price_per_actor_hour)
    started = time.monotonic()
    plan, found = checked_plan(config := settled(config))
    config = without_missing_evidence(config, has_evidence=found.has_evidence)
    num_rows = count_rows(plan)
    rows_per_shard = config.rows_per_shard or num_rows
    windows = draw_windows(num_rows, sample_rows, seed)
    places = order_by_surface_form(plan)
    order = order_within_shards(plan) if places is None else np.argsort(places)
    check_seconds = time.monotonic() - started
    sample = link_windows(config, plan, [order[start:stop] for start, stop in windows], found.contents)
    costs = sample.costs()
    of_first_window = sum(cost.seconds(1, sample.rows[0]).value for cost in costs.values())
    workload = Workload(
        num_rows=num_rows,
        num_shards=len(plan) if places is None else -(-num_rows // rows_per_shard),
        rows_per_shard=rows_per_shard,
        start_seconds=check_seconds + max(0.0, sample.first_seconds - of_first_window),
        stages=costs,
    )
    return RunPlan(
        num_rows=num_rows,
        sample_rows=sample.tally.rows,
        num_windows=len(windows),
        rows_per_shard=rows_per_shard,
        start_seconds=workload.start_seconds,
        stage_costs=costs,
        seconds_per_row=_seconds_per_row(costs, min(num_rows, rows_per_shard)),
        peak_bytes=sample.tally.peak_bytes,
        input_bytes=sum(file.size for file in storage.list_tables(config.input)),
        output_bytes=round(sample.output_bytes / sample.tally.rows * num_rows),
        cache_hit_rate=sample.tally.cache_hit_rate,
        computed_tokens_per_row=sample.tally.computed_tokens / sample.tally.rows,
        rollouts_per_row=sample.tally.rollouts / sample.tally.rows,
        errors=dict(sample.tally.errors),
        clusters=_predict_clusters(workload, config, actors, price_per_actor_hour),
    )


def _seconds_per_row(costs: Mapping[str, StageCost], num_rows: int) -> dict[str, Estimate]:
    """Return the time of each stage for a row of a shard of `num_rows` rows."""
    return {name: cost.seconds(1, num_rows).times(1 / num_rows) for name, cost in costs.items()}


def _predict_clusters(
    workload: Workload, config: LinkConfig, actors: Sequence[int], price_per_actor_hour: float | None
) -> tuple[ClusterPlan, ...]:
    """Return the prediction for each number of generation actors; see `plan_run`."""
    pools = {name: getattr(config.resources, pool).max_actors for name, pool in _POOLS.items()}
    others = {name: pools[name] for name in workload.stages}
    numbers = actors or (pools["generation"],)
    return tuple(workload.on(others | {"generation": number}, price_per_actor_hour) for number in numbers)


def _check_request(config: LinkConfig, actors: Sequence[int], price_per_actor_hour: float | None) -> None:
    if config.previous is not None:
        raise ConfigurationError(
            f"previous is {config.previous!r}, but a run is predicted that links all rows: leave it out"
        )
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
        windows: Row numbers of each window, counted in the order of the plan.
        contents: Fingerprint or manifest of each model and artifact.
    """
    output, scratch = storage.local_path(config.output), RunDirectory(config.output).new_sample()
    is_new = output is not None and not output.exists()
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
        tallies: dict[int, Tally] = {}
        whole, first_seconds = Tally(), 0.0
        with closing(
            receipts_on_ray(sampled, drawn, contents)
        ) as receipts:  # stops the actors before the directory is removed
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
            output_bytes=_bytes_in_one_file(RunDirectory(sampled.output).parts, config.output_columns),
        )
    finally:
        storage.remove_tree(scratch)
        if output is not None and is_new:
            with suppress(OSError):  # a run has begun there meanwhile
                output.rmdir()


def _write_windows(plan: Sequence[Shard], windows: Sequence[NDArray[np.int64]], directory: str) -> None:
    """Write a file for each window, its rows in their order."""
    wanted = np.sort(np.concatenate(windows))
    rows = take_rows(plan, wanted)
    for number, window in enumerate(windows):
        table = rows.take(np.searchsorted(wanted, window))
        storage.write_bytes(f"{directory}/{number:05d}.parquet", parquet_bytes(table))


def _bytes_in_one_file(parts: str, carried: Sequence[str]) -> int:
    return len(parquet_bytes(read_columns(parts, [*PREDICTION_SCHEMA.names, *carried])))


def _one_of_each(resources: ResourceSettings) -> ResourceSettings:
    def single(pool: PoolSettings) -> PoolSettings:
        return replace(pool, min_actors=1, max_actors=1)

    return ResourceSettings(
        images=single(resources.images),
        retrieval=single(resources.retrieval),
        generation=single(resources.generation),
    )


def format_size(num_bytes: float) -> str:
    """Return a size in the largest unit of which it is at least one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"

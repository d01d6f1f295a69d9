"""Sorts and links on Ray: shards stream through actors, which are started again when they end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset

from gemel_engine.config.loading import with_absolute_paths
from gemel_engine.config.settings import LinkConfig
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.metrics import RayMetrics
from gemel_engine.linking.stages import linking_stages, read_with_places, write_ordered
from gemel_engine.pipeline.corpus import Shard, count_rows
from gemel_engine.pipeline.output import commit_shard
from gemel_engine.pipeline.ray_data import connect, own_errors, rows_of, stream


def sort_on_ray(
    ranges: Sequence[pa.Table], num_rows: int, directory: str, rows_per_shard: int, rows_per_block: int
) -> int:
    """Sort ranges of rows by their place and write them; return the number of written rows."""
    connect()
    boundaries: list[int | float] = [*range(rows_per_block, num_rows, rows_per_block)]
    dataset: Dataset = ray.data.from_arrow(list(ranges))
    dataset = dataset.map_batches(read_with_places, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    dataset = dataset.sort("place", boundaries=boundaries or [num_rows])  # none: Ray samples
    dataset = dataset.map_batches(
        partial(write_ordered, directory=directory, rows_per_shard=rows_per_shard),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
    )
    dataset.set_name("sorting")
    return sum(row["num_rows"] for row in rows_of(dataset.iter_batches(batch_size=None, batch_format="pyarrow")))


def receipts_on_ray(
    config: LinkConfig, remaining: Sequence[Shard], contents: Contents | None
) -> Generator[dict[str, Any], None, None]:
    """Run the stages; yield a row of `RECEIPT_SCHEMA` whenever a part has been written."""
    dataset = stream(remaining, linking_stages(with_absolute_paths(config), contents))
    dataset.set_name("linking")
    yield from rows_of(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))


def link_on_ray(
    config: LinkConfig, remaining: Sequence[Shard], contents: Contents, run: str
) -> Iterator[dict[str, Any]]:
    """Link shards and commit each as soon as its parts are complete; yield the receipts."""
    connect()
    commit: Any = ray.remote(num_cpus=0)(commit_shard)
    metrics = RayMetrics(config.output, count_rows(remaining))
    output = with_absolute_paths(config).output
    plan = {shard.index: shard for shard in remaining}
    num_missing = {shard.index: shard.stop - shard.start for shard in remaining}
    parts: dict[int, list[str]] = defaultdict(list)
    commits: list[Any] = []
    for receipt in receipts_on_ray(config, remaining, contents):
        index = receipt["shard"]
        parts[index].append(receipt["part"])
        num_missing[index] -= receipt["num_rows"]
        metrics.add(receipt)
        yield receipt
        if num_missing[index] == 0:
            commits.append(commit.remote(output, plan[index], parts.pop(index), run))
            done, commits = ray.wait(commits, num_returns=len(commits), timeout=0)
            with own_errors():
                ray.get(done)  # raises the errors of these commits
    with own_errors():
        ray.get(commits)

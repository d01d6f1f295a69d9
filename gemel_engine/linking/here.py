"""Links in this process, where a run is so small that actors would take longer to start than it takes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gemel_engine import storage
from gemel_engine.config.resources import PoolSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.stages import linking_stages
from gemel_engine.pipeline import isolation
from gemel_engine.pipeline.chain import run_here
from gemel_engine.pipeline.corpus import Shard, count_rows
from gemel_engine.pipeline.output import RunDirectory, commit_shard
from gemel_engine.verbosity import is_verbose

_MOST_ROWS = 512
_ASK_FOR_RAY = ("RAY_ADDRESS", "RAY_LOGGING_CONFIG_ENCODING")  # a cluster, logs as Ray formats them


def is_run_here(config: LinkConfig, remaining: Sequence[Shard]) -> bool:
    """Return whether a run is linked in this process.

    It is if it has few rows and needs no more than one process for each stage, and no GPU; if
    nothing asks for Ray; and if no process has ended in it, as its marks would tell: Ray starts
    actors again until it is clear which row ends them.
    """
    pools = _pools(config)
    return (
        count_rows(remaining) <= _MOST_ROWS
        and all(pool.max_actors == 1 and not pool.num_gpus for pool in pools)
        and config.language_model.tensor_parallel_size == 1
        and not _asks_for_ray()
        and not storage.list_files(RunDirectory(config.output).marks)
    )


def _asks_for_ray() -> bool:
    """Return whether the environment asks for Ray, or this process has started it."""
    ray = sys.modules.get("ray")
    return any(map(os.environ.get, _ASK_FOR_RAY)) or (ray is not None and ray.is_initialized())


def link_here(config: LinkConfig, remaining: Sequence[Shard], contents: Contents, run: str) -> Iterator[dict[str, Any]]:
    """Link shards and commit each; yield the receipts, rows of `RECEIPT_SCHEMA`."""
    if not is_verbose():
        logging.getLogger(isolation.__name__).setLevel(logging.WARNING)  # as that of actors, which is not shown
    if num_threads := max(pool.num_threads or 0 for pool in _pools(config)):
        import torch

        torch.set_num_threads(num_threads)
    tables = run_here(remaining, linking_stages(config, contents))
    for shard, table in zip(remaining, tables, strict=True):
        receipts = table.to_pylist()
        commit_shard(config.output, shard, [receipt["part"] for receipt in receipts], run)
        yield from receipts


def _pools(config: LinkConfig) -> tuple[PoolSettings, PoolSettings, PoolSettings]:
    resources = config.resources
    return resources.images, resources.retrieval, resources.generation

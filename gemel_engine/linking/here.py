"""Links in this process, where a run is so small that actors would take longer to start than it takes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from gemel_engine import storage
from gemel_engine.config.settings import LinkConfig
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.stages import linking_stages
from gemel_engine.pipeline import isolation
from gemel_engine.pipeline.chain import run_here
from gemel_engine.pipeline.corpus import Shard, count_rows
from gemel_engine.pipeline.output import RunDirectory, commit_shard
from gemel_engine.verbosity import is_verbose

_MOST_ROWS = 512


def is_run_here(config: LinkConfig, remaining: Sequence[Shard]) -> bool:
    """Return whether a run is linked in this process.

    It is if it has few rows and needs no more than one actor of each stage, and no GPU; if it was
    not submitted to a cluster; and if no process has ended in it, as its marks would tell: Ray
    starts actors again until it is clear which row ends them.
    """
    resources = config.resources
    ray = sys.modules.get("ray")
    return (
        count_rows(remaining) <= _MOST_ROWS
        and not os.environ.get("RAY_ADDRESS")
        and not (ray is not None and ray.is_initialized())
        and all(
            pool.max_actors == 1 and not pool.num_gpus
            for pool in (resources.images, resources.retrieval, resources.generation)
        )
        and not storage.list_files(RunDirectory(config.output).marks)
    )


def link_here(config: LinkConfig, remaining: Sequence[Shard], contents: Contents, run: str) -> Iterator[dict[str, Any]]:
    """Link shards and commit each; yield the receipts, rows of `RECEIPT_SCHEMA`."""
    if not is_verbose():
        logging.getLogger(isolation.__name__).setLevel(logging.WARNING)  # as that of actors, which is not shown
    if num_threads := _num_threads(config):
        import torch

        torch.set_num_threads(num_threads)
    tables = run_here(remaining, linking_stages(config, remaining, contents))
    for shard, table in zip(remaining, tables, strict=True):
        receipts = table.to_pylist()
        commit_shard(config.output, shard, [receipt["part"] for receipt in receipts], run)
        yield from receipts


def _num_threads(config: LinkConfig) -> int:
    """Return the largest number of threads that the settings give to an actor; 0 if they give none."""
    resources = config.resources
    return max(pool.num_threads or 0 for pool in (resources.images, resources.retrieval, resources.generation))

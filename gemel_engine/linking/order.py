"""Sorts the corpus of a run by surface form, in this process or on Ray."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.config.loading import with_absolute_paths
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linking.stages import read_with_places, write_ordered
from gemel_engine.pipeline.corpus import Shard, count_rows, order_by_surface_form, plan_shards, recut
from gemel_engine.pipeline.output import RunDirectory, load_plan, save_plan

_MOST_ROWS_HERE = 1 << 16  # some tens of MB; more are sorted on Ray
_MOST_BLOCKS = 256
_ROWS_PER_RANGE = 1 << 18  # rows that are read at once for the sort; row groups are read whole


def ordered_plan(config: LinkConfig, plan: list[Shard]) -> list[Shard]:
    """Sort the corpus by surface form and cut it into shards again.

    Prompts that begin alike are then in the same shard. The sorted rows are written to the output;
    a rerun reuses them. A corpus with pictures or image features, or of one shard, is not sorted.
    """
    if (ordered := load_plan(config.output, count_rows(plan))) is not None:
        return ordered
    if len(plan) == 1 or (places := order_by_surface_form(plan)) is None:
        return plan
    rows_per_shard = config.rows_per_shard
    assert rows_per_shard is not None, "the plan was cut by it"
    # A sort on Ray exchanges data between all pairs of blocks: use few blocks, of several shards each.
    rows_per_block = rows_per_shard * -(-len(places) // (rows_per_shard * _MOST_BLOCKS))
    name = uuid.uuid4().hex
    directory = f"{RunDirectory(with_absolute_paths(config).output).ordered}/{name}"
    ranges = _placed_ranges(plan, places)
    if len(places) <= _MOST_ROWS_HERE:
        _sort_here(ranges, directory, rows_per_shard, rows_per_block)
    else:
        from gemel_engine.linking.on_ray import sort_on_ray

        num_written = sort_on_ray(ranges, len(places), directory, rows_per_shard, rows_per_block)
        assert num_written == len(places), f"{num_written} of {len(places)} rows were sorted"
    if (ordered := load_plan(config.output, len(places))) is None:  # else another run of this command was first
        ordered = save_plan(config.output, plan_shards(directory, rows_per_shard))
    if name not in ordered[0].uri:
        storage.remove_tree(directory)
    return ordered


def remove_other_sorts(output: str, plan: Sequence[Shard]) -> None:
    """Remove what sorts that were stopped have written to an output.

    Args:
        output: Output directory of a run.
        plan: Its shards, as `ordered_plan` returned them.
    """
    directory = RunDirectory(output).ordered
    names = {file.partition("/")[0] for file in storage.list_files(directory)}
    for name in names - {shard.uri.split("/")[-2] for shard in plan}:
        storage.remove_tree(f"{directory}/{name}")


def _sort_here(ranges: Sequence[pa.Table], directory: str, rows_per_shard: int, rows_per_block: int) -> None:
    table = pa.concat_tables(map(read_with_places, ranges)).sort_by("place")
    for first in range(0, len(table), rows_per_block):
        write_ordered(table.slice(first, rows_per_block), directory, rows_per_shard)


def _placed_ranges(plan: Sequence[Shard], places: NDArray[np.int64]) -> list[pa.Table]:
    """Cut the input files into ranges; return a table of one row for each, with `places`."""
    tables, first = [], 0
    for shard in recut(plan, _ROWS_PER_RANGE):
        num_rows = shard.stop - shard.start
        of_rows = pa.LargeListArray.from_arrays([0, num_rows], places[first : first + num_rows])
        tables.append(pa.Table.from_pylist([asdict(shard)]).append_column("places", of_rows))
        first += num_rows
    return tables

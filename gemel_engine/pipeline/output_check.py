"""Compares the output of a linking run with its plan, by footers and one small column.

A shard is valid if its footer contains the digest of this run and its `mention_id` are those of the
planned rows in their order. Each fault raises an error that names the file and the remedy; nothing
is removed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
from pyarrow.fs import FileType

from gemel_engine import storage
from gemel_engine.errors import InputError, shown
from gemel_engine.pipeline.corpus import Shard, ids_digest
from gemel_engine.pipeline.identity import run_digest
from gemel_engine.pipeline.output import RUN_KEY, RunDirectory, data_files, has_predictions, load_claim
from gemel_engine.storage import parquet
from gemel_engine.storage.local import is_of_system
from gemel_engine.types import PREDICTION_SCHEMA

_REMEDY = "remove it and run the same command again"
_THREADS = 16  # they mostly wait for S3


def check_finished(output: str, plan: Sequence[Shard], run: str) -> set[str]:
    """Validate the finished shards and return their names.

    Args:
        output: Output directory.
        plan: Shards of the run.
        run: `run_digest` of the run.

    Raises:
        InputError: A file in `data/` is damaged, no shard of this run, or contains other rows.
    """
    planned = {f"{shard.name}.parquet": shard for shard in plan}
    files = data_files(output)
    if foreign := files - planned.keys():
        raise InputError(f"{shown(f'{RunDirectory(output).data}/{min(foreign)}')} is no shard of this run: {_REMEDY}")
    finished = [planned[name] for name in sorted(files)]
    _read(output, finished, run, ())
    return {shard.name for shard in finished}


def read_complete(output: str, plan: Sequence[Shard], run: str, columns: Sequence[str]) -> pa.Table:
    """Validate all shards of a finished run and return small columns of all rows.

    Args:
        output: Output directory.
        plan: Shards of the run.
        run: `run_digest` of the run.
        columns: Names of the columns.

    Raises:
        InputError: As for `check_finished`; or a shard is missing, or the output belongs to another
            run by now.
    """
    if run_digest(load_claim(output)) != run:
        raise InputError(
            f"{shown(RunDirectory(output).claim)} became another run's while this one was at work: "
            "choose another output"
        )
    files = data_files(output)
    if missing := [shard.name for shard in plan if f"{shard.name}.parquet" not in files]:
        raise InputError(
            f"{len(missing)} of {len(plan)} shards were removed while the run was at work, such as "
            f"{shown(RunDirectory(output).shard(missing[0]))}: run the same command again"
        )
    if len(files) > len(plan):
        check_finished(output, plan, run)  # raises, with the name of the foreign file
    return _read(output, plan, run, columns)


def _read(output: str, finished: Sequence[Shard], run: str, columns: Sequence[str]) -> pa.Table:
    with ThreadPoolExecutor(_THREADS) as threads:
        tables = list(threads.map(partial(_checked_columns, output=output, run=run, columns=columns), finished))
    return pa.concat_tables(tables) if tables else PREDICTION_SCHEMA.empty_table().select(columns)


def _checked_columns(shard: Shard, output: str, run: str, columns: Sequence[str]) -> pa.Table:
    uri, num_rows = RunDirectory(output).shard(shard.name), shard.stop - shard.start
    file_system, path = storage.resolve(uri)
    if file_system.get_file_info(path).type != FileType.File:  # reading a pipe would block
        raise InputError(f"{shown(uri)} is no file: {_REMEDY}")
    try:
        with parquet.open_table(uri) as table:
            schema, found = table.stored_schema, table.num_rows
            rows = table.read(["mention_id", *columns]) if has_predictions(schema) else None
    except (OSError, InputError) as error:
        if is_of_system(error):
            raise
        raise InputError(f"{shown(uri)} is damaged ({error}): {_REMEDY}") from error
    if rows is None or (schema.metadata or {}).get(RUN_KEY) != run.encode():
        raise InputError(f"{shown(uri)} is of another run, or was written anew by another program: {_REMEDY}")
    if found != num_rows:
        raise InputError(f"{shown(uri)} has {found} of its {num_rows} rows: {_REMEDY}")
    if ids_digest(rows["mention_id"]) != shard.ids:
        raise InputError(f"{shown(uri)} holds other rows than those of {shard.name}: {_REMEDY}")
    return rows.select(list(columns))

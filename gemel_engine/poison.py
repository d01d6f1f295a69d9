"""Finds rows whose processing ends the process (memory exhausted, a native crash), and lets all others through.

Who works on rows leaves a mark first and removes it afterwards, so a mark that is still there when the rows come again
tells of a process that ended over them. Such rows are then worked on in two halves, and so on, until a row stands
alone. A row over which three processes ended while it stood alone is poison and becomes a row with an `error`.

A process that was killed from outside leaves a mark too. That costs a division, but an innocent row would have to be
hit three times in the moments in which it is worked on alone. The mark of another run of the same command, which works
on the same rows at this moment, looks like one that was left; it counts as one of the three.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable

import pyarrow as pa

from gemel_engine import storage

POISON = "poison: {} processes ended while they worked on this row alone: look at its picture and text, or remove it"
_ENDED_ALONE = 3

Work = Callable[[pa.Table], pa.Table]

logger = logging.getLogger(__name__)


def marks_of(batch: pa.Table, output: str, stage: str) -> str:
    """Where the marks of a stage's batch lie in a run's output; `batch` has columns `shard` and `row`."""
    (first,) = batch.select(["shard", "row"]).slice(0, 1).to_pylist()
    return f"{output}/_marks/{stage}/{first['shard']}-{first['row']}-{batch.num_rows}"


def isolate(work: Work, batch: pa.Table, output: str, stage: str) -> pa.Table:
    """Work on a batch, in parts where processes have ended over it; the log tells who did, and at which attempt.

    Args:
        work: What is done to rows; leaves those with an `error` alone. The rows of its result are its input's.
        batch: Has columns `shard`, `row` and `error`; comes again unchanged when a process has ended.
        output: Directory of the run, local or `s3://`, which holds the batch's marks until the work is done.
        stage: Whose batch it is.
    """
    started, marks = time.monotonic(), marks_of(batch, output, stage)
    left = Counter(file.partition(".")[0] for file in storage.list_files(marks))
    results = []
    parts = [(0, batch.num_rows)]
    while parts:
        start, stop = parts.pop()
        name, part = f"{start}-{stop}", batch.slice(start, stop - start)
        if left[name] and stop - start > 1:
            middle = (start + stop) // 2
            parts += [(middle, stop), (start, middle)]
            continue
        if left[name] >= _ENDED_ALONE:
            column = part.column_names.index("error")
            part = part.set_column(column, "error", pa.array([POISON.format(left[name])], pa.string()))
        mark = f"{marks}/{name}.{uuid.uuid4().hex}"
        storage.write_bytes(f"{mark}/mark", b"")
        try:
            results.append(work(part))
        except Exception:  # ends the job, but not the process
            storage.remove_tree(mark)
            raise
        storage.remove_tree(mark)
    if left:
        storage.remove_tree(marks)
    _log_done(batch, stage, attempt=1 + left.total(), seconds=time.monotonic() - started)
    return pa.concat_tables(results)


def _log_done(batch: pa.Table, stage: str, attempt: int, seconds: float) -> None:
    """Say it to people and, field by field, to programs; louder if processes have ended over the batch."""
    shard, row = batch["shard"][0].as_py(), batch["row"][0].as_py()
    logger.log(
        logging.INFO if attempt == 1 else logging.WARNING,
        "%s: %d rows of shard %d, from row %d: attempt %d, %.1f s",
        *(stage, batch.num_rows, shard, row, attempt, seconds),
        extra={
            "stage": stage,
            "shard": shard,
            "first_row": row,
            "num_rows": batch.num_rows,
            "attempt": attempt,
            "seconds": round(seconds, 3),
        },
    )

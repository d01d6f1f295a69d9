"""Finds rows whose processing ends the process (memory exhausted, a native crash), and lets all others through.

Who works on rows leaves a mark first and removes it afterwards, so a mark that is still there when the rows come again
tells of a process that ended over them. Such rows are then worked on in two halves, and so on, until a row stands
alone. A row over which three processes ended while it stood alone is poison and becomes a row with an `error`.

A process that was killed from outside leaves a mark too. That costs a division, but an innocent row would have to be
hit three times in the moments in which it is worked on alone. The mark of another run of the same command, which works
on the same rows at this moment, looks like one that was left; it counts as one of the three.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable

import pyarrow as pa

from gemel_engine import storage

POISON = "poison: {} processes ended while they worked on this row alone: look at its picture and text, or remove it"
_ENDED_ALONE = 3

Work = Callable[[pa.Table], pa.Table]


def marks_of(batch: pa.Table, output: str, stage: str) -> str:
    """Where the marks of a stage's batch lie in a run's output; `batch` has columns `shard` and `row`."""
    (first,) = batch.select(["shard", "row"]).slice(0, 1).to_pylist()
    return f"{output}/_marks/{stage}/{first['shard']}-{first['row']}-{batch.num_rows}"


def isolate(work: Work, batch: pa.Table, marks: str) -> pa.Table:
    """Work on a batch, in parts where processes have ended over it.

    Args:
        work: What is done to rows; leaves those with an `error` alone. The rows of its result are its input's.
        batch: Has a column `error`; comes again unchanged when a process has ended.
        marks: Directory of this batch's marks, local or `s3://`; removed when the work is done.
    """
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
    return pa.concat_tables(results)

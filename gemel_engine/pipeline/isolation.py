"""Finds rows that can't be processed, by an exception or the end of the process, and lets all others through.

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
from gemel_engine.errors import GemelError
from gemel_engine.pipeline.output import RunDirectory

POISON = "poison: {} processes ended while they worked on this row alone: look at its picture and text, or remove it"
FAILED = "failed: {} in stage {}, of this row alone: {}"
_ENDED_ALONE = 3
_FAILED_ALONE = 16  # so many rows one by one, and none before them that got through, are not the rows' fault
_SHOWN_CHARACTERS = 300

Work = Callable[[pa.Table], pa.Table]

logger = logging.getLogger(__name__)


def marks_of(batch: pa.Table, output: str, stage: str) -> str:
    """Where the marks of a stage's batch lie in a run's output; `batch` has columns `shard` and `row`."""
    row, shard = _place(batch)
    return f"{RunDirectory(output).marks}/{stage}/{shard}-{row}-{batch.num_rows}"


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
    results: list[pa.Table] = []
    failures: list[Exception] = []
    num_through = 0
    parts = [(0, batch.num_rows)]
    while parts:
        start, stop = parts.pop()
        name, part = f"{start}-{stop}", batch.slice(start, stop - start)
        halves = [((start + stop) // 2, stop), (start, (start + stop) // 2)] if stop - start > 1 else []
        if left[name] and halves:
            parts += halves
            continue
        if left[name] >= _ENDED_ALONE:
            part = _with_error(part, POISON.format(left[name]))
        try:
            results.append(_marked(work, part, f"{marks}/{name}.{uuid.uuid4().hex}"))
            num_through += part["error"].null_count
        except (GemelError, OSError, MemoryError):
            raise
        except Exception as error:
            if halves:
                logger.warning("%s: %r over %d rows, which are divided", stage, error, part.num_rows)
                parts += halves
                continue
            failures.append(error)
            if part["error"].null_count == 0 or (len(failures) == _FAILED_ALONE and not num_through):
                raise
            logger.warning("%s: row %d of shard %d fails alone", stage, *_place(part), exc_info=error)
            results.append(work(_with_error(part, _message(error, stage))))
    if failures and not num_through:
        raise failures[0]
    if left:
        storage.remove_tree(marks)
    _log_done(batch, stage, attempt=1 + left.total(), seconds=time.monotonic() - started)
    return pa.concat_tables(results, promote_options="permissive")


def _marked(work: Work, part: pa.Table, mark: str) -> pa.Table:
    """Work on rows while a mark lies in the output, which stays there if the process ends."""
    storage.write_bytes(f"{mark}/mark", b"")
    try:
        result = work(part)
    except Exception:  # which the process survives
        storage.remove_tree(mark)
        raise
    storage.remove_tree(mark)
    return result


def _message(error: Exception, stage: str) -> str:
    return FAILED.format(type(error).__name__, stage, " ".join(str(error).split())[:_SHOWN_CHARACTERS])


def _with_error(part: pa.Table, message: str) -> pa.Table:
    column = part.column_names.index("error")
    return part.set_column(column, "error", pa.array([message] * part.num_rows, pa.string()))


def _place(batch: pa.Table) -> tuple[int, int]:
    """Row and shard of a batch's first row."""
    return batch["row"][0].as_py(), batch["shard"][0].as_py()


def _log_done(batch: pa.Table, stage: str, attempt: int, seconds: float) -> None:
    """Say it to people and, field by field, to programs; louder if processes have ended over the batch."""
    row, shard = _place(batch)
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

"""Isolates rows that raise an exception or end their process, so that all other rows succeed.

A process writes a mark before it works on rows and removes it afterwards. If the rows come again
and the mark is still there, a process has ended while it worked on them. Such rows are divided into
halves until a row is alone. A row on which three processes ended while it was alone is poison and
becomes a row with an `error`.

A process that was killed from outside leaves a mark, too. This costs a division, but a good row
becomes poison only if it is hit three times while it is alone. If another driver of the same run
works on the same rows at the same time, its mark counts as one of the three.

A row that raises an exception while it is alone becomes a row with an `error`, too. If 16 rows have
done so in one process, from all parts of a batch or of several batches, and no row of these got
through, then the stage is at fault and not the rows, and the job stops.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.display import make_visible
from gemel_engine.errors import GemelError, redacted
from gemel_engine.pipeline.output import RunDirectory

POISON = "poison: {} processes ended while they worked on this row alone: look at its picture and text, or remove it"
FAILED = "failed: {} in stage {}, of this row alone: {}"
_ENDED_ALONE = 3
_FAILED_ALONE = 16
_SHOWN_CHARACTERS = 300

Work = Callable[[pa.Table], pa.Table]

logger = logging.getLogger(__name__)
logger.addFilter(make_visible)  # removes secrets from tracebacks, in actors too

# Number of rows that failed alone since a batch of which rows got through, by output and stage.
_failed_alone: Counter[tuple[str, str]] = Counter()


def marks_of(batch: pa.Table, output: str, stage: str) -> str:
    """Return the directory of the marks of a batch, which has columns `shard` and `row`."""
    row, shard = _place(batch)
    return f"{RunDirectory(output).marks}/{stage}/{shard}-{row}-{batch.num_rows}"


def isolate(work: Work, batch: pa.Table, output: str, stage: str) -> pa.Table:
    """Apply `work` to a batch, in parts if processes have ended on it; log stage and attempt.

    Args:
        work: Function of rows that returns the same rows and leaves rows with an `error` alone.
        batch: Table with columns `shard`, `row` and `error`; Ray passes it again, unchanged, when a
            process has ended.
        output: Output directory of the run, local or `s3://`; contains the marks of the batch until
            the work is done.
        stage: Name of the stage.

    Raises:
        GemelError, OSError, MemoryError: From `work`, at once.
        Exception: Any other error of `work`, if 16 rows failed alone and none got through.
    """
    started, marks, here = time.monotonic(), marks_of(batch, output, stage), (output, stage)
    left = Counter(file.partition(".")[0] for file in storage.list_files(marks))
    results: dict[int, pa.Table] = {}
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
            results[start] = _marked(work, part, f"{marks}/{name}.{uuid.uuid4().hex}")
            num_through += part["error"].null_count
        except (GemelError, OSError, MemoryError):
            raise
        except Exception as error:
            if halves:
                logger.warning("%s: %s over %d rows, which are divided", stage, redacted(repr(error)), part.num_rows)
                parts += halves
                continue
            _failed_alone[here] += 1
            if part["error"].null_count == 0 or (_failed_alone[here] >= _FAILED_ALONE and not num_through):
                del _failed_alone[here]
                raise
            logger.warning("%s: row %d of shard %d fails alone", stage, *_place(part), exc_info=error)
            results[start] = work(_with_error(part, _message(error, stage)))
            parts.sort(key=_num_rows)  # the largest is next: rows of one surface form lie together
    if num_through:
        del _failed_alone[here]
    if left:
        storage.remove_tree(marks)
    _log_done(batch, stage, attempt=1 + left.total(), seconds=time.monotonic() - started)
    return pa.concat_tables([results[start] for start in sorted(results)], promote_options="permissive")


def _marked(work: Work, part: pa.Table, mark: str) -> pa.Table:
    """Apply `work` while a mark is in the output; the mark stays if the process ends."""
    storage.write_bytes(f"{mark}/mark", b"")
    try:
        result = work(part)
    except (Exception, KeyboardInterrupt):  # no row has ended the process
        storage.remove_tree(mark)
        raise
    storage.remove_tree(mark)
    return result


def _num_rows(part: tuple[int, int]) -> int:
    start, stop = part
    return stop - start


def _message(error: Exception, stage: str) -> str:
    return FAILED.format(type(error).__name__, stage, " ".join(redacted(str(error)).split())[:_SHOWN_CHARACTERS])


def _with_error(part: pa.Table, message: str) -> pa.Table:
    column = part.column_names.index("error")
    return part.set_column(column, "error", pa.array([message] * part.num_rows, pa.string()))


def _place(batch: pa.Table) -> tuple[int, int]:
    """Return row and shard of the first row of a batch."""
    return batch["row"][0].as_py(), batch["shard"][0].as_py()


def _log_done(batch: pa.Table, stage: str, attempt: int, seconds: float) -> None:
    """Log a finished batch as text and as fields, as a warning if processes have ended on it."""
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

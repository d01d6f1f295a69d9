"""Rows that end the process which works on them: by an exception that nobody catches here, and by a real kill."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemel_engine import storage
from gemel_engine.errors import InputError
from gemel_engine.pipeline import corpus
from gemel_engine.pipeline.corpus import Shard, plan_shards
from gemel_engine.pipeline.isolation import isolate, marks_of
from gemel_engine.pipeline.stages import read_mentions

pytestmark = pytest.mark.unit


class ProcessEndedError(BaseException):
    """Stands for the end of a process: what comes after it in the process is not done."""


def batch_of(num_rows: int) -> pa.Table:
    return pa.table({"shard": [3] * num_rows, "row": list(range(num_rows)), "error": pa.nulls(num_rows, pa.string())})


def worked_on(output: str, num_rows: int, deadly: set[int], killed_at: Collection[int] = ()) -> tuple[pa.Table, int]:
    """The result after as many processes as it takes, and how many of these ended early.

    Args:
        output: Directory of the run.
        num_rows: Of the batch.
        deadly: Rows that end every process.
        killed_at: Numbers of calls at which somebody ends the process.
    """
    num_calls = 0

    def work(rows: pa.Table) -> pa.Table:
        nonlocal num_calls
        num_calls += 1
        for row, error in zip(rows["row"].to_pylist(), rows["error"].to_pylist(), strict=True):
            if row in deadly and error is None:
                raise ProcessEndedError
        if num_calls in killed_at:
            raise ProcessEndedError
        return rows

    for num_ended in range(200):
        try:
            return isolate(work, batch_of(num_rows), output, "images"), num_ended
        except ProcessEndedError:
            continue
    raise AssertionError("it never ends")


@settings(max_examples=50)
@given(num_rows=st.integers(1, 20), deadly=st.sets(st.integers(0, 19), max_size=3))
def test_deadly_rows_and_no_others_become_errors(num_rows: int, deadly: set[int]) -> None:
    with TemporaryDirectory() as output:
        result, num_ended = worked_on(output, num_rows, deadly)
        assert result["row"].to_pylist() == list(range(num_rows))
        poisoned = {row for row, error in enumerate(result["error"].to_pylist()) if error is not None}
        assert poisoned == {row for row in deadly if row < num_rows}
        assert all(error.startswith("poison: 3 processes") for error in result["error"].drop_null().to_pylist())
        assert num_ended <= len(poisoned) * 8  # halving 20 rows five times, then three times alone
        assert storage.list_files(output) == []


@settings(max_examples=50)
@example(num_rows=4, killed_at={1, 2, 3, 4})  # the last two hit a row that stands alone
@given(num_rows=st.integers(4, 20), killed_at=st.sets(st.integers(1, 12), max_size=4))
def test_a_few_kills_from_outside_make_no_row_poison(num_rows: int, killed_at: set[int]) -> None:
    with TemporaryDirectory() as output:
        result, num_ended = worked_on(output, num_rows, set(), killed_at)
        assert result.equals(batch_of(num_rows))
        assert num_ended <= len(killed_at)


def test_the_error_of_a_row_and_its_traceback_have_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(rows: pa.Table) -> pa.Table:
        if 2 in rows["row"].to_pylist() and rows["error"].null_count:
            raise ValueError("https://user:hidden@host/a.png?X-Amz-Signature=hidden is odd")
        return rows

    result = isolate(work, batch_of(4), str(tmp_path), "images")
    assert "hidden" not in result["error"].to_pylist()[2]
    assert "is odd" in result["error"].to_pylist()[2]
    assert "hidden" not in caplog.text
    assert caplog.text.count("Traceback") == 1


@pytest.mark.parametrize("error", [OSError("no room left"), KeyboardInterrupt()])
def test_an_error_or_a_request_to_stop_leaves_no_mark(tmp_path: Path, error: BaseException) -> None:
    def work(rows: pa.Table) -> pa.Table:
        raise error

    with pytest.raises(type(error)):
        isolate(work, batch_of(4), str(tmp_path), "stage")
    assert storage.list_files(marks_of(batch_of(4), str(tmp_path), "stage")) == []


def failing(rows: pa.Table, bad: Collection[int], num_calls: list[int]) -> pa.Table:
    num_calls.append(rows.num_rows)
    for row, error in zip(rows["row"].to_pylist(), rows["error"].to_pylist(), strict=True):
        if row in bad and error is None:
            raise IndexError(f"row {row}\nis out of range")
    return rows


@settings(max_examples=20)
@given(num_rows=st.integers(4, 40), bad=st.sets(st.integers(0, 39), max_size=3))
def test_rows_that_raise_become_errors_and_stop_no_others(num_rows: int, bad: set[int]) -> None:
    with TemporaryDirectory() as output:
        result = isolate(partial(failing, bad=bad, num_calls=[]), batch_of(num_rows), output, "retrieval")
        assert result["row"].to_pylist() == list(range(num_rows))
        errors = {row: error for row, error in enumerate(result["error"].to_pylist()) if error is not None}
        assert errors == {
            row: f"failed: IndexError in stage retrieval, of this row alone: row {row} is out of range"
            for row in bad
            if row < num_rows
        }
        assert storage.list_files(output) == []


@pytest.mark.parametrize(("num_rows", "bad"), [(1, range(1)), (15, range(15)), (64, range(20)), (64, range(44, 64))])
def test_rows_that_raise_side_by_side_or_have_a_batch_for_themselves_become_errors(
    tmp_path: Path, num_rows: int, bad: range
) -> None:
    result = isolate(partial(failing, bad=bad, num_calls=[]), batch_of(num_rows), str(tmp_path), "images")
    assert result["row"].to_pylist() == list(range(num_rows))
    assert [row for row, error in enumerate(result["error"].to_pylist()) if error] == list(bad)


@pytest.mark.parametrize(("num_rows", "num_batches"), [(4, 3), (16, 0), (1000, 0)])
def test_an_exception_over_every_row_is_not_the_rows_and_ends_the_job(
    tmp_path: Path, num_rows: int, num_batches: int
) -> None:
    """In a process that begins so, and in one where rows got through before."""
    for _ in range(2):
        num_calls: list[int] = []
        work = partial(failing, bad=range(num_rows), num_calls=num_calls)
        for _ in range(num_batches):
            isolate(work, batch_of(num_rows), str(tmp_path), "images")
        with pytest.raises(IndexError, match="is out of range"):
            isolate(work, batch_of(num_rows), str(tmp_path), "images")
        assert len(num_calls) < 130
        assert storage.list_files(str(tmp_path)) == []
        isolate(partial(failing, bad=(), num_calls=[]), batch_of(num_rows), str(tmp_path), "images")


def test_errors_of_the_job_are_nobodys_rows(tmp_path: Path) -> None:
    def work(rows: pa.Table) -> pa.Table:
        num_calls.append(rows.num_rows)
        raise InputError("the corpus has changed")

    num_calls: list[int] = []
    with pytest.raises(InputError):
        isolate(work, batch_of(4), str(tmp_path), "reading")
    assert num_calls == [4]


def test_a_row_that_ends_its_reader_becomes_an_error_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"mention_id": list("abcd"), "text": ["a bear"] * 4, "mention": ["bear"] * 4}), table_path)
    (shard,) = plan_shards(str(table_path), 10)

    def read_rows(part: Shard, columns: Sequence[str]) -> pa.Table:
        if part.start <= 2 < part.stop and "text" in columns:
            raise ProcessEndedError
        return corpus.read_rows(part, columns)

    monkeypatch.setattr("gemel_engine.pipeline.stages.read_rows", read_rows)
    batch = pa.Table.from_pylist([asdict(shard)])
    for _ in range(20):
        try:
            table = read_mentions(batch, str(tmp_path / "output"), ("image_uri",))
            break
        except ProcessEndedError:
            continue
    else:
        raise AssertionError("it never ends")
    rows = sorted(table.select(["row", "mention_id", "mention", "error"]).to_pylist(), key=lambda row: row["row"])
    assert [row["mention_id"] for row in rows] == list("abcd")
    assert [row["mention"] for row in rows] == ["bear", "bear", None, "bear"]
    assert [(row["error"] or "").partition(":")[0] for row in rows] == ["", "", "poison", ""]


def test_each_batch_has_marks_of_its_own() -> None:
    assert marks_of(batch_of(5).slice(2), "out", "images") == "out/_marks/images/3-2-3"


def test_the_log_tells_shard_and_attempt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemel_engine.pipeline.isolation")
    worked_on(str(tmp_path), 4, {2})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("images: 4 rows of shard 3, from row 0: attempt 6, ")
    fields = ("stage", "shard", "first_row", "num_rows", "attempt")
    assert [getattr(record, name) for name in fields] == ["images", 3, 0, 4, 6]


WORKER = """
import os, signal, sys
import pyarrow as pa, pyarrow.parquet as pq
from gemel_engine.pipeline.isolation import isolate

def work(rows):
    if any(row == 2 and error is None for row, error in zip(rows["row"].to_pylist(), rows["error"].to_pylist())):
        os.kill(os.getpid(), signal.SIGKILL)
    return rows

batch = pa.table({"shard": [0] * 5, "row": list(range(5)), "error": pa.nulls(5, pa.string())})
pq.write_table(isolate(work, batch, sys.argv[1], "images"), sys.argv[2])
"""


@pytest.mark.heavy
def test_a_killed_process_leaves_its_mark(tmp_path: Path) -> None:
    output, result = tmp_path / "output", tmp_path / "result.parquet"
    returned = [-signal.SIGKILL]
    while returned[-1] == -signal.SIGKILL and len(returned) < 20:
        command = [sys.executable, "-c", WORKER, str(output), str(result)]
        returned.append(subprocess.run(command, check=False).returncode)
    assert returned[-1] == 0
    errors = pq.read_table(result)["error"].to_pylist()
    assert [error is not None for error in errors] == [False, False, True, False, False]

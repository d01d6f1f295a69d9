"""How a shard is finished when other processes finish it too, or were killed while they did."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine import storage
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.pipeline.corpus import Shard, ids_digest, plan_identity, plan_shards, read_rows
from gemel_engine.pipeline.identity import differences
from gemel_engine.pipeline.output import (
    claim_output,
    commit_shard,
    finished_shards,
    is_claimed,
    read_columns,
    write_part,
)
from gemel_engine.types import Prediction, predictions_to_table

pytestmark = pytest.mark.unit

SHARD = Shard(index=3, uri="mentions.parquet", version="1", start=0, stop=4)


def store_part(output: str, *rows: int) -> str:
    table = predictions_to_table([Prediction(f"m{row}") for row in rows])
    return write_part(output, SHARD.index, table.append_column("row", pa.array(rows)))


def test_a_shard_is_its_parts_in_order(tmp_path: Path) -> None:
    output = str(tmp_path)
    parts = [store_part(output, 2, 0), store_part(output, 3, 1)]
    assert finished_shards(output) == set()
    assert commit_shard(output, SHARD, parts)
    assert finished_shards(output) == {"shard-00003"}
    found = read_columns(f"{output}/data", ["mention_id"])["mention_id"].to_pylist()
    assert found == ["m0", "m1", "m2", "m3"]


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3, 3)])
def test_rows_lost_or_repeated_are_no_shard(tmp_path: Path, rows: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="shard-00003: rows lost or repeated"):
        commit_shard(str(tmp_path), SHARD, [store_part(str(tmp_path), *rows)])
    assert finished_shards(str(tmp_path)) == set()


def test_parts_are_not_missed_when_the_shard_is_there(tmp_path: Path) -> None:
    """Another run of the same command has finished all shards and removed the parts."""
    output = str(tmp_path)
    first, second = store_part(output, 0, 1, 2, 3), store_part(output, 0, 1, 2, 3)
    storage.remove_tree(f"{output}/_parts")
    with pytest.raises(InputError, match=r"shard-00003\.parquet' were removed .*: run the same command again"):
        commit_shard(output, SHARD, [second])
    assert commit_shard(output, SHARD, [store_part(output, 0, 1, 2, 3)])
    assert not commit_shard(output, SHARD, [first])


def test_what_a_killed_process_has_begun_is_no_shard(tmp_path: Path) -> None:
    output = str(tmp_path)
    storage.write_bytes(f"{output}/data/.shard-00003.parquet.0123", b"PAR1")
    assert finished_shards(output) == set()
    assert commit_shard(output, SHARD, [store_part(output, 0, 1, 2, 3)])
    assert finished_shards(output) == {"shard-00003"}


def test_a_corpus_that_has_changed_is_another_run_s(tmp_path: Path) -> None:
    corpus, output = str(tmp_path / "corpus.parquet"), str(tmp_path / "output")

    def write_corpus(*mention_ids: str) -> None:
        pq.write_table(pa.table(dict.fromkeys(("mention_id", "text", "mention"), mention_ids)), corpus)

    def claim() -> None:
        claim_output(output, {"plan": plan_identity(plan_shards(corpus, 10))})

    write_corpus("a", "b")
    (shard,) = plan_shards(corpus, 10)
    claim()
    claim()
    assert read_rows(shard, ["text"])["text"].to_pylist() == ["a", "b"]
    write_corpus("a", "b", "c")
    with pytest.raises(InputError, match="has changed since the run was planned: link it again to a new output"):
        read_rows(shard, ["text"])
    with pytest.raises(ConfigurationError, match=r"differs in plan \('.*corpus.parquet' is not as .*\): choose"):
        claim()


def test_the_file_in_which_a_plan_differs_is_named(tmp_path: Path) -> None:
    """A file that was only touched, and files that came and went before others."""
    for name in "abc":
        write_mentions(tmp_path / f"{name}.parquet", name, ids=[name])
    before = plan_identity(plan_shards(str(tmp_path), 10))
    os.utime(tmp_path / "b.parquet", ns=(0, 0))
    touched = plan_identity(plan_shards(str(tmp_path), 10))
    for left, right, name in (
        (before, touched, "b"), (before, before[1:], "a"), (before[1:], before, "a"), (before, before[:2], "c")
    ):  # fmt: skip
        (found,) = differences({"plan": {"train": left}}, {"plan": {"train": right}})
        assert found.startswith(f"plan.train ('{tmp_path / name}.parquet' is not as it was then: put it back")


@pytest.mark.parametrize("place", ["file", "file/output", "/proc/output", "long" * 99])
def test_an_output_that_can_be_no_directory_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"the output '.*' can't be used \(.*\): give a directory"):
        claim_output(str(tmp_path / place), {})


@pytest.mark.parametrize("use", [is_claimed, partial(claim_output, identity={})])
def test_an_output_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object]
) -> None:
    def refuse(_: str) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigurationError, match=r"can't be used \(.*Permission denied.*\): give a directory"):
        use(str(tmp_path))


def write_mentions(path: Path, *texts: str, ids: Sequence[str] = ("a", "b")) -> None:
    """Rows of the same size on disk whatever their texts and ids are, as long as these are of equal length."""
    table = pa.table({"mention_id": ids, "text": texts, "mention": texts})
    pq.write_table(table, path, compression="none", use_dictionary=False)


@pytest.mark.parametrize("is_in_footer", [True, False])
def test_a_file_that_was_replaced_is_refused_whatever_its_size_and_time(tmp_path: Path, is_in_footer: bool) -> None:
    """By its footer, where the least or greatest value of a column is another; by its ids in any case."""
    path = tmp_path / "corpus.parquet"
    write_mentions(path, "one", "two", ids=("a", "b"))
    (shard,) = plan_shards(str(path), 10)
    before = path.stat()
    if is_in_footer:
        write_mentions(path, "one", "tww", ids=("a", "b"))
    else:
        write_mentions(path, "one", "two", ids=("b", "a"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(InputError, match="has changed since the run was planned: link it again to a new output"):
        read_rows(shard, ["mention_id", "text"])
    assert plan_shards(str(path), 10) != [shard]


def test_a_file_that_was_removed_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    write_mentions(path, "one", "two")
    (shard,) = plan_shards(str(path), 10)
    path.unlink()
    with pytest.raises(InputError, match="no table at"):
        read_rows(shard, ["text"])


def test_ids_have_one_digest_in_all_types_and_pieces() -> None:
    digests = {
        ids_digest(ids)
        for ids in (
            pa.chunked_array([["a", "bc", "d"]]),
            pa.chunked_array([["a"], ["bc", "d"]], pa.large_string()),
            pa.chunked_array([["x", "a", "bc", "d", "y"]])[1:4],
            pa.chunked_array([pa.array(["a", "bc", "d"]).dictionary_encode()]),
        )
    }
    assert len(digests) == 1
    assert ids_digest(pa.chunked_array([["ab", "c", "d"]])) not in digests

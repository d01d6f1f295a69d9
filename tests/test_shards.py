"""How a shard is finished when other processes finish it too, or were killed while they did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine import shards, storage
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.shards import Shard
from gemel_engine.types import Prediction, predictions_to_table

pytestmark = pytest.mark.unit

SHARD = Shard(index=3, uri="mentions.parquet", version="1", start=0, stop=4)


def write_part(output: str, *rows: int) -> str:
    table = predictions_to_table([Prediction(f"m{row}") for row in rows])
    return shards.write_part(output, SHARD, table.append_column("row", pa.array(rows)))


def test_a_shard_is_its_parts_in_order(tmp_path: Path) -> None:
    output = str(tmp_path)
    parts = [write_part(output, 2, 0), write_part(output, 3, 1)]
    assert shards.finished_shards(output) == set()
    assert shards.commit_shard(output, SHARD, parts)
    assert shards.finished_shards(output) == {"shard-00003"}
    found = shards.read_columns(f"{output}/data", ["mention_id"])["mention_id"].to_pylist()
    assert found == ["m0", "m1", "m2", "m3"]


@pytest.mark.parametrize("rows", [(0, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3, 3)])
def test_rows_lost_or_repeated_are_no_shard(tmp_path: Path, rows: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="shard-00003: rows lost or repeated"):
        shards.commit_shard(str(tmp_path), SHARD, [write_part(str(tmp_path), *rows)])
    assert shards.finished_shards(str(tmp_path)) == set()


def test_parts_are_not_missed_when_the_shard_is_there(tmp_path: Path) -> None:
    """Another run of the same command has finished all shards and removed the parts."""
    output = str(tmp_path)
    first, second = write_part(output, 0, 1, 2, 3), write_part(output, 0, 1, 2, 3)
    storage.remove_tree(f"{output}/_parts")
    with pytest.raises(InputError, match=r"shard-00003\.parquet' were removed .*: run the same command again"):
        shards.commit_shard(output, SHARD, [second])
    assert shards.commit_shard(output, SHARD, [write_part(output, 0, 1, 2, 3)])
    assert not shards.commit_shard(output, SHARD, [first])


def test_what_a_killed_process_has_begun_is_no_shard(tmp_path: Path) -> None:
    output = str(tmp_path)
    storage.write_bytes(f"{output}/data/.shard-00003.parquet.0123", b"PAR1")
    assert shards.finished_shards(output) == set()
    assert shards.commit_shard(output, SHARD, [write_part(output, 0, 1, 2, 3)])
    assert shards.finished_shards(output) == {"shard-00003"}


def test_a_corpus_that_has_changed_is_another_run_s(tmp_path: Path) -> None:
    corpus, output = str(tmp_path / "corpus.parquet"), str(tmp_path / "output")

    def write_corpus(*mention_ids: str) -> None:
        pq.write_table(pa.table(dict.fromkeys(("mention_id", "text", "mention"), mention_ids)), corpus)

    def claim() -> None:
        shards.claim_output(output, {"plan": shards.plan_identity(shards.plan_shards(corpus, 10))})

    write_corpus("a", "b")
    (shard,) = shards.plan_shards(corpus, 10)
    claim()
    claim()
    assert shards.read_rows(shard, ["text"])["text"].to_pylist() == ["a", "b"]
    write_corpus("a", "b", "c")
    with pytest.raises(InputError, match="has changed since the run was planned: link it again to a new output"):
        shards.read_rows(shard, ["text"])
    with pytest.raises(ConfigurationError, match="holds a run that differs in plan: choose another output"):
        claim()


def write_mentions(path: Path, *texts: str, ids: Sequence[str] = ("a", "b")) -> None:
    """Rows of the same size on disk whatever their texts and ids are, as long as these are of equal length."""
    table = pa.table({"mention_id": ids, "text": texts, "mention": texts})
    pq.write_table(table, path, compression="none", use_dictionary=False)


@pytest.mark.parametrize("is_in_footer", [True, False])
def test_a_file_that_was_replaced_is_refused_whatever_its_size_and_time(tmp_path: Path, is_in_footer: bool) -> None:
    """By its footer, where the least or greatest value of a column is another; by its ids in any case."""
    path = tmp_path / "corpus.parquet"
    write_mentions(path, "one", "two", ids=("a", "b"))
    (shard,) = shards.plan_shards(str(path), 10)
    before = path.stat()
    if is_in_footer:
        write_mentions(path, "one", "tww", ids=("a", "b"))
    else:
        write_mentions(path, "one", "two", ids=("b", "a"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(InputError, match="has changed since the run was planned: link it again to a new output"):
        shards.read_rows(shard, ["mention_id", "text"])
    assert shards.plan_shards(str(path), 10) != [shard]


def test_a_file_that_was_removed_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    write_mentions(path, "one", "two")
    (shard,) = shards.plan_shards(str(path), 10)
    path.unlink()
    with pytest.raises(InputError, match="no Parquet file at"):
        shards.read_rows(shard, ["text"])


def test_ids_have_one_digest_in_all_types_and_pieces() -> None:
    digests = {
        shards.ids_digest(ids)
        for ids in (
            pa.chunked_array([["a", "bc", "d"]]),
            pa.chunked_array([["a"], ["bc", "d"]], pa.large_string()),
            pa.chunked_array([["x", "a", "bc", "d", "y"]])[1:4],
            pa.chunked_array([pa.array(["a", "bc", "d"]).dictionary_encode()]),
        )
    }
    assert len(digests) == 1
    assert shards.ids_digest(pa.chunked_array([["ab", "c", "d"]])) not in digests

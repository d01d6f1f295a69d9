"""How a shard is finished when other processes finish it too, or were killed while they did."""

from __future__ import annotations

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
    with pytest.raises(FileNotFoundError):
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

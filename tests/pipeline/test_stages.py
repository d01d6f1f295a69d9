"""The stages that both jobs share, called as Ray calls them: what they take, what they return, their error rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import MENTION_SCHEMA, picture, toml

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.evidence.retrieved import RETRIEVED_TYPE, row_to_retrieved
from gemel_engine.pipeline.corpus import Shard, plan_shards
from gemel_engine.pipeline.stages import Annotate, EncodeImages, Retrieve, read_mentions

ROWS: list[dict[str, Any]] = [
    {"mention_id": "a", "text": "A star.", "mention": "star", "image_bytes": b"no picture"},
    {"mention_id": "b", "text": "A bear.", "mention": "bear", "image_bytes": picture("red")},
    {"mention_id": "c", "text": "", "mention": "bear", "image_bytes": picture("red")},
    {"mention_id": "d", "text": "A bear.", "mention": "bear", "image_bytes": None},
]


@pytest.fixture(scope="module")
def config(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LinkConfig:
    directory = tmp_path_factory.mktemp("stages")
    (directory / "link.toml").write_text(toml(artifacts, directory / "corpus.parquet", directory / "output"))
    return load_config(LinkConfig, directory / "link.toml")


def plan(directory: Path, rows: list[dict[str, Any]] = ROWS, rows_per_shard: int = 100) -> list[Shard]:
    pq.write_table(pa.Table.from_pylist(rows, schema=MENTION_SCHEMA), directory / "corpus.parquet")
    return plan_shards(str(directory / "corpus.parquet"), rows_per_shard)


def read(directory: Path, shard: Shard | None = None, *annotate: Annotate) -> pa.Table:
    shard = shard or plan(directory)[0]
    return read_mentions(pa.Table.from_pylist([asdict(shard)]), str(directory), ("image_bytes",), *annotate)


@pytest.mark.unit
def test_a_shard_is_read_in_the_order_of_its_surface_forms(tmp_path: Path) -> None:
    batch = read(tmp_path)
    assert batch["mention_id"].to_pylist() == ["b", "c", "d", "a"]
    assert batch["row"].to_pylist() == [1, 2, 3, 0]
    assert set(batch["shard"].to_pylist()) == {0}
    assert batch["image_bytes"].to_pylist()[2:] == [None, b"no picture"]
    errors = batch["error"].to_pylist()
    assert errors[1].startswith("invalid_mention: the text is empty")
    assert [error for error in errors if error is not None] == [errors[1]]


@pytest.mark.unit
def test_a_part_of_a_file_keeps_its_row_numbers_and_gets_the_columns_of_annotate(tmp_path: Path) -> None:
    _, shard = plan(tmp_path, rows_per_shard=2)

    def annotate(table: pa.Table, of: Shard) -> pa.Table:
        assert of == shard
        return table.append_column("number", pa.array(range(len(table))))

    batch = read(tmp_path, shard, annotate)
    assert batch["row"].to_pylist() == [2, 3]
    assert batch["shard"].to_pylist() == [1, 1]
    assert batch["number"].to_pylist() == [0, 1]


@pytest.mark.unit
def test_a_file_that_changed_since_the_plan_stops_the_job(tmp_path: Path) -> None:
    (planned,) = plan(tmp_path)
    plan(tmp_path, [*ROWS[1:], ROWS[0]])
    with pytest.raises(InputError, match="has changed since the run was planned"):
        read(tmp_path, planned)


def test_pictures_become_features_or_errors(config: LinkConfig, tmp_path: Path) -> None:
    batch = EncodeImages(config)(read(tmp_path))
    assert not {"image_bytes", "image_uri"} & set(batch.column_names)
    by_id = {row["mention_id"]: row for row in batch.to_pylist()}
    assert len(by_id["b"]["image_features"]) == 64
    assert by_id["b"]["error"] is None
    assert by_id["a"]["error"].startswith("image: ")
    assert by_id["c"]["error"].startswith("invalid_mention: ")  # and its picture was left alone
    assert [by_id[name]["image_features"] for name in "acd"] == [None] * 3
    assert all(row["image_seconds"] >= 0 and row["image_peak_bytes"] > 0 for row in by_id.values())


def test_retrieval_leaves_rows_with_errors_alone(config: LinkConfig, tmp_path: Path) -> None:
    batch = Retrieve(config)(read(tmp_path))
    assert batch.schema.field("retrieved").type == RETRIEVED_TYPE
    found = {row["mention_id"]: row_to_retrieved(row["retrieved"]) for row in batch.to_pylist()}
    assert {name: len(items.items) for name, items in found.items()} == {"a": 2, "b": 2, "c": 0, "d": 2}
    assert found["b"] == found["d"]  # equal surface forms get equal demonstrations
    assert batch["retrieval_seconds"].null_count == 0


def test_a_stage_refuses_other_models_than_the_run_began_with(config: LinkConfig) -> None:
    with pytest.raises(ArtifactError, match=r"the image encoder .* is not the one that the run began with"):
        EncodeImages(config, {"image_encoder": "another"})
    with pytest.raises(ArtifactError, match=r"the demonstrations .* is not the one that the run began with"):
        Retrieve(config, {"demonstrations": {}})


def test_an_empty_batch_passes_all_stages(config: LinkConfig, tmp_path: Path) -> None:
    empty = read(tmp_path).slice(0, 0)
    batch = Retrieve(config)(EncodeImages(config)(empty))
    assert (batch.num_rows, batch.schema.field("retrieved").type) == (0, RETRIEVED_TYPE)

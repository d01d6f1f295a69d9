"""The stages of the linking job, called as Ray calls them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import mention_rows, toml

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError
from gemel_engine.linking.stages import (
    RECEIPT_SCHEMA,
    GenerateEntityNames,
    read_with_places,
    write_ordered,
    write_parts,
)
from gemel_engine.pipeline.corpus import SMALL_SCHEMA, Shard, plan_shards
from gemel_engine.pipeline.stages import read_mentions
from gemel_engine.types import PREDICTION_SCHEMA, Prediction, predictions_to_table


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    rows = [{key: row[key] for key in ("mention_id", "text", "mention")} for row in mention_rows()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus.parquet")
    return plan_shards(str(tmp_path / "corpus.parquet"), 5)


def as_batch(shard: Shard, **columns: Any) -> pa.Table:
    return pa.Table.from_pylist([asdict(shard) | columns])


@pytest.mark.unit
def test_rows_are_read_with_their_places_and_written_in_order(shards: list[Shard], tmp_path: Path) -> None:
    table = read_with_places(as_batch(shards[0], places=[4, 0, 3, 1, 2]))
    assert table["place"].to_pylist() == [4, 0, 3, 1, 2]
    assert table.drop_columns(["place"]).schema == SMALL_SCHEMA
    assert table["candidate_ids"].null_count == 5  # a column that the corpus lacks
    receipt = write_ordered(table.sort_by("place"), str(tmp_path / "ordered"), 2)
    assert receipt.to_pydict() == {"num_rows": [5]}
    file = pq.ParquetFile(tmp_path / "ordered/000000000000.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [2, 2, 1]
    assert file.read(["mention_id"])["mention_id"].to_pylist() == ["m1", "m3", "m4", "m2", "m0"]


@pytest.mark.unit
def test_each_shard_of_a_batch_gets_a_part_and_a_receipt(tmp_path: Path) -> None:
    found = [Prediction("m0", "Q0"), Prediction("m5", error="image: no"), Prediction("m1", error="poison: it")]
    table = predictions_to_table(found)
    columns = {"shard": [0, 1, 0], "row": [0, 5, 1], "rollouts": [2.0, 0.0, 1.0], "image_peak_bytes": [1.0, 5.0, 3.0]}
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.int32() if name == "shard" else None))
    receipts = write_parts(table, str(tmp_path))
    assert receipts.schema == RECEIPT_SCHEMA
    first, second = receipts.to_pylist()
    assert (first["shard"], first["num_rows"], first["error_kinds"]) == (0, 2, ["poison"])
    assert (first["rollouts"], first["image_peak_bytes"], first["image_seconds"]) == (3.0, 3.0, None)
    assert (second["shard"], second["error_kinds"]) == (1, ["image"])
    part = pq.read_table(first["part"])
    assert part["mention_id"].to_pylist() == ["m0", "m1"]
    assert set(part.column_names) == {*PREDICTION_SCHEMA.names, "row"}


@pytest.fixture(scope="module")
def config(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LinkConfig:
    directory = tmp_path_factory.mktemp("linking_stages")
    (directory / "link.toml").write_text(toml(artifacts, directory / "corpus.parquet", directory / "output"))
    config = load_config(LinkConfig, directory / "link.toml")
    return replace(config, vision=replace(config.vision, image_encoder=None, feature_mapper=None))


def test_each_row_becomes_a_prediction_with_costs(config: LinkConfig, shards: list[Shard], tmp_path: Path) -> None:
    batch = read_mentions(as_batch(shards[0]), str(tmp_path), ())
    errors: list[str | None] = [None] * 4 + ["image: no picture"]
    batch = batch.set_column(batch.column_names.index("error"), "error", pa.array(errors))
    table = GenerateEntityNames(config)(batch)
    assert table.select(PREDICTION_SCHEMA.names).schema == PREDICTION_SCHEMA
    assert table["mention_id"].to_pylist() == batch["mention_id"].to_pylist()
    assert table["row"].to_pylist() == batch["row"].to_pylist()
    assert table["error"].to_pylist() == errors
    assert table["certified"].to_pylist() == [True] * 4 + [None]
    assert table["entity_id"][4].as_py() is None
    assert sum(table["rollouts"].to_pylist()) == pytest.approx(sum(filter(None, table["num_rollouts"].to_pylist())))
    assert sum(table["rows_kept"].to_pylist()) == 0


def test_generation_refuses_another_knowledge_base_than_the_run_began_with(config: LinkConfig) -> None:
    with pytest.raises(ArtifactError, match=r"the knowledge base .* is not the one that the run began with"):
        GenerateEntityNames(config, {"knowledge_base": {}})

"""The stages of the training job, called as Ray calls them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine.config.settings import TrainConfig, TrainedModelSettings
from gemel_engine.errors import InputError
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.training.stages import CheckExamples, read_file, with_features, write_examples, write_features

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("mention_id", "text", "mention", "entity_id", "error")),
        ("image_features", pa.list_(pa.float64())),
        ("shard", pa.int32()),
        ("row", pa.int64()),
    ]
)


def batch_of(*rows: dict[str, Any]) -> pa.Table:
    usual = {"text": "Look, a bear.", "mention": "bear", "entity_id": "Q3", "image_features": [0.5] * 4, "shard": 2}
    return pa.Table.from_pylist(
        [usual | {"mention_id": f"m{n}", "row": n} | row for n, row in enumerate(rows)], schema=SCHEMA
    )


def test_each_unusable_mention_gets_its_error(artifacts: dict[str, Path], tmp_path: Path) -> None:
    config = TrainConfig(
        train="none",
        output=str(tmp_path),
        knowledge_base=str(artifacts["knowledge_base"]),
        language_model=TrainedModelSettings(name=str(artifacts["language_model"])),
    )
    rows: list[dict[str, Any]] = [
        {},
        {"image_features": None},
        {"entity_id": "Q999"},
        {"entity_id": None},
        {"mention": "bear " * 800},
        {"image_features": [0.5] * 3},
        {"image_features": [1e300] * 4},
        {"error": "image: no picture", "entity_id": "Q999"},
    ]
    batch = batch_of(*rows)
    checked = CheckExamples(config, prefix_length=2, vision_width=4)(batch)
    assert checked.drop_columns(["error"]).equals(batch.drop_columns(["error"]))
    errors = checked["error"].to_pylist()
    assert errors[:4] == [
        None,
        None,
        "unknown_entity: 'Q999' is not in the knowledge base",
        "unknown_entity: '' is not in the knowledge base",
    ]
    assert errors[4].startswith("prompt_too_long: ")
    assert errors[5].startswith("invalid_mention: image_features holds 3 numbers, 3 of them finite")
    assert errors[6].startswith("invalid_mention: image_features holds 4 numbers, 0 of them finite")
    assert errors[7] == "image: no picture"


@pytest.mark.unit
def test_examples_are_stored_once_under_the_name_of_their_first_row(tmp_path: Path) -> None:
    batch = batch_of({"row": 7}, {"image_features": None}, {"error": "image: no picture"})
    receipt = write_examples(batch, str(tmp_path))
    assert receipt.to_pydict() == {"num_rows": [3], "num_pictures": [1]}
    assert write_examples(batch, str(tmp_path)).equals(receipt)  # a stage that is run again
    (path,) = tmp_path.iterdir()
    assert path.name == "shard-00002-00000007.parquet"
    assert pq.read_table(path).equals(batch)
    assert read_file(pa.table({"uri": [str(path)]}))["mention_id"].to_pylist() == ["m0", "m1", "m2"]


@pytest.mark.unit
def test_features_of_a_shard_are_attached_to_its_rows(tmp_path: Path) -> None:
    shard = Shard(2, "mentions.parquet", "", 7, 10)
    batch = batch_of({"row": 9}, {"row": 7, "image_features": None}, {"row": 8, "error": "image: no picture"})
    for part in (batch.slice(0, 1), batch.slice(1)):  # in the order of surface forms, and in two parts
        write_features(part, str(tmp_path))
    rows = batch.sort_by("row").drop_columns(["image_features"])
    rows = rows.set_column(rows.column_names.index("error"), "error", pa.nulls(3, pa.string()))
    found = with_features(rows, shard, str(tmp_path))
    assert found.select(batch.column_names).equals(batch.sort_by("row"))
    with pytest.raises(InputError, match=r"shard-00002' has not the image features of its mentions: remove"):
        with_features(rows.slice(1), shard, str(tmp_path))
    shutil.rmtree(tmp_path / "shard-00002")
    with pytest.raises(InputError, match=r"shard-00002' has not the image features of its mentions: remove"):
        with_features(rows, shard, str(tmp_path))

"""The stages of the training job, called as Ray calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine.config.settings import TrainConfig, TrainedModelSettings
from gemel_engine.training.stages import CheckExamples, read_file, write_examples

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
        {"text": "bear " * 9000},
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

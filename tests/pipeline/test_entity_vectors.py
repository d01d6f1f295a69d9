"""Pictures and their features in tables of entities."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.names import ENTITY_NAMES
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.evidence.index import open_evidence
from gemel_engine.evidence.update import local_knowledge_base
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS
from gemel_engine.pipeline.entity_vectors import EntityEncoders, check_table, features_width
from gemel_engine.pipeline.knowledge_bases import build, update
from gemel_engine.storage import parquet

STRICT, NONE = KnowledgeBaseSettings(), EntityEncoders()


def write(path: Path, features: list[list[float] | None] | None, **columns: list[str]) -> str:
    table: dict[str, list[str]] = {"entity_id": list("abcde"), "name": ENTITY_NAMES[:5], **columns}
    pq.write_table(pa.table(table if features is None else {**table, "image_features": features}), path)
    return str(path)


def test_the_first_usable_features_give_the_width(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "e").mkdir()
    write(tmp_path / "e/0.parquet", None, entity_id=list("fghij"), name=ENTITY_NAMES[5:10])
    entities = write(tmp_path / "e/1.parquet", [None, [float("nan")], [1.0, 2.0], [3.0], [4.0, 5.0]])
    assert features_width(entities) == features_width(str(tmp_path / "e")) == 2
    assert features_width(str(tmp_path / "e/0.parquet")) is None
    report = build(str(tmp_path / "e"), str(tmp_path / "kb"), tokenizer, STRICT, NONE)
    assert report.evidence is not None
    assert (report.evidence.num_pictures, report.num_unusable_pictures) == (2, 2)


def test_an_update_with_features_of_another_width_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    base = str(tmp_path / "kb")
    build(write(tmp_path / "e.parquet", [[1.0, 2.0]] * 5), base, tokenizer, STRICT, NONE)
    changes = write(tmp_path / "c.parquet", [[1.0, 2.0, 3.0]] * 5)
    with pytest.raises(InputError, match=r"image_features hold 3 numbers, those of the knowledge base .* 2: use the"):
        update(base, changes, tmp_path / "up", tokenizer, STRICT, NONE)
    assert not (tmp_path / "up").exists()


def test_features_of_an_update_are_indexed_though_the_base_has_none(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    entities = write(tmp_path / "e.parquet", None)
    changes = write(tmp_path / "c.parquet", [[1.0, 2.0], None, [3.0, 4.0], None, None])
    build(entities, str(tmp_path / "kb"), tokenizer, STRICT, NONE)
    update(str(tmp_path / "kb"), changes, tmp_path / "up", tokenizer, STRICT, NONE)
    evidence = open_evidence(local_knowledge_base(str(tmp_path / "up"), tmp_path / "cache"), verify=True)
    assert evidence is not None
    assert evidence.manifest.num_pictures == 2
    build(entities, str(tmp_path / "plain"), tokenizer, STRICT, None)
    with caplog.at_level(logging.WARNING):
        update(str(tmp_path / "plain"), changes, tmp_path / "second", tokenizer, STRICT, NONE)
    assert "image_features are left out, because the knowledge base" in caplog.text


def test_pictures_of_hugging_face_in_lists_are_their_bytes(tmp_path: Path) -> None:
    pictures = [[{"bytes": b"a", "path": "a.png"}, None, {"bytes": b"b", "path": None}], None, []]
    pq.write_table(pa.table({"entity_id": list("abc"), "image_bytes": pictures}), tmp_path / "e.parquet")
    with parquet.open_table(str(tmp_path / "e.parquet"), ENTITY_COLUMNS) as table:
        assert table.read(["image_bytes"])["image_bytes"].to_pylist() == [[b"a", None, b"b"], None, []]


def test_addresses_of_which_none_may_be_read_are_refused_before_any_work(tmp_path: Path) -> None:
    table = pa.table({"entity_id": ["a"], "name": ["Paris"], "image_uri": ["https://a.example/a.png"]})
    pq.write_table(table, tmp_path / "entities.parquet")
    encoders = EntityEncoders(image_encoder="ViT-B-32")
    with pytest.raises(ConfigurationError, match="--allowed-image-prefixes, or leave out --image-encoder"):
        check_table(str(tmp_path / "entities.parquet"), encoders, ("entity_id", "name"))
    check_table(str(tmp_path / "entities.parquet"), NONE, ("entity_id", "name"))
    with pytest.raises(InputError, match="label"):
        check_table(str(tmp_path / "entities.parquet"), NONE, ("entity_id", "label"))

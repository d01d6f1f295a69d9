"""The differences between two knowledge bases."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from support.tables import make_tokenizer

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.changes import KnowledgeBaseChanges
from gemel_engine.knowledge_base.store import KnowledgeBase


def built(directory: Path, rows: list[dict[str, object]]) -> KnowledgeBase:
    build_knowledge_base(pa.Table.from_pylist(rows), make_tokenizer(), directory, KnowledgeBaseSettings())
    return KnowledgeBase.open(directory, verify=True)


def test_retired_renamed_edited_and_added_entities_are_told_apart(tmp_path: Path) -> None:
    common: list[dict[str, object]] = [
        {"entity_id": "same", "name": "same", "description": "x", "aliases": ["a", "b"], "popularity": 1.0},
        {"entity_id": "nothing", "name": "nothing", "description": None, "aliases": None, "popularity": None},
    ]
    before = built(
        tmp_path / "before",
        [
            *common,
            {"entity_id": "gone", "name": "gone"},
            {"entity_id": "renamed", "name": "old name"},
            {"entity_id": "described", "name": "described", "description": None},
            {"entity_id": "aliased", "name": "aliased", "aliases": ["a"]},
            {"entity_id": "popular", "name": "popular", "popularity": 1.0},
        ],
    )
    after = built(
        tmp_path / "after",
        [
            *common,
            {"entity_id": "renamed", "name": "new name"},
            {"entity_id": "described", "name": "described", "description": "now"},
            {"entity_id": "aliased", "name": "aliased", "aliases": ["a", "c"]},
            {"entity_id": "popular", "name": "popular", "popularity": 2.0},
            {"entity_id": "new", "name": "quite new"},
        ],
    )
    changes = KnowledgeBaseChanges.between(before, after)
    assert sorted(changes.entity_ids.to_pylist()) == ["gone", "renamed"]
    assert sorted(changes.edited_ids.to_pylist()) == ["aliased", "described"]
    assert changes.added_names is not None
    assert changes.added_names.num_names == 2
    changes.save(str(tmp_path / "changes"))
    stored = pq.read_table(tmp_path / "changes/entities.parquet").to_pylist()
    assert {row["entity_id"] for row in stored if row["is_edited"]} == {"aliased", "described"}


def test_aliases_are_compared_though_one_is_null(tmp_path: Path) -> None:
    before = built(tmp_path / "before", [{"entity_id": "a", "name": "a", "aliases": ["x", None]}])
    after = built(tmp_path / "after", [{"entity_id": "a", "name": "a", "aliases": ["y", None]}])
    assert KnowledgeBaseChanges.between(before, after).edited_ids.to_pylist() == ["a"]
    assert not len(KnowledgeBaseChanges.between(before, before).edited_ids)

"""Entities with several names in the trie, such as names in other languages."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest
from support.tables import edit_manifest, make_tokenizer
from support.trouble import damage
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.changes import KnowledgeBaseChanges
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.update import update_knowledge_base

pytestmark = pytest.mark.unit

ENTITIES = pa.table(
    {
        "entity_id": ["Q1", "Q2", "Q3"],
        "name": ["Germany", "Bear", "Bar"],
        "aliases": [["FRG", "Deutschland"], None, None],
        "other_names": [["Deutschland", " Bar ", "Germany"], ["B\u00e4r", "\x07"], None],
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def built(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    build_knowledge_base(ENTITIES, tokenizer, tmp_path / "kb", KnowledgeBaseSettings())
    return tmp_path / "kb"


def ids_of_name(knowledge_base: KnowledgeBase, tokenizer: PreTrainedTokenizerFast, name: str) -> list[str]:
    node = knowledge_base.trie.walk(tokenizer(name, add_special_tokens=False)["input_ids"])
    rows = knowledge_base.entities_of_name(knowledge_base.trie.name_index(node))
    return [knowledge_base.entity_id(row) for row in rows]


def test_other_names_are_names_of_the_trie_that_resolve_to_their_entity(
    built: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    knowledge_base = KnowledgeBase.open(built, verify=True)

    assert knowledge_base.trie.num_names == 5  # Germany, Deutschland, Bar, Bear, Bär
    assert ids_of_name(knowledge_base, tokenizer, "Deutschland") == ["Q1"]
    assert ids_of_name(knowledge_base, tokenizer, "Germany") == ["Q1"]
    assert ids_of_name(knowledge_base, tokenizer, "Bar") == ["Q3", "Q1"]  # that of the main name first
    row = knowledge_base.row_of_entity("Q1")
    assert row is not None
    names = knowledge_base.names_of_row(row)
    assert {tokenizer.decode(knowledge_base.name_tokens(name)) for name in names} == {"Germany", "Deutschland", "Bar"}
    assert tokenizer.decode(knowledge_base.name_tokens(names[0])) == "Germany"


def test_other_names_are_aliases_too(built: Path) -> None:
    table = KnowledgeBase.open(built).table()

    aliases = dict(zip(table["entity_id"].to_pylist(), table["aliases"].to_pylist(), strict=True))
    assert aliases["Q1"] == ["FRG", "Deutschland", "Bar", "Germany"]
    assert not aliases["Q3"]


def test_an_unusable_other_name_is_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report = build_knowledge_base(ENTITIES, tokenizer, tmp_path / "kb", KnowledgeBaseSettings())

    assert report.num_other_names == 3
    assert "left out 1 of 5 other names" in caplog.text
    assert not (report.num_skipped)


def test_other_names_must_be_lists(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    place = ENTITIES.column_names.index("other_names")
    entities = ENTITIES.set_column(place, "other_names", pa.array([1, 2, 3]))

    with pytest.raises(InputError, match="other_names"):
        build_knowledge_base(entities, tokenizer, tmp_path / "kb", KnowledgeBaseSettings())


def test_damaged_other_names_are_refused(built: Path) -> None:
    damage(built / "other_names.arrow", [(-400, 7), (40, 9), (300, 1)])

    with pytest.raises(ArtifactError, match="build"):
        KnowledgeBase.open(built)


def test_other_names_that_are_missing_from_the_manifest_are_refused(built: Path) -> None:
    edit_manifest(built, other_names_sha256=None)

    with pytest.raises(ArtifactError, match="build it again"):
        KnowledgeBase.open(built, verify=True)


def test_updates_and_comparisons_of_knowledge_bases_with_other_names_are_refused(
    built: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    knowledge_base = KnowledgeBase.open(built)
    changes = pa.table({"entity_id": ["Q3"], "name": ["Bars"]})

    with pytest.raises(ConfigurationError, match="build the knowledge base again"):
        update_knowledge_base(str(built), changes, tokenizer, tmp_path / "update", KnowledgeBaseSettings())
    with pytest.raises(ConfigurationError, match="leave previous out"):
        KnowledgeBaseChanges.between(knowledge_base, knowledge_base)

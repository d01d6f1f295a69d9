"""Columns of entities: what a table may give, what comes back, and what earlier releases have stored."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tables import edit_manifest, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.knowledge_base.build import build_knowledge_base, read_entities
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS, STORED_SCHEMA, earlier_schema
from gemel_engine.knowledge_base.store import Entity, KnowledgeBase
from gemel_engine.knowledge_base.update import local_knowledge_base, update_knowledge_base
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256

STRICT = KnowledgeBaseSettings()
COLUMNS = {
    "entity_id": ["Q1", "Q2", "Q3"],
    "name": ["Bear", "Bär", "Zoo"],
    "language": ["en", "de", None],
    "aliases": [["bruin", "Zoo", "bruin"], ["bruin", "Bär"], None],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def built(tokenizer: PreTrainedTokenizerFast, directory: Path, **columns: object) -> dict[str, Entity]:
    pq.write_table(pa.table(COLUMNS | columns), directory / "entities.parquet")
    build_knowledge_base(read_entities(str(directory / "entities.parquet")), tokenizer, directory / "kb", STRICT)
    knowledge_base = KnowledgeBase.open(directory / "kb", verify=True)
    found = map(knowledge_base.entity, range(knowledge_base.num_entities))
    return {entity.entity_id: entity for entity in found}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a.png", None, "c.png"], [("a.png",), (), ("c.png",)]),
        ([["a.png", "b.png"], [], None], [("a.png", "b.png"), (), ()]),
        (pa.array([b"a.png", None, b"c.png"]), [("a.png",), (), ("c.png",)]),
        (pa.array(["a.png", None, "a.png"]).dictionary_encode(), [("a.png",), (), ("a.png",)]),
        (pa.nulls(3), [(), (), ()]),
    ],
)
def test_an_entity_has_one_picture_or_several(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, given: object, expected: list[tuple[str, ...]]
) -> None:
    entities = built(tokenizer, tmp_path, image_uri=given)
    assert [entities[f"Q{number}"].image_uris for number in (1, 2, 3)] == expected
    assert entities["Q1"].aliases == ("bruin", "Zoo", "bruin")
    assert [entities[f"Q{number}"].language for number in (1, 2, 3)] == ["en", "de", None]


def test_pictures_in_a_table_come_in_lists_too(tmp_path: Path) -> None:
    one = {"image_bytes": [b"a", None], "image_features": [[1.0, 2.0], None]}
    several = {"image_bytes": [[b"a"], None], "image_features": [[[1.0, 2.0]], None]}
    of_hugging_face = {"image_bytes": [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "b.png"}]}
    for number, columns in enumerate((one, several, of_hugging_face)):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    tables = [
        parquet.open_table(str(tmp_path / f"{number}.parquet"), ENTITY_COLUMNS).read().to_pylist()
        for number in range(3)
    ]
    assert tables[0] == tables[1] == [
        {"image_bytes": [b"a"], "image_features": [[1.0, 2.0]]},
        {"image_bytes": None, "image_features": None},
    ]  # fmt: skip
    assert tables[2] == [{"image_bytes": [b"a"], "image_uri": None}, {"image_bytes": None, "image_uri": ["b.png"]}]
    pq.write_table(pa.table({"image_uri": [["a.png"], None], **of_hugging_face}), tmp_path / "both.parquet")
    both = parquet.open_table(str(tmp_path / "both.parquet"), ENTITY_COLUMNS).read().to_pylist()
    assert [row["image_uri"] for row in both] == [["a.png"], ["b.png"]]
    pq.write_table(pa.table({"image_uri": [[["a.png"]]]}), tmp_path / "deep.parquet")
    with pytest.raises(InputError, match="must be string or list of strings"):
        parquet.open_table(str(tmp_path / "deep.parquet"), ENTITY_COLUMNS)


def test_a_column_that_nothing_reads_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        built(tokenizer, tmp_path, image_features=[[1.0], None, None])
        assert not caplog.messages
        built(tokenizer, tmp_path / "..", alias=["a", "b", "c"])
    (message,) = caplog.messages
    assert "columns that nothing reads: alias; the columns of entities are entity_id, name, " in message
    assert "image_features" in message


def test_repeated_aliases_and_those_like_names_are_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    report = build_knowledge_base(pa.table(COLUMNS), tokenizer, tmp_path / "kb", STRICT)
    assert (report.num_repeated_aliases, report.num_aliases_like_names) == (2, 1)
    report = build_knowledge_base(pa.table(COLUMNS).drop_columns("aliases"), tokenizer, tmp_path / "without", STRICT)
    assert (report.num_repeated_aliases, report.num_aliases_like_names) == (0, 0)


def as_earlier_release(directory: Path, image_uri: list[str | None]) -> None:
    """Write entities again as releases did that knew one picture and no language."""
    path = directory / "entities.arrow"
    table = pa.ipc.open_file(path).read_all().drop_columns("language")
    table = table.set_column(table.column_names.index("image_uri"), "image_uri", pa.array(image_uri, pa.large_string()))
    schema = earlier_schema(STORED_SCHEMA)
    with pa.ipc.new_file(path, schema) as writer:
        writer.write_table(table.cast(schema).combine_chunks())
    edit_manifest(directory, entities_sha256=file_sha256(path))


def test_a_knowledge_base_without_languages_is_read_and_updated(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    built(tokenizer, tmp_path)
    as_earlier_release(tmp_path / "kb", ["a.png", None, "c.png"])
    knowledge_base = KnowledgeBase.open(tmp_path / "kb", verify=True)
    entities = [knowledge_base.entity(row) for row in range(3)]
    assert [entity.image_uris for entity in entities] == [("a.png",), (), ("c.png",)]
    assert {entity.language for entity in entities} == {None}
    changes = pa.table({"entity_id": ["Q1"], "name": ["Bears"], "language": ["en"]})
    update_knowledge_base(str(tmp_path / "kb"), changes, tokenizer, tmp_path / "update", STRICT)
    merged = KnowledgeBase.open(local_knowledge_base(str(tmp_path / "update"), tmp_path / "cache"), verify=True)
    after = {entity.entity_id: entity for entity in map(merged.entity, range(3))}
    before = {entity.entity_id: entity for entity in entities}
    assert (after["Q1"].language, after["Q1"].name) == ("en", "Bears")
    assert [after[key].image_uris for key in before] == [before[key].image_uris for key in before]


@pytest.mark.parametrize(("number", "offset"), [(0, -4), (1, 1 << 30), (1, -5), (3, 0), (3, 1 << 30)])
def test_a_list_outside_the_file_is_an_error_where_it_is_read(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, number: int, offset: int
) -> None:
    built(tokenizer, tmp_path)
    path = tmp_path / "kb" / "entities.arrow"
    with pa.memory_map(str(path)) as file:
        offsets = pa.ipc.open_file(file).get_batch(0)["aliases"].buffers()[1].to_pybytes()
    content = bytearray(path.read_bytes())
    place = content.index(offsets) + np.dtype(np.int32).itemsize * number
    content[place : place + 4] = offset.to_bytes(4, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        KnowledgeBase.open(tmp_path / "kb", verify=True)
    with pytest.raises(ArtifactError, match=r"build .* again"):
        aliases_of(tmp_path / "kb")


def aliases_of(directory: Path) -> list[tuple[str, ...]]:
    knowledge_base = KnowledgeBase.open(directory)
    return [knowledge_base.entity(row).aliases for row in range(knowledge_base.num_entities)]

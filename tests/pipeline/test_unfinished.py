"""Builds, updates and merges of knowledge bases that end too early, and those that follow them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.names import ENTITY_NAMES
from support.s3_server import S3Server
from transformers import PreTrainedTokenizerFast

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.index import open_evidence
from gemel_engine.evidence.update import local_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.pipeline import knowledge_bases
from gemel_engine.pipeline.entity_vectors import EntityEncoders, encode_entities
from gemel_engine.pipeline.knowledge_bases import build, compact, update
from gemel_engine.storage import s3

STRICT, NONE = KnowledgeBaseSettings(), EntityEncoders()


class Killed(BaseException):
    """What ends a command in these tests."""


def killed(*_: object, **__: object) -> None:
    raise Killed


def write(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def base_of(directory: Path, tokenizer: PreTrainedTokenizerFast, description: str, x: float) -> str:
    count = len(ENTITY_NAMES)
    ids, features = [f"Q{n}" for n in range(count)], [[x, float(n)] for n in range(count)]
    entities = write(
        directory / f"{description}.parquet",
        entity_id=ids, name=ENTITY_NAMES, description=[description] * count, image_features=features,
    )  # fmt: skip
    build(entities, str(directory / description), tokenizer, STRICT, NONE)
    return str(directory / description)


@pytest.mark.parametrize("encoders", [NONE, None])
def test_what_a_killed_upload_left_is_removed_before_the_next(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch,
    encoders: EntityEncoders | None,
) -> None:  # fmt: skip
    entities = write(tmp_path / "e.parquet", entity_id=["a"], name=["bear"], other_names=[["ours"]])
    output = f"{s3_server.uri}/killed"
    copy = s3.copy_from_local

    def copy_until_the_last(path: Path, uri: str) -> None:
        if uri == f"{output}/knowledge_base.json":
            raise Killed
        copy(path, uri)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "copy_from_local", copy_until_the_last)
        with pytest.raises(Killed):
            build(entities, output, tokenizer, STRICT, encoders)
    assert "entities.arrow" in storage.list_files(output)
    build(entities, output, tokenizer, STRICT, encoders)
    local = local_knowledge_base(output, tmp_path / "cache")
    assert KnowledgeBase.open(local, verify=True).num_entities == 1
    assert (open_evidence(local, verify=True) is None) == (encoders is None)
    assert not any(".unfinished" in name for name in storage.list_files(output))
    storage.remove_tree(output)
    storage.write_bytes(f"{output}/evidence/of-another", b"")
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        build(entities, output, tokenizer, STRICT, encoders)
    storage.remove_tree(output)


@pytest.mark.parametrize("is_local", [True, False])
def test_what_was_left_beside_a_finished_knowledge_base_is_removed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch,
    is_local: bool,
) -> None:  # fmt: skip
    entities = write(tmp_path / "e.parquet", entity_id=["a"], name=["bear"], image_features=[[1.0, 2.0]])
    output = str(tmp_path / "kb") if is_local else f"{s3_server.uri}/finished"
    publish = storage.publish_directory

    def publish_and_end(directory: Path, uri: str, last: str) -> None:
        publish(directory, uri, last)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish_directory", publish_and_end)
        with pytest.raises(Killed):
            build(entities, output, tokenizer, STRICT, NONE)
    assert any("evidence-parts" in name for name in storage.list_files(output))
    with pytest.raises(ConfigurationError, match="was finished by a command that was killed"):
        build(entities, output, tokenizer, STRICT, NONE)
    assert {name.partition("/")[0] for name in storage.list_files(output)} == {
        "entities.arrow", "evidence", "knowledge_base.json", "trie",
    }  # fmt: skip
    storage.remove_tree(output)


def test_a_killed_merge_is_no_knowledge_base_without_evidence(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(tmp_path, tokenizer, "base", 1.0)
    changes = write(tmp_path / "c.parquet", entity_id=["new"], name=["wolf"])
    update(base, changes, tmp_path / "up", tokenizer, STRICT, NONE)
    with monkeypatch.context() as patch:
        patch.setattr("gemel_engine.evidence.update.complete_evidence", killed)
        patch.setattr(knowledge_bases, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))  # cleans nothing up
        with pytest.raises(Killed):
            compact(str(tmp_path / "up"), tmp_path / "compact")
    assert not (tmp_path / "compact/knowledge_base.json").exists()
    compact(str(tmp_path / "up"), tmp_path / "compact")
    evidence = open_evidence(tmp_path / "compact", verify=True)
    assert evidence is not None
    assert evidence.manifest.num_pictures == len(ENTITY_NAMES)


def test_an_update_does_not_go_on_with_the_vectors_of_another_base(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (base_of(tmp_path, tokenizer, name, x) for name, x in (("first", 1.0), ("second", 2.0)))
    changes = write(tmp_path / "c.parquet", entity_id=["Q1"], name=["wolf"])
    for step in ("write_update_evidence", "encode_entities"):
        output = tmp_path / step
        with monkeypatch.context() as patch:
            patch.setattr(knowledge_bases, step, killed)
            with pytest.raises(Killed):
                update(first, changes, output, tokenizer, STRICT, NONE)
    with pytest.raises(ConfigurationError, match="unfinished run with another base: remove it"):
        update(second, changes, tmp_path / "write_update_evidence", tokenizer, STRICT, NONE)
    described: list[object] = []

    def encode_and_note(uri: str, *arguments: object) -> object:
        described.extend(pq.read_table(uri)["description"].to_pylist())
        return encode_entities(uri, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(knowledge_bases, "encode_entities", encode_and_note)
    update(second, changes, tmp_path / "encode_entities", tokenizer, STRICT, NONE)
    assert described == ["second"]


def test_an_update_embeds_nothing_of_a_damaged_base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    base = base_of(tmp_path, tokenizer, "described", 1.0)
    path = Path(base, "entities.arrow")
    path.write_bytes(path.read_bytes().replace(b"described", b"forgotten"))
    changes = write(tmp_path / "c.parquet", entity_id=["Q1"], name=["wolf"])
    with pytest.raises(ArtifactError, match="damaged"):
        update(base, changes, tmp_path / "up", tokenizer, STRICT, NONE)

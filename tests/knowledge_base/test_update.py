"""Updates of knowledge bases: merged they are what is built from the changed table, and damaged ones are refused."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.s3_server import S3Server
from support.tables import SKIP, edit_manifest, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gemel_engine import storage
from gemel_engine.cli.main import main
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.columns import ENTITY_SCHEMA
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.update import (
    UpdateReport,
    compact_knowledge_base,
    local_knowledge_base,
    update_knowledge_base,
)
from gemel_engine.storage.manifest import file_sha256

STRICT = KnowledgeBaseSettings()
ENTITIES = pa.Table.from_pylist(
    [
        {"entity_id": "Q1", "name": "Bear", "description": "an animal", "popularity": 3.0, "aliases": ["bruin"]},
        {"entity_id": "Q2", "name": "Bear Island", "description": "an island", "popularity": 1.0},
        {"entity_id": "Q3", "name": "Bear", "description": "a series", "popularity": 2.0},
        {"entity_id": "Q4", "name": "Zoé", "description": None, "popularity": None},
    ],
    schema=ENTITY_SCHEMA,
)
CHANGES = pa.table(
    {
        "entity_id": ["Q9", "Q2", "Q4"],
        "name": ["Bears", " Bear\n", None],
        "retired": [False, None, True],
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def base(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    build_knowledge_base(ENTITIES, tokenizer, tmp_path / "kb", STRICT)
    return tmp_path / "kb"


@pytest.fixture
def update(base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    update_knowledge_base(str(base), CHANGES, tokenizer, tmp_path / "update", STRICT)
    return tmp_path / "update"


def records(directory: Path) -> pa.Table:
    """All entities of a knowledge base that was found sound."""
    return KnowledgeBase.open(directory, verify=True).table()


def assert_same_knowledge_base(left: Path, right: Path) -> None:
    """Trie and manifest to the byte, but for the bytes of the Arrow file, which may lay out the same records anew."""
    assert records(left).equals(records(right))
    for file in sorted(path.name for path in (right / "trie").iterdir()):
        assert (left / "trie" / file).read_bytes() == (right / "trie" / file).read_bytes(), file
    manifests = [json.loads((directory / "knowledge_base.json").read_text()) for directory in (left, right)]
    ours, theirs = ({key: value for key, value in item.items() if key != "entities_sha256"} for item in manifests)
    assert ours == theirs


def test_entities_are_added_renamed_and_retired(update: Path, base: Path, tmp_path: Path) -> None:
    merged = local_knowledge_base(str(update), tmp_path / "cache")
    found = {row["entity_id"]: row for row in records(merged).to_pylist()}
    assert {entity_id: row["name"] for entity_id, row in found.items()} == {
        "Q1": "Bear", "Q2": "Bear", "Q3": "Bear", "Q9": "Bears",
    }  # fmt: skip
    assert found["Q2"]["description"] == "an island"  # the changes had no such column
    assert found["Q1"]["aliases"] == ["bruin"]
    assert found["Q9"]["description"] is None
    knowledge_base = KnowledgeBase.open(merged)
    (bear,) = knowledge_base.names_of_entities(["Q2"])
    assert bear is not None
    rows = knowledge_base.entities_of_name(bear)
    assert [knowledge_base.entity(row).entity_id for row in rows] == ["Q1", "Q3", "Q2"]
    assert records(base).num_rows == 4  # the base is as it was
    assert local_knowledge_base(str(base)) == base


def test_columns_that_the_changes_have_replace_what_was_there(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    changes = pa.table({"entity_id": ["Q1"], "name": ["Bear"], "popularity": [0.5], "aliases": pa.array([["b"]])})
    report = update_knowledge_base(str(base), changes, tokenizer, tmp_path / "update", STRICT)
    assert report == UpdateReport(num_added=0, num_replaced=1, num_retired=0, num_skipped={})
    found = {
        row["entity_id"]: row for row in records(local_knowledge_base(str(tmp_path / "update"), tmp_path)).to_pylist()
    }
    assert (found["Q1"]["popularity"], found["Q1"]["aliases"]) == (0.5, ["b"])
    assert found["Q1"]["description"] == "an animal"


def test_ids_alone_are_enough_to_retire(base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    changes = pa.table({"entity_id": ["Q2", "Q1"], "retired": [True, True]})
    update_knowledge_base(str(base), changes, tokenizer, tmp_path / "update", STRICT)
    left = records(local_knowledge_base(str(tmp_path / "update"), tmp_path))
    assert sorted(left["entity_id"].to_pylist()) == ["Q3", "Q4"]


def test_merging_happens_once(update: Path, base: Path, tmp_path: Path) -> None:
    merged = local_knowledge_base(str(update), tmp_path / "cache")
    written = (merged / "entities.arrow").stat().st_mtime_ns
    assert local_knowledge_base(str(update), tmp_path / "cache") == merged
    assert (merged / "entities.arrow").stat().st_mtime_ns == written
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == [merged]
    base.rename(tmp_path / "elsewhere")  # other nodes may not have merged it yet
    with pytest.raises(ArtifactError, match="there is no knowledge base at"):
        local_knowledge_base(str(update), tmp_path / "cache")


IDS = st.sampled_from([f"Q{number}" for number in range(12)])
NAMES = st.sampled_from(["Bear", "Bear Island", "Bears", "Zoé", "Zoo", "island", "Bear Zoo", "é", "a b"])
POPULARITY = st.none() | st.sampled_from([0.5, 1.0, 2.0])


@st.composite
def tables(draw: st.DrawFn) -> tuple[pa.Table, pa.Table]:
    """Entities, and changes that are possible for them."""
    ids = draw(st.lists(IDS, min_size=1, max_size=8, unique=True))
    entities = [
        {"entity_id": entity_id, "name": draw(NAMES), "popularity": draw(POPULARITY), "description": draw(NAMES)}
        for entity_id in ids
    ]
    changed = draw(st.lists(IDS, min_size=1, max_size=8, unique=True))
    changes = [
        {
            "entity_id": entity_id,
            "name": draw(NAMES),
            "popularity": draw(POPULARITY),
            "description": draw(NAMES),
            "retired": entity_id in ids and draw(st.booleans()),
        }
        for entity_id in changed
    ]
    if {row["entity_id"] for row in changes if row["retired"]} == set(ids):
        changes[0]["retired"] = False
    columns = [*draw(st.sets(st.sampled_from(["popularity", "description"]))), "entity_id", "name", "retired"]
    schema = pa.schema([*ENTITY_SCHEMA, pa.field("retired", pa.bool_())])
    return pa.Table.from_pylist(entities, ENTITY_SCHEMA), pa.Table.from_pylist(changes, schema).select(columns)


def applied(entities: pa.Table, changes: pa.Table) -> pa.Table:
    """The changed table, row by row."""
    rows: dict[str, dict[str, Any]] = {row["entity_id"]: row for row in entities.to_pylist()}
    for change in changes.to_pylist():
        if change.pop("retired"):
            del rows[change["entity_id"]]
        else:
            rows[change["entity_id"]] = rows.get(change["entity_id"], {}) | change
    return pa.Table.from_pylist(list(rows.values()), ENTITY_SCHEMA)


@settings(max_examples=50)
@given(case=tables())
def test_an_update_merged_equals_a_knowledge_base_built_anew(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, case: tuple[pa.Table, pa.Table]
) -> None:
    entities, changes = case
    directory = tmp_path_factory.mktemp("any")
    build_knowledge_base(entities, tokenizer, directory / "kb", STRICT)
    update_knowledge_base(str(directory / "kb"), changes, tokenizer, directory / "update", STRICT)
    build_knowledge_base(applied(entities, changes), tokenizer, directory / "anew", STRICT)
    merged = local_knowledge_base(str(directory / "update"), directory / "cache")
    assert_same_knowledge_base(merged, directory / "anew")


def test_an_update_may_have_an_update_as_its_base(
    update: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    changes = pa.table({"entity_id": ["Q9", "Q4"], "name": [None, "Zoo"], "retired": [True, False]})
    update_knowledge_base(str(update), changes, tokenizer, tmp_path / "second", STRICT)
    anew = applied(applied(ENTITIES, CHANGES), changes)
    build_knowledge_base(anew, tokenizer, tmp_path / "anew", STRICT)
    assert_same_knowledge_base(local_knowledge_base(str(tmp_path / "second"), tmp_path / "cache"), tmp_path / "anew")
    compact_knowledge_base(str(tmp_path / "second"), tmp_path / "compact")
    assert_same_knowledge_base(tmp_path / "compact", tmp_path / "anew")


def test_a_long_chain_of_updates_is_merged_without_recursion(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ARTIFACT_CACHE", tmp_path / "cache")
    newest = base
    for number in range(30):
        changes = pa.table({"entity_id": [f"N{number}"], "name": [f"Bear {number}"]})
        update_knowledge_base(str(newest), changes, tokenizer, tmp_path / f"update{number}", STRICT)
        newest = tmp_path / f"update{number}"
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 100)
        merged = local_knowledge_base(str(newest), tmp_path / "other")
    finally:
        sys.setrecursionlimit(before)
    assert KnowledgeBase.open(merged, verify=True).num_entities == 30 + len(ENTITIES)


def test_a_compacted_update_needs_no_base(update: Path, base: Path, tmp_path: Path) -> None:
    report = compact_knowledge_base(str(update), tmp_path / "compact")
    assert (report.num_entities, report.num_names) == (4, 2)
    shutil.rmtree(base)
    shutil.rmtree(update)
    assert local_knowledge_base(str(tmp_path / "compact")) == tmp_path / "compact"
    assert records(tmp_path / "compact").num_rows == 4
    with pytest.raises(ConfigurationError, match="no update but a knowledge base: there is nothing to merge"):
        compact_knowledge_base(str(tmp_path / "compact"), tmp_path / "again")


def test_bases_and_updates_may_lie_in_s3(
    base: Path, s3_server: S3Server, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    address = f"{s3_server.uri}/updates"
    upload(base, f"{address}/kb")
    update_knowledge_base(f"{address}/kb", CHANGES, tokenizer, tmp_path / "update", STRICT)
    upload(tmp_path / "update", f"{address}/update")
    shutil.rmtree(base)
    merged = local_knowledge_base(f"{address}/update", tmp_path / "cache")
    assert sorted(records(merged)["entity_id"].to_pylist()) == ["Q1", "Q2", "Q3", "Q9"]
    storage.remove_tree(address)


def upload(directory: Path, address: str) -> None:
    for file in filter(Path.is_file, directory.rglob("*")):
        storage.write_bytes(f"{address}/{file.relative_to(directory)}", file.read_bytes())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"entity_id": ["Q1", "Q7", "Q8"], "retired": [True] * 3},
            r"2 retired entities are not .* such as \['Q7', 'Q8'\]",
        ),
        (
            {"entity_id": ["Q1", "Q5"], "name": ["Bear", ""]},
            r"1 of 2 names are unusable, the first row 1 \('Q5'\): empty",
        ),
        ({"entity_id": ["Q1", "Q4"], "retired": [False, True]}, r"the first row 0 \('Q1'\): empty"),
        ({"entity_id": ["Q5"], "name": ["0123456789" * 4]}, "more than 32 tokens"),
        ({"entity_id": ["Q1", "Q1"], "name": ["Bear", "Zoo"]}, "1 entity ids occur more"),
        ({"entity_id": ["Q1", ""], "name": ["Bear", "Zoo"]}, "row 1 has no entity_id"),
        ({"name": ["Bear"]}, "no column 'entity_id'"),
        ({"entity_id": ["Q1"], "name": ["Bear"], "retired": ["no"]}, "column 'retired' is of type string"),
        ({"entity_id": ["Q1", "Q2", "Q3", "Q4"], "retired": [True] * 4}, "retire all entities .* keep at least one"),
        ({"entity_id": pa.array([], pa.string()), "retired": pa.array([], pa.bool_())}, "there are no entities"),
    ],
)
def test_changes_that_cannot_be_made_are_refused(
    base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        update_knowledge_base(str(base), pa.table(columns), tokenizer, tmp_path / "update", STRICT)
    assert not (tmp_path / "update").exists()


def test_unusable_names_may_be_skipped(base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    changes = pa.table({"entity_id": ["Q1", "Q2", "Q8"], "name": ["a\nb", "Bears", ""]})
    report = update_knowledge_base(str(base), changes, tokenizer, tmp_path / "update", SKIP)
    assert report == UpdateReport(0, 1, 0, {"control or line-separating character": 1, "empty": 1})
    found = records(local_knowledge_base(str(tmp_path / "update"), tmp_path)).to_pylist()
    assert {row["entity_id"]: row["name"] for row in found} == {"Q1": "Bear", "Q2": "Bears", "Q3": "Bear", "Q4": "Zoé"}


def test_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="built with another tokenizer"):
        update_knowledge_base(str(base), CHANGES, make_tokenizer(265), tmp_path / "update", STRICT)


def test_a_directory_in_use_is_refused(base: Path, update: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        update_knowledge_base(str(base), CHANGES, tokenizer, base, STRICT)
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        compact_knowledge_base(str(update), base)


def edit_changes(update: Path, edit: Callable[[pa.Table], pa.Table], *, forge_checksum: bool = True) -> None:
    path = update / "changes.arrow"
    table = edit(pa.ipc.open_file(path).read_all())
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    if forge_checksum:
        edit_manifest(update, changes_sha256=file_sha256(path))


def with_values(name: str, values: list[object]) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return edit


def edit_base(update: Path, **values: object) -> None:
    base = json.loads((update / "knowledge_base.json").read_text())["base"]
    edit_manifest(update, base=base | values)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no changes": lambda update: (update / "changes.arrow").unlink(),
    "truncated": lambda update: (update / "changes.arrow").write_bytes((update / "changes.arrow").read_bytes()[:-99]),
    "other bytes": lambda update: edit_changes(update, with_values("name", ["A", "B", ""]), forge_checksum=False),
    "column missing": lambda update: edit_changes(update, lambda table: table.drop_columns("is_retired")),
    "entity twice": lambda update: edit_changes(update, with_values("entity_id", ["Q1", "Q1", "Q4"])),
    "null id": lambda update: edit_changes(update, with_values("entity_id", ["Q1", None, "Q4"])),
    "null name": lambda update: edit_changes(update, with_values("name", ["A", None, ""])),
    "null for a token": lambda update: edit_changes(update, with_values("token_ids", [[3], [None], []])),
    "name without tokens": lambda update: edit_changes(update, with_values("token_ids", [[3], [], []])),
    "tokens of a retired entity": lambda update: edit_changes(update, with_values("token_ids", [[3], [4], [5]])),
    "no rows": lambda update: edit_changes(update, lambda table: table.slice(0, 0)),
    "unknown key": lambda update: edit_manifest(update, more=1),
    "kept column": lambda update: edit_manifest(update, kept_columns=["name"]),
    "number for an address": lambda update: edit_base(update, address=7),
    "no base": lambda update: edit_manifest(update, base=None),
    "itself as its base": lambda update: edit_base(update, address=str(update)),
    "base of another checksum": lambda update: edit_base(update, sha256="0" * 64),
    "nowhere": lambda update: edit_base(update, address="/nowhere"),
    "another tokenizer": lambda update: edit_manifest(update, tokenizer_fingerprint="0"),
    "format version": lambda update: edit_manifest(update, format_version=99),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_update_is_refused(update: Path, tmp_path: Path, damage: str) -> None:
    DAMAGES[damage](update)
    with pytest.raises(ArtifactError):
        local_knowledge_base(str(update), tmp_path / "cache")
    assert not any(path.is_dir() for path in (tmp_path / "cache").glob("*"))


def test_a_base_that_has_gone_or_changed_is_named(
    update: Path, base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    shutil.rmtree(base)
    with pytest.raises(ArtifactError, match=rf"no knowledge base at '{base}': put the base of {update} back"):
        local_knowledge_base(str(update), tmp_path / "cache")
    build_knowledge_base(ENTITIES.slice(1), tokenizer, base, STRICT)
    with pytest.raises(ArtifactError, match="another knowledge base than the update was written for"):
        local_knowledge_base(str(update), tmp_path / "cache")


def test_a_damaged_base_is_refused(update: Path, base: Path, tmp_path: Path) -> None:
    path = base / "entities.arrow"
    path.write_bytes(path.read_bytes().replace(b"an animal", b"a mineral"))
    with pytest.raises(ArtifactError, match="damaged"):
        local_knowledge_base(str(update), tmp_path / "cache")


def test_an_update_is_not_opened_as_a_knowledge_base(update: Path) -> None:
    with pytest.raises(ArtifactError, match="is an update of a knowledge base: open it with `open_knowledge_base`"):
        KnowledgeBase.open(update)
    assert open_knowledge_base(str(update)).num_entities == 4


def test_the_commands(
    base: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pq.write_table(CHANGES, tmp_path / "changes.parquet")

    def run(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["gemel", *map(str, arguments)])
        main()

    run("update-kb", base, tmp_path / "changes.parquet", tmp_path / "update", "--tokenizer", tmp_path / "tokenizer")
    run("compact-kb", tmp_path / "update", tmp_path / "compact")
    assert sorted(records(tmp_path / "compact")["entity_id"].to_pylist()) == ["Q1", "Q2", "Q3", "Q9"]
    with pytest.raises(SystemExit) as stopped:
        run("compact-kb", base, tmp_path / "again")
    assert stopped.value.code == ConfigurationError.exit_code
    (tmp_path / "changes").mkdir()
    pq.write_table(CHANGES, tmp_path / "changes/a.parquet")
    pq.write_table(pa.table({"entity_id": ["Q3"], "retired": [True]}), tmp_path / "changes/b.parquet")
    run("update-kb", base, tmp_path / "changes", tmp_path / "second", "--tokenizer", tmp_path / "tokenizer")
    described = pa.table({"entity_id": ["Q1"], "name": ["Bear"], "description": ["big"]})
    pq.write_table(described, tmp_path / "changes/c.parquet")
    with pytest.raises(SystemExit) as stopped:
        run("update-kb", base, tmp_path / "changes", tmp_path / "third", "--tokenizer", tmp_path / "tokenizer")
    assert stopped.value.code == InputError.exit_code
    assert "c.parquet', only one has the columns description: add" in capsys.readouterr().err

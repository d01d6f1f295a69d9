"""Knowledge bases built with a tiny byte-level tokenizer, opened again, and damaged."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tables import SKIP, edit_manifest, fast_tokenizer, make_tokenizer
from support.trouble import damage, forget_checksum, make_endless
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gemel_engine.cli.main import main
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import Entity, KnowledgeBase
from gemel_engine.storage.manifest import file_sha256
from gemel_engine.tokenizer import tokenizer_fingerprint

# In no order; Q4 and Q2 share the name of Q1, and "Bear" is a prefix of it.
ENTITIES = pa.table(
    {
        "entity_id": ["Q4", "Q3", "Q1", "Q2", "Q5", "Q0"],
        "name": ["Bear Island", "Bear", " Bear Island", "Bear Island\n", "Bear Island", "Zoe\u0301"],
        "description": ["an island", None, "another", "a film", None, "given name"],
        "popularity": [3, 1, None, 9, 3, 2],
        "aliases": [["BI"], [], None, None, ["Bear I."], None],
        "unknown": [1, 2, 3, 4, 5, 6],
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def built(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    build_knowledge_base(ENTITIES, tokenizer, tmp_path / "kb", KnowledgeBaseSettings())
    return tmp_path / "kb"


def table_of_names(*names: str | None) -> pa.Table:
    return pa.table({"entity_id": [f"Q{row}" for row in range(len(names))], "name": pa.array(names, pa.string())})


def ids_of_name(knowledge_base: KnowledgeBase, name_index: int) -> list[str]:
    return [knowledge_base.entity(row).entity_id for row in knowledge_base.entities_of_name(name_index)]


def test_entities_of_a_name_are_neighbours_by_popularity_then_id(built: Path) -> None:
    knowledge_base = KnowledgeBase.open(built, verify=True)
    shared = knowledge_base.names_of_entities(["Q1"])[0]
    assert shared is not None
    assert ids_of_name(knowledge_base, shared) == ["Q2", "Q4", "Q5", "Q1"]
    assert (knowledge_base.num_entities, knowledge_base.trie.num_names) == (6, 3)


def test_records_come_back_with_normalised_names(built: Path) -> None:
    knowledge_base = KnowledgeBase.open(built)
    entities = {entity.entity_id: entity for entity in map(knowledge_base.entity, range(knowledge_base.num_entities))}
    assert entities["Q1"] == Entity("Q1", "Bear Island", "another", None)
    assert entities["Q4"] == Entity("Q4", "Bear Island", "an island", 3.0, aliases=("BI",))
    assert entities["Q2"] == Entity("Q2", "Bear Island", "a film", 9.0)
    assert entities["Q0"] == Entity("Q0", "Zoé", "given name", 2.0)


def test_names_that_differ_in_characters_without_width_are_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    names = ["Bear", "\ufeffBe\u200bar ", "B\u00adear\u202e", "\u0645\u06cc\u200c\u062e\u0648"]
    build_knowledge_base(table_of_names(*names), tokenizer, tmp_path / "kb", KnowledgeBaseSettings())
    knowledge_base = KnowledgeBase.open(tmp_path / "kb")
    shared, persian = (knowledge_base.names_of_entities([entity_id])[0] for entity_id in ("Q1", "Q3"))
    assert shared is not None
    assert persian is not None
    assert ids_of_name(knowledge_base, shared) == ["Q0", "Q1", "Q2"]
    assert knowledge_base.entity(knowledge_base.entities_of_name(persian)[0]).name == names[3]
    with pytest.raises(InputError, match="row 0 \\('Q0'\\): empty"):
        build_knowledge_base(table_of_names("\u200b\u2060"), tokenizer, tmp_path / "no", KnowledgeBaseSettings())


def test_optional_columns_are_carried_and_unknown_ones_left_out(built: Path) -> None:
    stored = pa.ipc.open_file(built / "entities.arrow").read_all().to_pylist()
    assert {row["entity_id"]: row["aliases"] for row in stored}["Q5"] == ["Bear I."]
    assert {row["image_uri"] for row in stored} == {None}
    assert "unknown" not in stored[0]


def test_unknown_ids_have_no_name(built: Path) -> None:
    knowledge_base = KnowledgeBase.open(built)
    names = knowledge_base.names_of_entities(["Q", "Q1", "Q11", "Q2", "Q9", "\U0001f43b", ""])
    assert [name is None for name in names] == [True, False, True, False, True, True, True]


def test_name_tokens_are_those_of_the_tokenizer(built: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    knowledge_base = KnowledgeBase.open(built)
    for name_index in range(knowledge_base.trie.num_names):
        name = knowledge_base.entity(knowledge_base.entities_of_name(name_index)[0]).name
        assert knowledge_base.name_tokens(name_index) == tokenizer(name)["input_ids"]


def test_the_report_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    table = table_of_names("Bear", "", "Bear", None, "a\nb", "Bear Island")
    report = build_knowledge_base(table, tokenizer, tmp_path / "kb", SKIP)
    assert (report.num_entities, report.num_names) == (3, 2)
    assert report.longest_name == len(tokenizer("Bear Island")["input_ids"])
    assert report.num_skipped == {"empty": 2, "control or line-separating character": 1}


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufffd"), max_size=6)


@settings(max_examples=30)
@given(names=st.lists(WORDS, min_size=1, max_size=20))
def test_any_table_of_names_comes_back(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, names: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("any") / "kb"
    report = build_knowledge_base(table_of_names("Bear", *names), tokenizer, directory, SKIP)
    knowledge_base = KnowledgeBase.open(directory, verify=True)
    assert report.num_skipped.keys() <= {"empty", "prompt marker"}
    assert len({knowledge_base.entity(row).name for row in range(report.num_entities)}) == report.num_names
    for row in range(report.num_entities):
        entity = knowledge_base.entity(row)
        (name_index,) = knowledge_base.names_of_entities([entity.entity_id])
        assert name_index is not None
        assert row in knowledge_base.entities_of_name(name_index)
        assert tokenizer.decode(knowledge_base.name_tokens(name_index)) == entity.name


BAD_NAMES = [
    (None, "empty"),
    ("", "empty"),
    (" \t\u00a0", "empty"),
    ("Bear\nIsland", "control"),
    ("Bear\x00", "control"),
    ("Bear\u0085Island", "control"),
    ("Bear\u2028Island", "control"),
    ("Bear \ufffd", "replacement"),
    ("[Answer]Bear", "prompt marker"),
    ("Bear [Text]", "prompt marker"),
    ("a [Question] b", "prompt marker"),
    ("0123456789" * 4, "more than 32 tokens"),
]


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_an_unusable_name_is_refused_with_its_row_and_reason(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str | None, reason: str
) -> None:
    with pytest.raises(InputError, match=rf"1 of 2 names are unusable, the first row 1 \('Q1'\): {reason}"):
        build_knowledge_base(table_of_names("Bear", name), tokenizer, tmp_path / "kb", KnowledgeBaseSettings())
    assert not (tmp_path / "kb").exists()


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_an_unusable_name_is_skipped_and_logged(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    name: str | None,
    reason: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        build_knowledge_base(table_of_names(name, "Bear"), tokenizer, tmp_path / "kb", SKIP)
    knowledge_base = KnowledgeBase.open(tmp_path / "kb", verify=True)
    assert knowledge_base.names_of_entities(["Q0", "Q1"]) == [None, 0]
    assert reason in caplog.text


def test_a_table_without_usable_names_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="1 of 1 names are unusable"):
        build_knowledge_base(table_of_names(""), tokenizer, tmp_path / "kb", SKIP)


def test_text_that_spells_a_special_token_stays_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    build_knowledge_base(table_of_names("a <|im_end|> b"), tokenizer, tmp_path / "kb", KnowledgeBaseSettings())
    tokens = KnowledgeBase.open(tmp_path / "kb").name_tokens(0)
    assert tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens) == "a <|im_end|> b"


def test_a_vocabulary_that_spells_its_special_token_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "bear": 2}, unk_token="<unk>"))
    tokenizer = fast_tokenizer(words, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(InputError, match=r"'Q1'\): special token; row 2 \('Q2'\): special token"):
        build_knowledge_base(
            table_of_names("bear", "</s>", "wolf"), tokenizer, tmp_path / "kb", KnowledgeBaseSettings()
        )


def test_a_name_that_the_tokenizer_alters_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "polar": 1, "bear": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = fast_tokenizer(words, unk_token="<unk>")
    with pytest.raises(InputError, match=r"1 of 2 .*'Q1'\): tokens do not decode to the name"):
        build_knowledge_base(
            table_of_names("polar bear", "polar  bear"), tokenizer, tmp_path / "kb", KnowledgeBaseSettings()
        )


def invalid_utf8() -> pa.Array:
    offsets, text = np.array([0, 3], np.int32), b"\xed\xa0\x80"  # a lone surrogate
    return pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(text)])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"entity_id": ["Q1"]}, "no column 'name'"),
        ({"name": ["Bear"]}, "no column 'entity_id'"),
        ({"entity_id": pa.array([], pa.string()), "name": pa.array([], pa.string())}, "no entities"),
        ({"entity_id": ["Q1", None], "name": ["Bear", "Zoo"]}, "row 1 has no entity_id"),
        ({"entity_id": ["", "Q1"], "name": ["Bear", "Zoo"]}, "row 0 has no entity_id"),
        ({"entity_id": ["Q1", "Q2", "Q2"], "name": ["Bear", "Zoo", "Zoe"]}, "1 entity ids occur more .* 'Q2'"),
        ({"entity_id": ["Q1"], "name": invalid_utf8()}, "'name' is not valid large_string .*UTF8"),
        ({"entity_id": ["Q1"], "name": ["Bear"], "popularity": ["much"]}, "'popularity' is not valid double"),
    ],
)
def test_a_table_of_another_kind_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_knowledge_base(pa.table(columns), tokenizer, tmp_path / "kb", SKIP)


def test_a_directory_in_use_is_refused(built: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        build_knowledge_base(ENTITIES, tokenizer, built, SKIP)


def test_a_limit_that_admits_no_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_name_tokens is 0"):
        KnowledgeBaseSettings(max_name_tokens=0)


def test_the_fingerprint_tells_tokenizers_apart_whatever_they_were_used_for(built: Path) -> None:
    tokenizer = make_tokenizer()
    assert KnowledgeBase.open(built).tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    tokenizer(["Bear", "Bear Island"], truncation=True, max_length=2)
    assert KnowledgeBase.open(built).tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert KnowledgeBase.open(built).tokenizer_fingerprint != tokenizer_fingerprint(make_tokenizer(265))


def edit_entities(built: Path, edit: Callable[[pa.Table], pa.Table], num_batches: int = 1) -> None:
    table = edit(pa.ipc.open_file(built / "entities.arrow").read_all())
    with pa.ipc.new_file(built / "entities.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=-(-table.num_rows // num_batches))


def with_column(name: str, values: list[object]) -> Callable[[pa.Table], pa.Table]:
    def edit(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return edit


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda built: (built / "knowledge_base.json").unlink(),
    "format version": lambda built: edit_manifest(built, format_version=99),
    "number of entities": lambda built: edit_manifest(built, num_entities=7),
    "no entities": lambda built: (built / "entities.arrow").unlink(),
    "empty file": lambda built: (built / "entities.arrow").write_bytes(b""),
    "truncated file": lambda built: (built / "entities.arrow").write_bytes(
        (built / "entities.arrow").read_bytes()[:-99]
    ),
    "column missing": lambda built: edit_entities(built, lambda table: table.drop_columns("row_by_id")),
    "two batches": lambda built: edit_entities(built, lambda table: table, num_batches=2),
    "row missing": lambda built: edit_entities(built, lambda table: table.slice(1)),
    "names missing": lambda built: edit_entities(built, with_column("name_index", [0, 1, 1, 1, 1, 1])),
    "null for a name": lambda built: edit_entities(built, with_column("name_index", [0, 1, None, 2, 2, 2])),
    "trie": lambda built: (built / "trie" / "tokens.npy").unlink(),
    "no rows": lambda built: edit_entities(built, lambda table: table.slice(0, 0)),
    "deep manifest": lambda built: (built / "knowledge_base.json").write_text("[" * 100_000),
    "huge number": lambda built: edit_manifest(built, num_entities=10**400),
    "number too long to read": lambda built: (built / "knowledge_base.json").write_text("1" * 10_000),
    "text for a number": lambda built: edit_manifest(built, num_entities="6"),
}

FORGERIES: dict[str, Callable[[pa.Table], pa.Table]] = {
    "no checksum": lambda table: table,
    "names out of order": with_column("name_index", [0, 2, 2, 2, 2, 2]),
    "row twice": with_column("row_by_id", [0, 0, 1, 2, 3, 4]),
    "row beyond the end": with_column("row_by_id", [0, 1, 2, 3, 4, 99]),
    "null name": with_column("name", ["Bear", None, "Zoé", "Zoé", "Zoé", "Zoé"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_knowledge_base_is_refused(built: Path, damage: str) -> None:
    DAMAGES[damage](built)
    with pytest.raises(ArtifactError):
        KnowledgeBase.open(built)


@pytest.mark.parametrize("forgery", FORGERIES)
def test_verifying_finds_what_opening_does_not(built: Path, forgery: str) -> None:
    edit_entities(built, FORGERIES[forgery])
    sha256 = None if forgery == "no checksum" else file_sha256(built / "entities.arrow")
    edit_manifest(built, entities_sha256=sha256)
    KnowledgeBase.open(built)
    with pytest.raises(ArtifactError):
        KnowledgeBase.open(built, verify=True)


def other_knowledge_base(tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    """One with as many names and entities as `built`, and a trie of as many nodes."""
    names = pa.array(["Bear Zoo", "Bear", " Bear Zoo", "Bear Zoo", "Bear Zoo", "Zoe\u0301"])
    entities = ENTITIES.set_column(1, "name", names)
    build_knowledge_base(entities, tokenizer, directory, KnowledgeBaseSettings())
    return directory


@pytest.mark.parametrize("verify", [False, True])
def test_the_trie_of_another_knowledge_base_is_refused(
    built: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, verify: bool
) -> None:
    other = other_knowledge_base(tokenizer, tmp_path / "other")
    shutil.rmtree(built / "trie")
    shutil.copytree(other / "trie", built / "trie")
    with pytest.raises(ArtifactError, match="is the trie of another knowledge base"):
        KnowledgeBase.open(built, verify=verify)


def test_a_knowledge_base_of_an_earlier_release_is_read(built: Path) -> None:
    forget_checksum(built / "knowledge_base.json", format_version=1, also=["trie_sha256"])
    forget_checksum(built / "trie" / "trie.json", format_version=1)
    assert KnowledgeBase.open(built, verify=True).num_entities == 6


@pytest.mark.parametrize("name", ["knowledge_base.json", "entities.arrow", "trie/trie.json", "trie/tokens.npy"])
@pytest.mark.parametrize("verify", [False, True])
def test_a_pipe_in_place_of_a_file_is_refused(built: Path, name: str, verify: bool) -> None:
    make_endless(built / name)
    with pytest.raises(ArtifactError, match="not a regular file"):
        KnowledgeBase.open(built, verify=verify)


def test_a_manifest_without_end_is_not_read(built: Path) -> None:
    with (built / "knowledge_base.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match="larger than"):
        KnowledgeBase.open(built)


def test_one_command_at_a_time_builds_in_a_directory(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    directory, faults = tmp_path / "kb", []

    def build(names: list[str]) -> None:
        entities = pa.table({"entity_id": [f"Q{row}" for row in range(len(names))], "name": names})
        try:
            build_knowledge_base(entities, tokenizer, directory, KnowledgeBaseSettings())
        except ConfigurationError as error:
            faults.append(str(error))

    tables = [[f"{word} {number}" for number in range(2000)] for word in ("Bear", "Zoo")]
    threads = [threading.Thread(target=build, args=(table,)) for table in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (fault,) = faults
    assert "is being written by another command" in fault or "is not an empty directory" in fault
    assert (
        len({name.partition(" ")[0] for name in KnowledgeBase.open(directory, verify=True).table()["name"].to_pylist()})
        == 1
    )


def test_a_claim_that_was_left_behind_is_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / ".being-written").write_text("process 1 on elsewhere")
    with pytest.raises(ConfigurationError, match=r"process 1 on elsewhere.*if that command was killed, remove .*being"):
        build_knowledge_base(ENTITIES, tokenizer, tmp_path, SKIP)


def all_records(knowledge_base: KnowledgeBase) -> list[object]:
    names = range(knowledge_base.trie.num_names)
    entities = [knowledge_base.entity(row) for row in range(knowledge_base.num_entities)]
    return [
        entities,
        knowledge_base.names_of_entities([entity.entity_id for entity in entities]),
        [knowledge_base.entities_of_name(name) for name in names],
    ]


@pytest.mark.parametrize("column", ["entity_id", "name", "description"])
@pytest.mark.parametrize(("number", "offset"), [(0, -8), (3, 1 << 40), (3, -5), (3, 0), (6, 1 << 40)])
def test_a_place_outside_the_file_is_an_error_where_it_is_read(
    built: Path, column: str, number: int, offset: int
) -> None:
    path = built / "entities.arrow"
    with pa.memory_map(str(path)) as file:
        offsets = pa.ipc.open_file(file).get_batch(0)[column].buffers()[1].to_pybytes()
    content = bytearray(path.read_bytes())
    place = content.index(offsets) + 8 * number
    content[place : place + 8] = offset.to_bytes(8, "little", signed=True)
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        KnowledgeBase.open(built, verify=True)
    with pytest.raises(ArtifactError, match=r"build .* again"):
        all_records(KnowledgeBase.open(built))


def test_names_out_of_order_are_an_error_where_one_is_missed(built: Path) -> None:
    edit_entities(built, FORGERIES["names out of order"])
    with pytest.raises(ArtifactError, match="no entity of name 1"):
        all_records(KnowledgeBase.open(built))
    edit_entities(built, FORGERIES["row beyond the end"])
    with pytest.raises(ArtifactError, match="row 99 of the knowledge base is damaged"):
        KnowledgeBase.open(built).names_of_entities(["\U0001f43b"])


@pytest.fixture(scope="module")
def damageable(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    directory = tmp_path_factory.mktemp("damaged") / "kb"
    build_knowledge_base(ENTITIES, tokenizer, directory, KnowledgeBaseSettings())
    return directory


@settings(max_examples=200)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
@example(changes=[(648, 57)])  # the length of a buffer of offsets
def test_damaged_bytes_give_an_error_or_records(damageable: Path, changes: list[tuple[int, int]]) -> None:
    """Not a crash, as Arrow's own reading of strings would: it does not look where they are."""
    path = damageable / "entities.arrow"
    intact = path.read_bytes()
    try:
        if damage(path, changes):
            with pytest.raises(ArtifactError):
                KnowledgeBase.open(damageable, verify=True)
        with suppress(ArtifactError):
            all_records(KnowledgeBase.open(damageable))
    finally:
        path.unlink()  # rather than changed, since it may still be mapped
        path.write_bytes(intact)


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gemel", "build-kb", *map(str, arguments)])
    main()


def test_the_job_reads_a_directory_of_parquet_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "entities").mkdir()
    pq.write_table(ENTITIES.slice(0, 4), tmp_path / "entities" / "a.parquet")
    pq.write_table(ENTITIES.slice(4).select(["entity_id", "name"]), tmp_path / "entities" / "b.parquet")
    run_job(monkeypatch, tmp_path / "entities", tmp_path / "kb", "--tokenizer", tmp_path / "tokenizer")
    knowledge_base = KnowledgeBase.open(tmp_path / "kb", verify=True)
    assert knowledge_base.num_entities == 6
    assert knowledge_base.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)


def test_the_job_exits_with_the_error_s_own_code(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(SystemExit) as exit_info:
        run_job(monkeypatch, tmp_path / "none.parquet", tmp_path / "kb", "--tokenizer", tmp_path / "tokenizer")
    assert not (tmp_path / "kb").exists()
    assert exit_info.value.code == InputError.exit_code
    assert "none.parquet" in capsys.readouterr().err

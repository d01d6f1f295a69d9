"""Documents become mentions, and linked mentions, by the commands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import picture, predictions, toml
from support.tables import edit_manifest

from gemel_engine.cli.main import main
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError
from gemel_engine.finding import job
from gemel_engine.linking.job import checked_plan
from gemel_engine.pipeline.output import RunDirectory

TEXTS = ["A brown bear and a cat.", "Nothing.", "", "The hot dog, the black cat."]
MENTIONS = [
    ("d0:2", "brown bear"),
    ("d0:19", "cat"),
    ("d3:4", "hot dog"),
    ("d3:17", "black cat"),
]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["gemel", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def write_documents(path: Path, texts: Sequence[str | bytes | None] = TEXTS, **columns: Sequence[object]) -> Path:
    ids = [f"d{number}" for number in range(len(texts))]
    encoded = [text.encode() if isinstance(text, str) else text for text in texts]
    pq.write_table(pa.table({"document_id": ids, "text": pa.array(encoded, pa.binary()), **columns}), path)
    return path


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "find.toml"
    path.write_text(
        f'input = "{write_documents(tmp_path / "documents.parquet")}"\noutput = "{tmp_path / "found"}"\n'
        f'knowledge_base = "{artifacts["knowledge_base"]}"\ndemonstrations = "{artifacts["demonstrations"]}"\n'
        "max_failed_fraction = 0.5\n"
    )
    return path


def found(directory: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(directory / "found" / "data").to_pylist()
    return rows


def of_documents(directory: Path) -> dict[str, tuple[int, str | None]]:
    rows = [
        row for file in sorted((directory / "found/_documents").iterdir()) for row in pq.read_table(file).to_pylist()
    ]
    return {row["document_id"]: (row["num_mentions"], row["error"]) for row in rows}


def test_documents_become_mentions_with_their_pictures(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [picture("red"), picture("blue"), None, picture("green")]
    write_documents(tmp_path / "documents.parquet", image_bytes=pictures)
    gold = {
        "group": ["d0", "d0", "d3"],
        "mention": ["brown bear", "bear", "hot dog"],
        "text": [TEXTS[0], TEXTS[0], TEXTS[3]],
    }
    pq.write_table(pa.table(gold), tmp_path / "gold.parquet")
    assert run(monkeypatch, "find-mentions", config, "--gold", tmp_path / "gold.parquet") == 0
    rows = found(tmp_path)
    assert [(row["mention_id"], row["mention"]) for row in rows] == MENTIONS
    assert [row["image_bytes"] for row in rows] == [pictures[0], pictures[0], pictures[3], pictures[3]]
    assert all(row["text"][row["mention_start"] :].startswith(row["mention"]) for row in rows)
    assert [row["group"] for row in rows] == ["d0", "d0", "d3", "d3"]
    errors = of_documents(tmp_path)
    assert {key: value for key, value in errors.items() if key != "d2"} == {
        "d0": (2, None),
        "d1": (0, None),
        "d3": (2, None),
    }
    assert errors["d2"] == (0, "invalid_document: the text is empty: give one")
    report = json.loads(Path(RunDirectory(str(tmp_path / "found")).report).read_text())
    assert (report["documents"], report["mentions"], report["errors"]) == (4, 4, {"invalid_document": 1})
    printed = capsys.readouterr().out
    assert "3 gold mentions, 4 found" in printed
    assert " 0.500 │  0.667 │ 0.571 │     2 " in printed


def test_a_long_document_is_cut_around_its_mentions(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "word " * 100
    write_documents(tmp_path / "documents.parquet", [f"{words}brown bear {words}", "x" * 500 + " cat"])
    assert run(monkeypatch, "find-mentions", config, "--finder.max-text-characters", 40) == 0
    first, second = found(tmp_path)
    assert first["text"] == "word word word brown bear word word word"
    assert (first["mention_start"], first["document_start"]) == (15, 500)
    assert (second["text"], second["mention_id"]) == (f"{'x' * 36} cat", "d1:501")


def test_columns_may_have_other_names(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("id,caption,photo\n7,A brown bear.,7.jpg\n")
    names = ("--columns.document-id", "id", "--columns.text", "caption", "--columns.image-uri", "photo")
    assert run(monkeypatch, "find-mentions", config, "--input", captions, *names) == 0
    (row,) = found(tmp_path)
    assert (row["mention_id"], row["mention"], row["image_uri"]) == ("7:2", "brown bear", "7.jpg")
    assert run(monkeypatch, "find-mentions", config, "--columns.mention", "caption") == 2
    assert "columns.mention is set, but documents have no such column" in capsys.readouterr().err


def test_what_is_unusable_is_named(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = tmp_path / "documents.parquet"
    write_documents(documents, [b"\xff", None, "A cat."])
    assert run(monkeypatch, "find-mentions", config) == 5
    assert of_documents(tmp_path) == {
        "d0": (0, "invalid_document: text is not UTF-8: write it again"),
        "d1": (0, "invalid_document: the text is empty: give one"),
        "d2": (1, None),
    }
    pq.write_table(pa.table({"document_id": ["a", "a"], "text": ["x", "y"]}), documents)
    assert run(monkeypatch, "find-mentions", config) == 3
    pq.write_table(pa.table({"mention_id": ["a"], "text": ["x"]}), documents)
    assert run(monkeypatch, "find-mentions", config) == 3
    write_documents(documents, ["Other."])
    assert run(monkeypatch, "find-mentions", config) == 2
    config.write_text(f'input = "{documents}"\noutput = "{tmp_path / "found"}"')
    assert run(monkeypatch, "find-mentions", config) == 2
    printed = capsys.readouterr().err
    for message in (
        "see `error` in its _documents",
        "repeats 1 document_id, such as ['a'], the first in rows 1 and 2: make them unique",
        "has no column 'document_id'; its columns are mention_id, text",
        "holds a run that differs in",
        "finder.model is not set, and neither are knowledge_base nor demonstrations",
    ):
        assert message in printed


def test_another_knowledge_base_is_another_search(
    config: Path,
    artifacts: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(artifacts["knowledge_base"], copied)
    config.write_text(config.read_text().replace(str(artifacts["knowledge_base"]), str(copied)))
    assert run(monkeypatch, "find-mentions", config) == 0
    edit_manifest(copied, created_by="another")
    assert run(monkeypatch, "find-mentions", config) == 2
    assert "artifacts.knowledge_base" in capsys.readouterr().err


def test_shards_are_searched_by_ray_and_a_rerun_does_what_is_missing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None
) -> None:
    assert run(monkeypatch, "find-mentions", config, "--rows-per-shard", 1) == 0
    assert [(row["mention_id"], row["mention"]) for row in found(tmp_path)] == MENTIONS
    data = tmp_path / "found/data"
    kept = (data / "shard-00000.parquet").stat().st_mtime_ns
    (data / "shard-00003.parquet").unlink()
    assert run(monkeypatch, "find-mentions", config, "--rows-per-shard", 1) == 0
    assert [(row["mention_id"], row["mention"]) for row in found(tmp_path)] == MENTIONS
    assert (data / "shard-00000.parquet").stat().st_mtime_ns == kept
    assert json.loads(Path(RunDirectory(str(tmp_path / "found")).report).read_text())["shards_skipped"] == 3
    monkeypatch.setattr(job, "FindMentions", None)  # a finished search opens no model
    assert run(monkeypatch, "find-mentions", config, "--rows-per-shard", 1) == 0


@pytest.fixture
def link(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    """The configuration of a linking run over documents."""
    documents, path = write_documents(tmp_path / "documents.parquet"), tmp_path / "link.toml"
    pq.write_table(pq.read_table(documents).rename_columns({"text": "caption"}), documents)
    settings = toml(artifacts, documents, tmp_path / "linked")
    settings = settings.replace("[language_model]", "find_mentions = true\n[language_model]", 1)
    path.write_text(f'{settings}\n[columns]\ntext = "caption"\n')
    return path


def test_a_dry_run_finds_nothing_and_a_plan_needs_mentions(
    link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(monkeypatch, "link", link, "--dry-run") == 0
    assert "4 of 4 documents are to be searched" in caplog.text
    with pytest.raises(ConfigurationError, match="call `gemel find-mentions` first"):
        checked_plan(load_config(LinkConfig, link))
    link.write_text(f'previous = "linked"\n{link.read_text()}')
    with pytest.raises(ConfigurationError, match="`previous` needs the mentions of that run"):
        load_config(LinkConfig, link)
    assert not (tmp_path / "linked").exists()


@pytest.mark.heavy
def test_documents_are_linked(link: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    output = tmp_path / "linked"
    assert run(monkeypatch, "link", link, "--max-failed-fraction", "0.5") == 0
    answers = {row["mention_id"]: row["entity_id"] for row in predictions(str(output))}
    assert answers.keys() == {mention_id for mention_id, _ in MENTIONS}
    gold = {
        "group": ["d0", "d0", "d3"],
        "mention": ["brown bear", "bear", "hot dog"],
        "mention_start": [2, 8, 4],
        "entity_id": [answers["d0:2"], "Q3", "Q0" if answers["d3:4"] != "Q0" else "Q1"],
    }
    pq.write_table(pa.table(gold), tmp_path / "gold.parquet")
    assert run(monkeypatch, "evaluate", output, "--gold", tmp_path / "gold.parquet") == 0
    judged = json.loads((output / "_evaluation/found.json").read_text())
    assert judged["mentions"] == {
        "num_right": 2,
        "num_found": 4,
        "num_gold": 3,
        "precision": 0.5,
        "recall": 2 / 3,
        "f1": 4 / 7,
    }
    assert (judged["linked"]["num_right"], judged["linked"]["num_gold"]) == (1, 3)
    assert run(monkeypatch, "evaluate", output, "--found") == 2

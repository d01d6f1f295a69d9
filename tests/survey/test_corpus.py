"""`gemel init` writes a configuration of what it finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT

from gemel_engine.cli.main import main
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig

pytestmark = pytest.mark.unit


def init(monkeypatch: pytest.MonkeyPatch, source: Path, written: Path) -> object:
    monkeypatch.setattr(sys, "argv", ["gemel", "init", str(source), "--write-to", str(written)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def table(**columns: object) -> dict[str, Any]:
    return {"mention_id": ["a", "b"], "text": ["In Paris.", "A long text."], "mention": ["Paris", "text"], **columns}


@pytest.mark.parametrize(
    ("columns", "texts", "finds"),
    [
        (table(), ["2 mentions in 1 file(s)", "Pictures: none", "Gold labels: none"], False),
        (table(entity_id=["Q1", None]), ["Gold labels: 1 of the first 2 rows", "10 characters"], False),
        (
            table(image_uri=["https://a.example/x/1.png", "/data/b/2.png"]),
            ["2 of the first 2 rows in image_uri", '["/data/b", "https://a.example"]', "image_encoder ="],
            False,
        ),
        (table(image_uri=["/data/a/1.png", "/home/b/2.png"]), ['["/data/a", "/home/b"]'], False),
        (table(image_uri=["http://[bad/1.png", "/1.png"]), ["allowed_prefixes = []"], False),
        (table(image_uri=["iVBORw0KGgo" * 99, "http://b ad/2.png"]), ["2 of the first 2 rows in image_uri"], False),
        (table(image_features=[[0.5, 1.0], None]), ["features of width 2", "feature_mapper ="], False),
        ({"document_id": [7, 8], "text": ["x", "y"]}, ["2 documents in", "find_mentions = true"], True),
        (
            {"caption": ["x"], "mention_id": ["a"], "ev\nil = 1": ["z"]},
            ["MISSING in the corpus: `mention`", "mention_id, caption, ev␊il = 1", 'text = "caption"', "# mention ="],
            False,
        ),
    ],
)
def test_what_a_corpus_has_is_written(
    columns: dict[str, Any], texts: list[str], finds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, written = tmp_path / "a \"corpus'.parquet", tmp_path / "link.toml"
    pq.write_table(pa.table(columns), source)
    assert init(monkeypatch, source, written) == 0
    config = load_config(LinkConfig, written)
    assert (config.input, config.find_mentions) == (str(source), finds)
    assert [text for text in texts if text not in written.read_text()] == []
    assert "MISSING: gemel build-kb" in written.read_text()


def test_a_table_of_captions_is_taken_for_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.csv").write_text("ID,Caption,photo\n7,A bear.,photos/7.jpg\n")
    assert init(monkeypatch, tmp_path / "captions.csv", tmp_path / "link.toml") == 0
    config = load_config(LinkConfig, tmp_path / "link.toml")
    assert config.find_mentions
    assert config.columns.given() == {"document_id": "ID", "text": "Caption", "image_uri": "photo"}
    assert config.image_source.allowed_prefixes == (str(tmp_path),)
    assert config.vision.feature_mapper is None
    (tmp_path / "mentions.csv").write_text("id,sentence,surface\n7,A bear.,bear\n")
    assert init(monkeypatch, tmp_path / "mentions.csv", tmp_path / "mentions.toml") == 0
    config = load_config(LinkConfig, tmp_path / "mentions.toml")
    assert (config.find_mentions, config.columns.mention_id, config.columns.document_id) == (False, "id", None)


@pytest.mark.parametrize(("stored", "place"), [("7.jpg", ""), ("photos/7.jpg", "photos"), ("a/b/7.jpg", "")])
def test_the_place_of_relative_pictures_is_looked_for(
    stored: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / stored).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stored).write_bytes(b"x")
    (tmp_path / "captions.csv").write_text("id,caption,photo\n7,A bear.,7.jpg\n")
    assert init(monkeypatch, tmp_path / "captions.csv", tmp_path / "link.toml") == 0
    config = load_config(LinkConfig, tmp_path / "link.toml")
    assert config.image_source.allowed_prefixes == (str(tmp_path / place),)


def test_a_knowledge_base_that_is_there_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table(table()), tmp_path / "mentions.parquet")
    (tmp_path / "kb").mkdir()
    (tmp_path / "kb" / "knowledge_base.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert init(monkeypatch, tmp_path / "mentions.parquet", tmp_path / "link.toml") == 0
    assert "build-kb" not in (tmp_path / "link.toml").read_text()


def test_a_file_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table(table()), tmp_path / "mentions.parquet")
    (tmp_path / "link.toml").write_text("mine")
    assert init(monkeypatch, tmp_path / "mentions.parquet", tmp_path / "link.toml") == 2
    assert (tmp_path / "link.toml").read_text() == "mine"
    assert "link.toml exists: remove it" in capsys.readouterr().err


def test_what_is_no_corpus_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(pa.table({"entity_id": ["Q1"], "name": ["Paris"]}), tmp_path / "entities.parquet")
    pq.write_table(pa.table(table()).slice(0, 0), tmp_path / "empty.parquet")
    for name in ("entities", "empty", "missing"):
        assert init(monkeypatch, tmp_path / f"{name}.parquet", tmp_path / "link.toml") == 3
    printed = capsys.readouterr().err
    for message in ("looks like a table of entities", "has no rows", "no table at"):
        assert message in printed
    assert not (tmp_path / "link.toml").exists()


def test_neither_command_waits_for_models(tmp_path: Path) -> None:
    pq.write_table(pa.table(table()), tmp_path / "mentions.parquet")
    slow = ("faiss", "open_clip", "ray", "torch", "transformers", "vllm")
    code = f"""
import atexit, sys
atexit.register(lambda: print("imported", [name for name in {slow} if name in sys.modules]))
from gemel_engine.cli.main import main
for sys.argv in [["gemel", "init", "mentions.parquet"], ["gemel", "doctor", "link.toml"]]:
    main()
"""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert finished.stdout.splitlines()[-1] == "imported []", finished.stderr
    assert finished.returncode == 1  # there is no knowledge base yet

"""Corpora of mentions in their authors' layouts, on excerpts written for these tests, through the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gemel_engine.cli.main import main
from gemel_engine.importers.mentions import MENTION_SCHEMA
from gemel_engine.pipeline.corpus import plan_shards, read_rows

pytestmark = pytest.mark.unit

CAPTION = ["The Bears at home (2007).", "https://example.org/a/Bears.jpg", "sports"]
UNUSABLE = (("", "x", 0), ("x", "", 0), ("x", "x", float("inf")))
WIKIDIVERSE: list[Any] = [
    [*CAPTION, [["Bears", "Organization", 4, 9, "https://en.wikipedia.org/wiki/Chicago_Bears_%28team%29"]]],
    ["Nobody's wolf.", "", "nature", [["wolf", "Other", 3, 7, None], ["Nobody", "Person", 0, 6, "https://x.org/"]]],
    ["damaged"],
    *([text, "", "x", [[form, "x", start, 9, None]]] for text, form, start in UNUSABLE),
]
MELBENCH: dict[str, dict[str, Any]] = {
    "7": {"sentence": "A bear drums.", "imgPath": "kvqa/1.jpg", "mentions": "bear", "answer": "Q1", "entities": "Bear"},
    "8": {"sentence": "A wolf.", "imgPath": "", "mentions": "wolf", "answer": "nil", "extra": 1},
    "9": {"sentence": "", "mentions": "x", "answer": "Q2"},
    "10": {"sentence": "A bear.", "imgPath": ["x.jpg"], "mentions": "bear", "answer": "Q1"},
}
AIDA = """-DOCSTART- (1 EU)
EU\tB\tEU\t--NME--
rejects
German\tB\tGerman\tGermany\thttp://en.wikipedia.org/wiki/German_(x)\t11867\t/m/0345h
lamb
.

Peter\tB\tPeter Blackburn\t--NME--
Blackburn\tI\tPeter Blackburn\t--NME--

-DOCSTART- (947testa CRICKET)
Essex\tB\t\tEssex
Essex\tB\tEssex\tEssex\thttp://en.wikipedia.org/wiki/Essex\t1\t/m/x
"""
BLINK = [
    {"id": 5, "label": "unknown", "label_id": -1, "context_left": "", "mention": "Bears", "context_right": ", at home"},
    {"context_left": "the (", "mention": "wolf", "context_right": "howls", "label_id": "Q3", "label_title": "Wolf"},
    {"mention": ""},
    {"mention": "wolf", "doc_id": 1.5},
    {"mention": "\ud800"},
]


def imported(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gemel", "import", "mentions", *map(str, arguments)])
    main()
    output = str(arguments[2])
    assert pq.read_schema(output) == MENTION_SCHEMA
    (shard,) = plan_shards(output, 100)
    names = [name for name in MENTION_SCHEMA.names if name != "entity_name"]
    rows: list[dict[str, Any]] = read_rows(shard, names).to_pylist()
    return rows


def test_wikidiverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    source, output = tmp_path / "train.json", tmp_path / "out.parquet"
    source.write_text(json.dumps(WIKIDIVERSE))
    first, second, third = imported(monkeypatch, "wikidiverse", source, output)
    assert first == {
        "mention_id": "train-0-0",
        "text": CAPTION[0],
        "mention": "Bears",
        "mention_start": 4,
        "image_uri": CAPTION[1],
        "group": "train-0",
        "entity_id": "Chicago_Bears_(team)",
    }
    assert pq.read_table(output)["entity_name"][0].as_py() == "Chicago Bears (team)"
    assert [(row["mention_start"], row["image_uri"], row["entity_id"]) for row in (second, third)] == [
        (None, None, None),  # the offset is wrong
        (0, None, None),
    ]
    assert "4 lines or rows are unusable, the first" in caplog.text
    assert [f"caption {number}" in caplog.text for number in (2, 3, 4, 5)] == [True] * 4
    first, *_ = imported(monkeypatch, "wikidiverse", source, output, "--pictures", "s3://bucket/pictures/")
    assert first["image_uri"] == "s3://bucket/pictures/Bears.jpg"


@pytest.mark.parametrize("is_list", [True, False])
def test_melbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_list: bool) -> None:
    source = tmp_path / "WIKIMEL_train.json"
    source.write_text(json.dumps([*MELBENCH.values()] if is_list else MELBENCH))
    first, second = imported(monkeypatch, "melbench", source, tmp_path / "out.parquet", "--pictures", "/pictures")
    assert (first["image_uri"], first["entity_id"]) == ("/pictures/1.jpg", "Q1")
    assert (second["image_uri"], second["entity_id"]) == (None, None)
    ids = ["WIKIMEL_train-0", "WIKIMEL_train-1"] if is_list else ["7", "8"]  # those of the corpus stay
    assert [row["mention_id"] for row in (first, second)] == ids
    assert first["group"] == first["text"] == "A bear drums."


def test_aida(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = tmp_path / "aida.tsv", tmp_path / "out.parquet"
    source.write_text(AIDA)
    rows = imported(monkeypatch, "aida", source, output)
    text = "EU rejects German lamb .\nPeter Blackburn"
    assert [row["text"] for row in rows] == [text, text, text, "Essex Essex"]
    assert [row["mention"] for row in rows] == ["EU", "German", "Peter Blackburn", "Essex"]
    assert all(row["text"].startswith(row["mention"], row["mention_start"]) for row in rows)
    assert [row["entity_id"] for row in rows] == [None, "German_(x)", None, "Essex"]
    assert [row["mention_id"] for row in rows] == ["1-0", "1-1", "1-2", "947testa-1"]
    assert rows[0]["group"] == "1 EU"
    for part, expected in (("train", 3), ("testa", 1)):
        assert len(imported(monkeypatch, "aida", source, output, "--part", part)) == expected


def test_blink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "test.jsonl"
    source.write_text("\n".join(map(json.dumps, BLINK)))
    first, second = imported(monkeypatch, "blink", source, tmp_path / "out.parquet")
    assert (first["mention_id"], first["text"], first["mention_start"]) == ("5", "Bears, at home", 0)
    assert (second["mention_id"], second["text"], second["mention_start"]) == ("test-2", "the (wolf howls", 5)
    assert (first["entity_id"], second["entity_id"]) == (None, "Q3")


@pytest.mark.parametrize(
    ("layout", "data", "options", "code", "message"),
    [
        ("wikidiverse", "[", [], 3, "is no JSON file that can be read"),
        ("melbench", '"x"', [], 3, "holds no list of mentions"),
        ("blink", '{"mention": []}', [], 3, "there are no mentions to write"),
        ("aida", "a", ["--pictures", "/p"], 2, "--pictures is of no use for aida"),
        ("aida", "a", ["--part", "testa", "--pictures", "/p"], 2, "--pictures is of no use for aida"),
        ("blink", "{}", ["--part", "train"], 2, "--part is of no use for blink"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    layout: str,
    data: str,
    options: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "in").write_text(data)
    with pytest.raises(SystemExit) as stopped:
        imported(monkeypatch, layout, tmp_path / "in", tmp_path / "out.parquet", *options)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.parquet").exists()

"""A finished run in the formats of other tools, through the command line, and what reads the run itself."""

from __future__ import annotations

import errno
import json
import random
import re
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT

from gemel_engine import storage
from gemel_engine.cli.main import main
from gemel_engine.pipeline.output import claim_output
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import Candidate, Prediction, predictions_to_table

pytestmark = pytest.mark.unit

TEXT = 'A 🐻 said "bear"\nto the other bear.\\'
MENTIONS: list[dict[str, Any]] = [
    {"mention_id": "a", "text": TEXT, "mention": "bear", "mention_start": 29, "group": "first doc", "entity_id": "Q1"},
    {"mention_id": "b", "text": "Paris in spring", "mention": "Paris", "mention_start": None, "group": None},
    {"mention_id": "c", "text": TEXT, "mention": "bear", "mention_start": None, "group": "first doc"},
    {"mention_id": "d", "text": "Another text", "mention": "text", "mention_start": None, "group": "first doc"},
    {"mention_id": "e", "text": "Nothing here", "mention": "absent", "mention_start": None, "group": "second"},
]
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("mention_id", "text", "mention", "group", "entity_id"), pa.string()),
        "mention_start": pa.int32(),
        **dict.fromkeys(("input_score", "score"), pa.int64()),  # the user's own
        "gold_entity_id": pa.string_view(),
        "tags": pa.list_(pa.string()),
        "image_bytes": pa.binary(),
    }
)
ANSWERS = {"a": "Q1", "b": "Q 90/<x>", "c": "http://other.org/bear", "d": "Q5", "e": "Q6"}


@pytest.fixture
def output(tmp_path: Path) -> str:
    """A run that links five mentions, in another order than that of its input, and not the last."""
    own = {"input_score": 7, "gold_entity_id": "Q7", "tags": ["x", "y"], "image_bytes": b"p"}
    rows = [own | {"score": place} | row for place, row in enumerate(MENTIONS)]
    (tmp_path / "mentions").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:2], schema=SCHEMA), tmp_path / "mentions/0.parquet")
    pq.write_table(
        pa.Table.from_pylist(rows[2:], schema=SCHEMA).drop_columns(["tags"]), tmp_path / "mentions/1.parquet"
    )
    return write_run(tmp_path, {**ANSWERS, "e": None})


def write_run(tmp_path: Path, answers: dict[str, str | None]) -> str:
    predictions = [
        Prediction(
            mention_id,
            entity_id=answer,
            entity_name=f"name of {answer}",
            confidence=0.5,
            candidates=(Candidate(answer, f"name of {answer}", -1.0), Candidate("Q0", "other", -2.0)),
        )
        if answer
        else Prediction(mention_id, error="invalid_mention: it is empty")
        for mention_id, answer in answers.items()
    ]
    random.Random(0).shuffle(predictions)
    directory = str(tmp_path / "linked")
    claim_output(directory, {"settings": {"input": str(tmp_path / "mentions")}})
    for number, rows in enumerate((predictions[:2], predictions[2:])):
        table = predictions_to_table(rows)
        table = table.append_column("text", pa.array(["text"] * len(rows), pa.large_string()))
        storage.write_bytes(f"{directory}/data/shard-{number:05d}.parquet", parquet_bytes(table))
    storage.write_bytes(f"{directory}/_report.json", b"{}")
    storage.write_bytes(f"{directory}/_ordered/1/0.parquet", parquet_bytes(pa.table({"other": [1]})))
    storage.write_bytes(f"{directory}/_evaluation/report.html", b"<html>")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def export(monkeypatch: pytest.MonkeyPatch, output: str, target: Path, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["gemel", "export", output, str(target), *options])
    main()


def test_pandas_opens_a_run(output: str) -> None:
    frame = pd.read_parquet(output)
    assert dict(zip(frame["mention_id"], frame["entity_id"], strict=True)) | {"e": None} == {**ANSWERS, "e": None}
    assert set(frame["text"]) == {"text"}


def test_duckdb_opens_a_run_and_its_export(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    duckdb = pytest.importorskip("duckdb")
    found = duckdb.sql(f"SELECT mention_id, entity_id FROM '{output}/data/*.parquet' ORDER BY mention_id").fetchall()
    assert found == [*sorted(ANSWERS.items())[:4], ("e", None)]
    export(monkeypatch, output, tmp_path / "linked.parquet")
    joined = duckdb.sql(
        f"SELECT mention_id, candidates[1].name FROM '{tmp_path}/linked.parquet' WHERE mention_id = 'a'"
    )
    assert joined.fetchall() == [("a", "name of Q1")]


def test_tables_have_the_columns_of_the_input_and_no_two_of_one_name(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("linked.parquet", "linked.csv", "linked.jsonl"):
        export(monkeypatch, output, tmp_path / "new" / name)
    table = pq.read_table(tmp_path / "new/linked.parquet")
    assert table["mention_id"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert table["entity_id"].to_pylist() == [*list(ANSWERS.values())[:4], None]
    assert table["gold_entity_id"].to_pylist() == ["Q1", None, None, None, None]
    assert table["input_gold_entity_id"].to_pylist() == ["Q7"] * 5
    assert table["input_score"].to_pylist() == [7] * 5
    assert table["input_input_score"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["tags"].to_pylist() == [["x", "y"], ["x", "y"], None, None, None]
    assert "image_bytes" not in table.column_names
    assert len(set(table.column_names)) == table.num_columns
    csv = pd.read_csv(tmp_path / "new/linked.csv")
    assert list(csv["text"]) == table["text"].to_pylist()
    assert list(csv["input_gold_entity_id"]) == ["Q7"] * 5
    assert json.loads(csv["candidates"][0])[1]["entity_id"] == "Q0"
    lines = (tmp_path / "new/linked.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == table.to_pylist()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "linked.csv",
        "linked.jsonl",
        "linked.parquet",
    ]


def test_nif_has_documents_with_their_mentions(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(monkeypatch, output, tmp_path / "linked.ttl")
    turtle = (tmp_path / "linked.ttl").read_text()
    assert turtle.count("a nif:Context") == 4
    assert f"nif:isString {json.dumps(TEXT, ensure_ascii=False)} ." in turtle
    phrases = re.findall(r"<(\S+)#char=(\d+),(\d+)> a nif:Phrase.*?\.\n", turtle, re.DOTALL)
    assert phrases == [
        ("urn:document:first%20doc", "29", "33"),
        ("urn:document:first%20doc", "10", "14"),
        ("urn:document:first%20doc-2", "8", "12"),
        ("urn:document:b", "0", "5"),
    ]
    assert re.findall("taIdentRef <(.*)>", turtle) == [
        "http://www.wikidata.org/entity/Q1",
        "http://other.org/bear",
        "http://www.wikidata.org/entity/Q5",
        "http://www.wikidata.org/entity/Q%2090%2F%3Cx%3E",
    ]
    rdflib = pytest.importorskip("rdflib")
    assert len(rdflib.Graph().parse(data=turtle, format="turtle")) == 4 * 5 + 4 * 8


def test_elevant_has_a_line_for_each_document(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(monkeypatch, output, tmp_path / "linked.jsonl", "--format", "elevant")
    articles = [json.loads(line) for line in (tmp_path / "linked.jsonl").read_text().splitlines()]
    assert [article["title"] for article in articles] == ["first doc", "first doc-2", "b", "second"]
    assert articles[0]["text"] == TEXT
    assert [mention["id"] for mention in articles[0]["entity_mentions"]] == ["Q1", "http://other.org/bear"]
    assert [TEXT[slice(*mention["span"])] for mention in articles[0]["entity_mentions"]] == ["bear", "bear"]
    assert articles[0]["entity_mentions"][0]["candidates"] == ["Q1", "Q0"]
    assert [label["entity_id"] for label in articles[0]["labels"]] == ["Q1"]
    assert articles[3]["entity_mentions"] == []


def test_blink_has_a_line_for_each_mention(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(monkeypatch, output, tmp_path / "linked.jsonl", "--format", "blink")
    lines = [json.loads(line) for line in (tmp_path / "linked.jsonl").read_text().splitlines()]
    assert [line["query_id"] for line in lines] == ["a", "c", "d", "b"]
    assert lines[0]["context_left"] + lines[0]["mention"] + lines[0]["context_right"] == TEXT
    assert (lines[0]["label_id"], lines[0]["gold_label_id"], lines[0]["label_title"]) == ("Q1", "Q1", "name of Q1")


@pytest.mark.parametrize(
    ("target", "options", "code", "message"),
    [
        ("linked.xml", (), 2, "ends with none of .parquet, .csv, .jsonl, .ttl: give --format"),
        ("linked/data/x.parquet", (), 2, "would be among the run's own files"),
        ("linked/_run.json", ("--format", "csv"), 2, "would be among the run's own files"),
        ("mentions/0.parquet", (), 2, "choose an output outside of the input"),
        ("linked.xml", ("--format", "xml"), 2, "invalid choice"),
    ],
)
def test_a_wrong_target_is_refused(
    output: str,
    target: str,
    options: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export(monkeypatch, output, tmp_path / target, *options)
    assert stopped.value.code == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["JoinedRun", "shutil.move"])
def test_a_full_disk_is_explained_and_leaves_nothing(
    step: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(_: object, place: Path, *_others: object) -> NoReturn:
        if step == "shutil.move":
            place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "full")

    before = contents(tmp_path)
    monkeypatch.setattr(f"gemel_engine.export.write.{step}", fill)
    with pytest.raises(SystemExit, match="1"):
        export(monkeypatch, output, tmp_path / "linked.jsonl")
    assert "no room left on the disk: make room" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_input_that_has_changed_is_refused(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mentions/1.parquet").unlink()
    with pytest.raises(SystemExit, match="3"):
        export(monkeypatch, output, tmp_path / "linked.csv")
    assert "has 2 mentions, of which the run links 2, and the run has 5 rows" in capsys.readouterr().err
    Path(output, "_report.json").unlink()
    with pytest.raises(SystemExit, match="3"):
        export(monkeypatch, output, tmp_path / "linked.csv")
    assert "has no _report.json" in capsys.readouterr().err


def test_the_examples_of_the_documents_run(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/run_directory.md").read_text("utf-8")
    shards = [pq.read_table(path) for path in sorted(Path(output, "data").iterdir())]
    for path, shard in zip(sorted(Path(output, "data").iterdir()), shards, strict=True):
        pq.write_table(shard.append_column("mention", shard["mention_id"]), path)
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "run_directory.md", "exec"), {})
    duckdb = pytest.importorskip("duckdb")
    (queries,) = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    found = [duckdb.sql(query).fetchall() for query in queries.split(";")[:-1]]
    assert [len(rows) for rows in found] == [5, 4]

"""The table that importers write, through the command that a user runs."""

from __future__ import annotations

import gzip
import os
import sys
import uuid
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.s3_server import S3Server

from gemel_engine.cli.main import main
from gemel_engine.importers.entities import SCHEMA
from gemel_engine.storage import write_bytes

WIKIDATA = b'[\n{"type":"item","id":"Q1","labels":{"en":{"language":"en","value":"Earth"}},"sitelinks":{}}\n]\n'
LABEL = b'<http://dbpedia.org/resource/A> <http://www.w3.org/2000/01/rdf-schema#label> "A"@en .\n'


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> object:
    monkeypatch.setattr(sys, "argv", ["gemel", "import", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_every_import_writes_the_same_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump, triples, output = tmp_path / "dump.json.gz", tmp_path / "labels.ttl", tmp_path / "new" / "out.parquet"
    dump.write_bytes(gzip.compress(WIKIDATA))
    triples.write_bytes(LABEL)
    assert run(monkeypatch, "wikidata", dump, output, "--languages", "en", "de", "--leave-out", "Q5") == 0
    assert pq.read_schema(output) == SCHEMA
    (row,) = pq.read_table(output).to_pylist()
    nothing = dict.fromkeys(("description", "aliases", "image_uri", "other_names"))
    assert row == {"entity_id": "Q1", "name": "Earth", "popularity": 0.0, "language": "en", **nothing}
    assert run(monkeypatch, "dbpedia", triples, triples, output, "--languages", "en", "de") == 0
    assert pq.read_table(output).to_pylist() == [
        {"entity_id": "A", "name": "A", "popularity": None, "language": "en", **nothing}
    ]
    assert run(monkeypatch, "table", output, tmp_path / "copy.parquet", "--columns", "name=entity_id") == 0
    assert os.listdir(output.parent) == ["out.parquet"]
    assert pq.read_table(tmp_path / "copy.parquet").equals(pq.read_table(output))


def test_a_table_in_s3_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_server: S3Server) -> None:
    source = f"{s3_server.uri}/{uuid.uuid4().hex}/entities.csv.gz"
    write_bytes(source, gzip.compress(b"entity_id,name\n1,A\n"))
    assert run(monkeypatch, "table", source, tmp_path / "out.parquet") == 0
    assert pq.read_table(tmp_path / "out.parquet")["name"].to_pylist() == ["A"]
    assert run(monkeypatch, "table", f"{source}x.csv", tmp_path / "out.parquet") == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("wikidata", "empty.json", "out.parquet"), 3, "there are no entities to write"),
        (("wikidata", "none.json", "out.parquet"), 3, "'none.json' cannot be read"),
        (("wikidata", "dump.json.gz", "out.parquet"), 3, "damaged or cut off after line 0"),
        (("wikidata", "dump.json.gz", "empty.json"), 2, "'empty.json' is not named *.parquet: name the output last"),
        (("wikidata", "dump.json.gz", "out.parquet", "--languages"), 2, "--languages is ()"),
        (("wikidata", "dump.json.gz", "out.parquet", "--image-width", "300"), 2, "invalid choice"),
        (("dbpedia", "labels.ttl"), 2, "gemel import dbpedia DUMP... OUTPUT.parquet"),
        (("dbpedia", "labels.ttl", "labels.ttl"), 2, "name the output last"),
        (("table", "e.parquet", "e.parquet"), 2, "lie one in the other"),
        (("table", "e.csv", "out.parquet"), 3, "1 unusable, the first 'e.csv', line 2: name is missing"),
        (("table", "e.csv", "out.parquet", "--columns", "title"), 2, "--columns is 'title'"),
    ],
)
def test_what_cannot_be_imported_is_explained(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_bytes(b"[\n]\n")
    Path("dump.json.gz").write_bytes(gzip.compress(WIKIDATA)[:-10])
    Path("labels.ttl").write_bytes(LABEL)
    Path("e.csv").write_text("entity_id,name\n1,\n")
    before = sorted(os.listdir())
    assert run(monkeypatch, *arguments) == code
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert sorted(os.listdir()) == before

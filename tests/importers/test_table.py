from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.importers.entities import ImportedEntity, ImportReport
from gemel_engine.importers.table import parse_columns, read_table

pytestmark = pytest.mark.unit


def read(source: Path, separator: str = "|", **columns: str) -> tuple[list[ImportedEntity], ImportReport]:
    report = ImportReport()
    return list(read_table(str(source), report, columns=columns, separator=separator)), report


EXPECTED = [
    ImportedEntity(
        entity_id="007",
        name="1984",
        description='A "novel",\nby Orwell',
        popularity=3.5,
        aliases=["Nineteen Eighty-Four", "NA"],
        image_uri=["https://example.org/1.png"],
        language="en",
    ),
    ImportedEntity(entity_id="8", name="null", description="", popularity=None, aliases=[], image_uri=[], language=""),
]
CSV = (
    "\ufeffentity_id,name,description,popularity,aliases,image_uri,language\r\n"
    '007,1984,"A ""novel"",\nby Orwell",3.5,Nineteen Eighty-Four|NA||1984|NA,https://example.org/1.png,en\r\n'
    "\r\n"
    "8,null,,,,,\r\n"
)


@pytest.mark.parametrize("name", ["e.csv", "e.CSV.gz", "e.tsv"])
def test_numbers_in_texts_stay_texts(tmp_path: Path, name: str) -> None:
    tsv = CSV.replace('"A ""novel"",\nby Orwell"', 'A "novel"; by Orwell').replace(",", "\t").replace(";", ",")
    content = (tsv if "tsv" in name else CSV).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found, report = read(tmp_path / name)
    first = replace(EXPECTED[0], description='A "novel", by Orwell') if "tsv" in name else EXPECTED[0]
    assert found == [first, EXPECTED[1]]
    assert report.num_unusable == 0


def test_columns_and_separator_can_be_others(tmp_path: Path) -> None:
    source = tmp_path / "e.csv"
    source.write_text("id,title,redirects,name\nQ1,Earth,Terra;the world,ignored\n", "utf-8")
    found, _ = read(source, ";", entity_id="id", name="title", aliases="redirects")
    assert [(entity.entity_id, entity.name, entity.aliases) for entity in found] == [
        ("Q1", "Earth", ["Terra", "the world"])
    ]


def test_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"entity_id": 7, "name": 1984, "aliases": ["a|b", None, ""], "popularity": "3", "image_uri": "x"},
        {"entity_id": "8", "name": "B", "aliases": "c", "more": {}},
    ]
    source = tmp_path / "e.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found, _ = read(source)
    assert [(e.entity_id, e.name, e.aliases, e.popularity, e.image_uri) for e in found] == [
        ("7", "1984", ["a|b"], 3.0, ["x"]),
        ("8", "B", ["c"], None, []),
    ]


def test_parquet_files_of_a_directory(tmp_path: Path) -> None:
    first = pa.table(
        {
            "qid": pa.array([1, 2]),
            "name": pa.array(["A", None]).dictionary_encode(),
            "aliases": pa.array([["a", None], None], pa.large_list(pa.string())),
            "image_uri": ["x", None],
            "popularity": pa.array([5, None], pa.int32()),
        }
    )
    pq.write_table(first, tmp_path / "1.parquet")
    pq.write_table(pa.table({"qid": ["3"], "name": [b"C"]}), tmp_path / "2.parquet")
    found, report = read(tmp_path, entity_id="qid")
    assert [(e.entity_id, e.name, e.aliases, e.popularity, e.image_uri) for e in found] == [
        ("1", "A", ["a"], 5.0, ["x"]),
        ("3", "C", [], None, []),
    ]
    assert report.examples == [f"{str(tmp_path)!r}, row 1 of {str(tmp_path / '1.parquet')!r}: name is missing"]


@pytest.mark.parametrize(
    ("name", "content", "examples"),
    [
        (
            "e.csv",
            b'entity_id,name,popularity\n1,A\n2,"B"x,1\n3,C,many\n4,C\xff,1\n,D,1\n6,"E\n\n,1\n',
            ["line 2: 2 fields, but the header has 3", "line 3: ", "line 4: popularity is 'many'",
             "line 5: text that is not UTF-8", "line 6: entity_id is missing"],
        ),
        (
            "e.jsonl",
            b'{"entity_id": "0", "name": 1.5}\n[1]\n{"entity_id": "1", "name": "\\ud800"}\n'
            b'{"entity_id": true, "name": "B"}\n'
            b'{"entity_id": "2", "name": "B", "popularity": NaN}\n',
            ["line 1: name is 1.5, not a text", "line 2: not a JSON object", "line 3: ", "line 4: entity_id is True",
             "line 5: popularity is nan, not a finite number"],
        ),
    ],
)  # fmt: skip
def test_a_malformed_row_is_reported_with_its_line(
    tmp_path: Path, name: str, content: bytes, examples: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    found, report = read(tmp_path / name)
    assert found == []
    assert report.num_unusable == len(examples) + (name == "e.csv")  # an open quote takes the rest of the file
    for example, expected in zip(report.examples, examples, strict=True):
        assert example.startswith(f"{str(tmp_path / name)!r}, {expected}")


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "e.parquet"])
def test_a_missing_column_is_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    if name == "e.parquet":
        pq.write_table(pa.table({"entity_id": ["1"], "title": ["A"]}), source)
    else:
        source.write_text("entity_id,title\n1,A\n" if name == "e.csv" else '{"entity_id": "1", "title": "A"}')
    with pytest.raises(InputError, match="has no column 'name', only 'entity_id', 'title': name the right ones"):
        read(source)
    with pytest.raises(InputError, match="has no column 'also'"):
        read(source, name="title", aliases="also")


def test_quotes_in_tsv_are_characters(tmp_path: Path) -> None:
    (tmp_path / "e.tsv").write_text('entity_id\tname\n1\t"Heroes\n2\tB"\n')
    found, _ = read(tmp_path / "e.tsv")
    assert [entity.name for entity in found] == ['"Heroes', 'B"']


def test_a_malformed_header_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text('entity_id,"name"x\n1,A\n')
    with pytest.raises(InputError, match="line 1 names the columns and is malformed"):
        read(tmp_path / "e.csv")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_refused_as_one(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "e.json").write_text(json.dumps([{"entity_id": "1", "name": "A"}], indent=indent))
    with pytest.raises(InputError, match="line 1 begins a JSON array: write JSON Lines"):
        read(tmp_path / "e.json")


def test_columns_that_are_not_imported_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "e.csv").write_text("entity_id,name,alias\n1,A,B\n")
    with caplog.at_level(logging.WARNING):
        read(tmp_path / "e.csv")
    assert "columns not imported: 'alias'" in caplog.text


def test_a_repeated_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("entity_id,name,name\n1,A,B\n")
    with pytest.raises(InputError, match="'name' more than once"):
        read(tmp_path / "e.csv")


@pytest.mark.parametrize("pair", ["title", "title=name", "name=", "name=a name=b"])
def test_a_wrong_pair_of_columns_is_refused(pair: str) -> None:
    with pytest.raises(ConfigurationError, match="give COLUMN=NAME_IN_THE_TABLE"):
        parse_columns(pair.split(" "))

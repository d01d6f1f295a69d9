"""Tables in text: every format becomes the same rows as Parquet, and what is wrong is named with its place."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.paths import ROOT
from support.s3_server import S3Server

from gemel_engine import storage
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.evaluation.gold import read_gold
from gemel_engine.knowledge_base.build import read_entities
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS
from gemel_engine.pipeline.corpus import order_by_surface_form, plan_shards, read_rows, take_rows
from gemel_engine.report.gallery import read_drawn_mentions
from gemel_engine.retrieval.reading import read_demonstrations
from gemel_engine.storage import parquet
from gemel_engine.storage.text import parquet_copy
from gemel_engine.types import MENTION_COLUMNS

pytestmark = pytest.mark.unit

ROWS: list[dict[str, Any]] = [
    {"mention_id": "1", "text": 'A "bear", big.', "mention": "bear", "mention_start": 3, "candidate_ids": ["Q1", "Q2"]},
    {"mention_id": "2", "text": "Two\r\nlines of a wolf.", "mention": "wolf", "group": "7", "image_uri": "/a.png"},
    {"mention_id": "03", "text": "Żółw, żółw", "mention": "żółw", "mention_start": 6, "entity_id": "Q3"},
]
COLUMNS = ("mention_id", "text", "mention", "mention_start", "candidate_ids", "group", "image_uri", "entity_id")


def quoted(value: Any) -> str:
    text = "|".join(value) if isinstance(value, list) else "" if value is None else str(value)
    return '"' + text.replace('"', '""') + '"' if set(text) & set('",\n') else text


def as_csv(rows: list[dict[str, Any]], names: dict[str, str]) -> bytes:
    lines = [
        [names.get(name, name) for name in COLUMNS],
        *([quoted(row.get(name)) for name in COLUMNS] for row in rows),
    ]
    return ("\ufeff" + "\r\n".join(map(",".join, lines))).encode()


def as_json(rows: list[dict[str, Any]], names: dict[str, str]) -> bytes:
    lines = [json.dumps({names.get(name, name): value for name, value in row.items()}) for row in rows]
    return "\n".join(lines).encode()


def as_parquet(rows: list[dict[str, Any]], names: dict[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{names.get(k, k): row.get(k) for k in COLUMNS} for row in rows]), sink)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


FORMATS: dict[str, Callable[[list[dict[str, Any]], dict[str, str]], bytes]] = {
    "a.parquet": as_parquet,
    "a.csv": as_csv,
    "a.CSV.gz": lambda rows, names: gzip.compress(as_csv(rows, names)),
    "a.csv.zst": lambda rows, names: zstd(as_csv(rows, names)),
    "a.jsonl": as_json,
    "a.json": as_json,
    "a.ndjson.bz2": lambda rows, names: bz2.compress(as_json(rows, names)),
}


def read_all(corpus: str, names: dict[str, str] | None = None) -> list[dict[str, Any]]:
    plan = plan_shards(corpus, 2, stored_names=names)
    rows = [row for shard in plan for row in read_rows(shard, COLUMNS).to_pylist()]
    return [{name: row.get(name) for name in COLUMNS} for row in rows]


def expected() -> list[dict[str, Any]]:
    return [{name: row.get(name) for name in COLUMNS} for row in ROWS]


def write(path: Path, data: bytes | str) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read_all(write(tmp_path / name, FORMATS[name](ROWS, {}))) == expected()


@pytest.mark.parametrize("name", FORMATS)
def test_columns_may_have_other_names(tmp_path: Path, name: str) -> None:
    names = {"mention_id": "id", "mention": "surface", "mention_start": "offset", "candidate_ids": "only", "text": "t"}
    names |= {"entity_id": "label", "group": "mention"}  # of which one is the engine's name of another
    uri = write(tmp_path / name, FORMATS[name](ROWS, names))
    assert read_all(uri, names) == expected()
    plan = plan_shards(uri, 2, stored_names=names)
    order = order_by_surface_form(plan)
    assert order is not None
    assert order.tolist() == [0, 1, 2]
    assert take_rows(plan, order[:1])["mention"].to_pylist() == ["bear"]
    gold = read_gold(uri, uri, stored_names=names)
    assert gold["entity_id"].to_pylist() == [None, None, "Q3"]
    assert read_drawn_mentions(uri, ["2"], names)["2"]["mention"] == "wolf"
    (demonstration,) = read_demonstrations(uri, {"Q3": "turtle"}, stored_names=names)
    assert (demonstration.mention, demonstration.name) == ("żółw", "turtle")


def test_labels_may_have_the_names_of_the_run_or_the_engine_s_own(tmp_path: Path) -> None:
    names = {"mention_id": "id", "entity_id": "label"}
    linked = write(tmp_path / "input.csv", as_csv(ROWS, names))
    for number, header in enumerate(("id,label", "mention_id,entity_id")):
        labels = write(tmp_path / f"{number}.csv", f"{header}\n2,Q2\n")
        gold = read_gold(labels, linked, stored_names=names).select(["mention_id", "entity_id", "mention"])
        assert gold.to_pylist() == [{"mention_id": "2", "entity_id": "Q2", "mention": "wolf"}]


def test_identifiers_that_are_integers_are_their_decimals(tmp_path: Path) -> None:
    rows = [{"mention_id": 12, "text": "a bear", "mention": "bear", "candidate_ids": [1, 2], "group": 7}]
    for name in ("a.jsonl", "a.parquet"):
        data = as_json(rows, {}) if name == "a.jsonl" else as_parquet(rows, {})
        (row,) = read_all(write(tmp_path / name, data))
        assert (row["mention_id"], row["candidate_ids"], row["group"]) == ("12", ["1", "2"], "7")


def test_quotes_in_tsv_are_characters_and_offsets_may_be_those_of_pandas(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.tsv", 'mention_id\ttext\tmention\tmention_start\n1\t"A bear\tbear\t3.0\n2\tx\tx\t\n')
    rows = read_all(uri)
    assert [(row["text"], row["mention_start"]) for row in rows] == [('"A bear', 3), ("x", None)]


def test_a_directory_is_read_by_its_tables(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", as_json(ROWS[1:], {}))
    write(tmp_path / "a.csv.gz", gzip.compress(as_csv(ROWS[:1], {})))
    for name in ("dataset_info.json", "README.md", ".c.csv", "_d.csv"):
        write(tmp_path / name, "{}")
    assert [row["mention_id"] for row in read_all(str(tmp_path))] == ["1", "2", "03"]


def test_a_late_column_and_values_of_other_types_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemel_engine.storage.text._ROWS_PER_GROUP", 2)
    rows = [*ROWS, {"mention_id": "4", "text": "", "mention": "x", "extra": {"a": [1]}}]
    copy = parquet_copy(storage.list_tables(write(tmp_path / "a.jsonl", as_json(rows, {})))[0])
    assert pq.read_table(copy)["extra"].to_pylist() == [None, None, None, '{"a": [1]}']
    assert parquet_copy(storage.list_tables(str(tmp_path))[0]) == copy


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.csv", as_csv(ROWS, {}))
    plan = plan_shards(uri, 2)
    write(tmp_path / "a.csv", as_csv(ROWS[:2], {}))
    with pytest.raises(InputError, match="has changed since the run was planned"):
        read_rows(plan[0], ["mention_id"])
    assert len(read_all(uri)) == 2
    listed = storage.list_tables(write(tmp_path / "b.csv", as_csv(ROWS, {})))[0]
    uri = write(tmp_path / "b.csv", as_csv(ROWS[:2], {}))
    with pytest.raises(InputError, match="was replaced while it was read: run the same command again"):
        parquet.open_table(uri, file=listed)


def test_tables_in_s3(s3_server: S3Server) -> None:
    for name in ("a.csv.gz", "b.jsonl"):
        rows = ROWS[:1] if name.startswith("a") else ROWS[1:]
        data = gzip.compress(as_csv(rows, {})) if name.startswith("a") else as_json(rows, {})
        storage.write_bytes(f"{s3_server.uri}/text_tables/{name}", data)
    assert read_all(f"{s3_server.uri}/text_tables") == expected()


def test_entities_may_be_text_too(tmp_path: Path) -> None:
    changes = write(tmp_path / "changes.csv", "entity_id,retired\n1,True\n2,0\n3,\n")
    assert read_entities(changes, also=("retired",))["retired"].to_pylist() == [True, False, None]
    vectors = write(
        tmp_path / "vectors.csv", 'entity_id,image_features\n1,"[0.5, 2]"\n2,"[[0.5, 2], [3, 4]]"\n3,0.5|2\n'
    )
    with parquet.open_table(vectors, ENTITY_COLUMNS) as table:
        found = table.read(["image_features"])["image_features"].to_pylist()
    assert found == [[[0.5, 2]], [[0.5, 2], [3, 4]], [[0.5, 2]]]
    uri = write(tmp_path / "a.csv", "entity_id,name,aliases,popularity\n1,Bear,Ursus|big bear,2.5\n2,Wolf,,\n")
    assert read_entities(uri).select(["name", "aliases", "popularity"]).to_pylist() == [
        {"name": "Bear", "aliases": ["Ursus", "big bear"], "popularity": 2.5},
        {"name": "Wolf", "aliases": None, "popularity": None},
    ]


HEADER = "mention_id,text,mention,mention_start\n"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", HEADER + "1,a bear,bear\n", "'{uri}', line 2 is malformed (3 fields, but the header has 4)"),
        ("a.csv", HEADER + '1,"a bear,bear,1\n', "'{uri}', line 2 is malformed (unexpected end of data)"),
        ("a.csv", HEADER.encode() + b"1,a b\xe9ar,bear,\n", "'{uri}', line 2 is malformed (text that is not UTF-8)"),
        ("a.csv", HEADER.encode("utf-16"), "'{uri}' is not UTF-8: save it as UTF-8"),
        ("a.csv", "", "'{uri}' has no columns: give a table with a header"),
        ("a.csv", HEADER, "{uri} has no rows"),
        ("a.csv", HEADER + "1,x,x,\n2,x,x,\n1,x,x,\n",
         "{uri} repeats 1 mention_id, such as ['1'], the first in rows 1 and 3"),
        ("a.csv", HEADER + "1,x,x,\n,x,x,\n", "{uri} has 1 rows without a mention_id, the first is row 2"),
        ("a.csv", HEADER + "1,x,x,\n2,x,x,far\n",
         "{uri}: column 'mention_start' is 'far' in row 2, counted from 1 without a header; it must be an integer"),
        ("a.csv", "mention_id,txt,mention\n1,x,x\n",
         "{uri} has no column 'text'; its columns are mention_id, txt, mention (did you mean 'txt' for 'text'?)"),
        ("a.csv", "id;text;mention\n1;x;x\n", "; its columns are id, text, mention"),
        ("a.csv", "mention_id,text,text\n1,x,x\n", "'{uri}' has the column 'text' more than once: keep one"),
        ("a.csv.gz", gzip.compress(HEADER.encode() * 9, mtime=0)[:-9], "'{uri}' is damaged or cut off after line"),
        ("a.jsonl", '{"mention_id": 1}\n{"mention_id"\n', "'{uri}', line 2 is malformed"),
        ("a.jsonl", '{"mention_id": "\\ud800"}\n', "'{uri}', line 1 is malformed (text that is not UTF-8)"),
        ("a.jsonl", '{"\\ud800": 1}', "'{uri}', line 1 is malformed (text that is not UTF-8)"),
        ("a.jsonl", "[1]", "'{uri}', line 1 begins a JSON array: write JSON Lines"),
        ("a.parquet", HEADER, "{uri} is not a readable Parquet table"),
        ("a.txt", HEADER, "name it *.csv, *.tsv or *.jsonl if it is one"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, name: str, data: bytes | str, message: str) -> None:
    uri = write(tmp_path / name, data)
    with pytest.raises(InputError) as raised:
        plan_shards(uri, 10)
    assert message.format(uri=uri) in str(raised.value)


def test_a_missing_input_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=f"no table at '{tmp_path}/no': .* relative paths begin at the working directory"
    ):
        plan_shards("no", 10)


def test_a_configured_column_must_be_there(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.csv", as_csv(ROWS, {}))
    with pytest.raises(InputError, match=r"no column 'image'; .*did you mean 'image_uri' for 'image'"):
        plan_shards(uri, 10, stored_names={"image_bytes": "image"})
    path = tmp_path / "link.toml"
    required = 'input = "i"\noutput = "o"\nknowledge_base = "k"\nlanguage_model.name = "m"\n'
    path.write_text(f'{required}[columns]\nmention_id = "id"\n')
    assert load_config(LinkConfig, path, ["--columns.text", "caption"]).columns.given() == {
        "mention_id": "id",
        "text": "caption",
    }
    path.write_text(f'{required}[columns]\nmentoin = "id"\n')
    with pytest.raises(ConfigurationError, match=r"unknown key 'columns\.mentoin'; did you mean 'mention'"):
        load_config(LinkConfig, path)


def test_a_data_set_of_hugging_face_needs_no_names(tmp_path: Path) -> None:
    pictures = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "/b.png"}]
    rows = {"mention_id": [1, 2], "text": ["x", "x"], "mention": ["x", "x"]}
    pq.write_table(pa.table(rows | {"image": pictures}), tmp_path / "a.parquet")
    (shard,) = plan_shards(str(tmp_path), 10)
    found = read_rows(shard, ["mention_id", "image_bytes", "image_uri"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [("1", b"a", None), ("2", None, "/b.png")]
    assert order_by_surface_form([shard]) is None
    pq.write_table(pa.table(rows | {"image": ["/a.png", "/b.png"]}), tmp_path / "a.parquet")  # no pictures
    (shard,) = plan_shards(str(tmp_path), 10, stored_names={"image_uri": "image"})
    assert read_rows(shard, list(MENTION_COLUMNS))["image_uri"].to_pylist() == ["/a.png", "/b.png"]


REFUSED = """
import sys
from gemel_engine.cli.main import main
sys.argv = ["gemel", {command!r}, {path!r}]
try:
    main()
except SystemExit as end:
    print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize("command", ["link", "plan", "train"])
def test_a_bad_input_is_refused_before_torch_is_imported(tmp_path: Path, command: str) -> None:
    uri = write(tmp_path / "mentions.csv", "id,text,mention\n1,x,x\n")
    path = tmp_path / "job.toml"
    name = "train" if command == "train" else "input"
    path.write_text(f'{name} = "{uri}"\noutput = "{tmp_path}/o"\nknowledge_base = "k"\nlanguage_model.name = "m"\n')
    code = REFUSED.format(command=command, path=str(path))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "3 False\n"
    assert "has no column 'mention_id'" in done.stderr

"""Tables as users give them: of other tools, damaged, planted, and far larger in memory than on disk."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from support.s3_server import S3Server

from gemel_engine import storage
from gemel_engine.errors import InputError
from gemel_engine.evaluation.gold import read_gold
from gemel_engine.knowledge_base.build import read_entities
from gemel_engine.pipeline import stages as stages
from gemel_engine.pipeline.corpus import plan_shards, read_rows
from gemel_engine.pipeline.output import read_columns
from gemel_engine.report.gallery import read_drawn_mentions
from gemel_engine.retrieval.reading import read_demonstrations, read_names
from gemel_engine.storage import parquet as parquet
from gemel_engine.storage import parquet_footer
from gemel_engine.storage.table import explain_unreadable
from gemel_engine.training.stages import read_file
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_COLUMNS

IDS = ["1", "2", "3"]
MENTIONS: dict[str, Any] = {
    "mention_id": IDS,
    "text": ["A bear.", "A wolf.", "A bear."],
    "mention": ["bear", "wolf", "bear"],
    "entity_id": ["10", "20", None],
    "group": ["7", "7", "8"],
    "candidate_ids": [["10", "20"], None, []],
    "image_uri": [None, "a.png", None],
}
ENTITIES: dict[str, Any] = {"entity_id": ["10", "20"], "name": ["bear", "wolf"], "popularity": [2.0, None]}


def write(path: Path, table: pa.Table | dict[str, Any], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return str(path)


def read_all(corpus: str) -> list[dict[str, Any]]:
    plan = plan_shards(corpus, 2)
    return [row for shard in plan for row in read_rows(shard, list(MENTION_COLUMNS)).to_pylist()]


# --- No extension type -----------------------------------------------------------------------------------------------


class Planted(pa.ExtensionType):  # type: ignore[misc]
    """Stands for Ray's type of Python objects, which unpickles where this one counts."""

    made = 0

    def __init__(self) -> None:
        super().__init__(pa.binary(), "planted")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"cposix\nsystem"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Planted:
        cls.made += 1
        return cls()


@pytest.fixture
def planted() -> Iterator[pa.Array]:
    pa.register_extension_type(Planted())
    Planted.made = 0
    yield pa.ExtensionArray.from_storage(Planted(), pa.array([b"x"] * 3, pa.binary()))
    pa.unregister_extension_type("planted")


def read_planted_file(uri: str) -> pa.Table:
    return read_file(pa.table({"uri": [uri]}))


READERS: dict[str, Callable[[str], Any]] = {
    "mentions": lambda uri: plan_shards(uri, 10),
    "entities": read_entities,
    "names": read_names,
    "demonstrations": lambda uri: read_demonstrations(uri, {}),
    "gold": read_gold,
    "gallery": lambda uri: read_drawn_mentions(uri, ["1"]),
    "output": lambda uri: read_columns(uri, ["mention_id"]),
    "examples": read_planted_file,
    "bytes": lambda uri: parquet.from_bytes(Path(uri).read_bytes(), uri),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_extension_type_is_refused_before_it_is_made(tmp_path: Path, planted: pa.Array, reader: str) -> None:
    for name in ("x", "xx", "xxx"):  # moves the type's name in the base 64 of the schema
        nested = pa.StructArray.from_arrays([planted], names=["inner"])
        for column in (planted, nested):
            table = pa.table(MENTIONS | {"name": ["a", "b", "c"]}).append_column(name, column)
            uri = write(tmp_path / "planted.parquet", table)
            Planted.made = 0
            with pytest.raises(InputError, match=f"'{name}' is of 'planted'"):
                READERS[reader](uri)
            assert Planted.made == 0


def test_an_arrow_file_with_an_extension_type_is_refused(tmp_path: Path, planted: pa.Array) -> None:
    table = pa.table({"x": planted})
    with pa.ipc.new_file(str(tmp_path / "entities.arrow"), table.schema) as writer:
        writer.write_table(table)
    Planted.made = 0
    with pytest.raises(pa.ArrowInvalid, match="extension type"):
        parquet.open_arrow(tmp_path / "entities.arrow")
    assert Planted.made == 0
    (tmp_path / "short").write_bytes(b"ARROW1")
    with pytest.raises(pa.ArrowInvalid):
        parquet.open_arrow(tmp_path / "short")


# --- Bounded reading -------------------------------------------------------------------------------------------------


def repeated(value: Any, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def corpus(num_rows: int = 4, **columns: Any) -> dict[str, Any]:
    short = {"mention_id": list(map(str, range(num_rows))), "text": ["t"] * num_rows, "mention": ["t"] * num_rows}
    return short | columns


def of_first_row(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays([0, *[len(values)] * 4], values)


BOMBS: dict[str, Callable[[], dict[str, Any]]] = {
    "nulls": lambda: corpus(candidate_ids=of_first_row(pa.nulls(36_000_000, pa.string()))),
    "text": lambda: corpus(text=["a", "x" * 270_000_000, "b", "c"]),
    "ids": lambda: corpus(500_000, mention_id=repeated("y" * 2000, 500_000)),
    "form": lambda: corpus(4000, mention=repeated("y" * 100_000, 4000)),
    "picture": lambda: corpus(1000, image_bytes=repeated(b"y" * 400_000, 1000)),
    "candidates": lambda: corpus(candidate_ids=of_first_row(repeated("y" * 200_000, 2000))),
}
MEASURE = """
import json, resource, sys
from gemel_engine.pipeline.corpus import order_by_surface_form, plan_shards, read_rows
from gemel_engine.pipeline.output import read_columns
from gemel_engine.errors import InputError
from gemel_engine.types import MENTION_COLUMNS
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
base, messages = peak(), []
for path in sys.argv[1:]:
    try:
        plan = plan_shards(path, 1024)
        order_by_surface_form(plan)
        read_rows(plan[0], list(MENTION_COLUMNS))
        messages.append("read")
    except InputError as error:
        messages.append(str(error))
print(json.dumps([messages, peak() - base]))
"""


def test_small_files_take_no_gigabytes(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.parquet", make(), compression="zstd") for name, make in BOMBS.items()]
    assert max(map(os.path.getsize, paths)) < 200_000
    ended = subprocess.run([sys.executable, "-c", MEASURE, *paths], check=True, capture_output=True, text=True)
    messages, growth = json.loads(ended.stdout)
    of_bomb = dict(zip(BOMBS, messages, strict=True))
    assert growth < 700 << 20
    assert "repeats 1 mention_id" in of_bomb.pop("ids")
    for name, message in of_bomb.items():
        assert f"{name}.parquet: " in message
        assert "MiB of memory, more than 256 MiB and 100 times the file's size" in message


def test_equal_pictures_of_a_few_rows_are_read(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", corpus(40, image_bytes=repeated(b"y" * 1_000_000, 40)))
    assert {row["image_bytes"] for row in read_all(uri)} == {b"y" * 1_000_000}


def test_pieces_of_large_rows_are_few_rows(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "a.parquet",
        corpus(24, image_bytes=[bytes([row]) * 4_000_000 for row in range(24)]),
        compression="lz4",
    )
    with parquet.open_table(uri, MENTION_COLUMNS) as table:
        sizes = [piece.nbytes for piece in table.pieces(["image_bytes"], range(3, 20))]
        assert max(sizes) < 80 << 20
        assert table.read(["image_bytes"], range(3, 5))["image_bytes"].to_pylist() == [
            b"\3" * 4_000_000,
            b"\4" * 4_000_000,
        ]


def test_rows_are_those_asked_for_in_any_row_group(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", corpus(100), row_group_size=7)
    with parquet.open_table(uri, MENTION_COLUMNS) as table:
        for rows in (range(100), range(6, 8), range(13, 50), range(99, 100), range(5, 5)):
            assert table.read(["mention_id"], rows)["mention_id"].to_pylist() == [str(row) for row in rows]
        wanted = pa.array([0, 6, 7, 50, 99]).to_numpy()
        assert table.take(["mention_id"], wanted, max_rows=3)["mention_id"].to_pylist() == ["0", "6", "7", "50", "99"]


def test_a_footer_is_checked_once_for_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_shards(write(tmp_path / "mentions.parquet", MENTIONS, row_group_size=1), 1)
    monkeypatch.setattr(parquet_footer, "_Thrift", None)
    assert [read_rows(shard, ["mention"])["mention"].to_pylist() for shard in plan] == [["bear"], ["wolf"], ["bear"]]


def test_a_damaged_file_is_an_input_error_however_late_it_is_found(tmp_path: Path) -> None:
    draw, outcomes = random.Random(5), {"refused": 0, "late": 0, "read": 0}
    messages: list[str] = []
    rows = corpus(
        150,
        text=[f"text {row % 17} " * 9 for row in range(150)],
        candidate_ids=[[f"Q{row}", f"Q{row % 3}"] for row in range(150)],
        image_features=[[float(row)] * 3 for row in range(150)],
    )
    for number in range(120):
        uri = write(tmp_path / "a.parquet", rows, row_group_size=50, use_dictionary=number % 2 == 0)
        content = bytearray(Path(uri).read_bytes())
        footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        for _ in range(draw.choice([1, 5])):
            content[draw.randrange(*((4, footer) if number % 3 else (footer, len(content))))] = draw.randrange(256)
        Path(uri).write_bytes(content)
        outcome = "refused"
        try:
            plan = plan_shards(uri, 100)
            outcome = "late"
            for shard in plan:
                stages.read_mentions(
                    pa.Table.from_pylist([asdict(shard)]), str(tmp_path / "output"), ("image_features",)
                )
            outcome = "read"
        except InputError as error:
            messages.append(str(error))
        outcomes[outcome] += 1
    assert all(str(tmp_path) in message for message in messages)
    assert all(outcomes.values())


# --- No rows left out ------------------------------------------------------------------------------------------------


def test_a_linked_directory_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/b.parquet", {**MENTIONS, "mention_id": ["4", "5", "6"]})
    write(tmp_path / "corpus/a.parquet", MENTIONS)
    (tmp_path / "corpus/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "corpus")
    assert [row["mention_id"] for row in read_all(str(tmp_path / "corpus"))] == ["1", "2", "3", "4", "5", "6"]


def test_an_unreadable_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", MENTIONS)
    write(tmp_path / "closed/b.parquet", MENTIONS)
    scan = os.scandir

    def scandir(path: str) -> Any:  # who runs the tests may read everything
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InputError, match=r"cannot list all of .*Permission denied.*closed.*: make it readable"):
        plan_shards(str(tmp_path), 10)


@pytest.mark.parametrize(
    ("directory", "left_out"), [("group=7", "group"), ("_y=1/group=7", "group"), ("entity_id=1/lang=en", "entity_id")]
)
def test_a_column_in_the_name_of_a_directory_is_refused(tmp_path: Path, directory: str, left_out: str) -> None:
    rows = {name: values for name, values in MENTIONS.items() if name != left_out}
    write(tmp_path / "x=1" / directory / "a.parquet", rows)
    with pytest.raises(InputError, match=f"has its '{left_out}' in the name of a directory: write it as a column"):
        plan_shards(str(tmp_path), 10)
    write(tmp_path / "x=1" / directory / "a.parquet", MENTIONS)
    assert len(read_all(str(tmp_path))) == 3


def test_tables_of_other_names_are_read_and_pipes_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(["a.PARQUET", "b.parq", "c.pq", "_lang=en/d.parquet", "_hidden/e.parquet"]):
        write(tmp_path / name, {**MENTIONS, "mention_id": [f"{number}{row}" for row in IDS]})
    assert {row["mention_id"][0] for row in read_all(str(tmp_path))} == {"0", "1", "2", "3"}
    os.mkfifo(tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"f\.parquet'? is a pipe"):
        plan_shards(str(tmp_path), 10)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1\xff\xff\xff\xffPAR1"])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet table"):
        plan_shards(str(tmp_path), 10)


# --- Tables as other tools write them --------------------------------------------------------------------------------

INTEGERS = {"mention_id", "entity_id", "group"}


def as_written(kind: str) -> pa.Table:
    """The mentions, in the types of another tool."""
    table = pa.table(MENTIONS)
    types: dict[str, Callable[[pa.Field], pa.DataType]] = {
        "large": lambda field: pa.large_string(),
        "view": lambda field: pa.string_view(),
        "binary": lambda field: pa.binary(),
        "category": lambda field: pa.dictionary(pa.int32(), pa.string()),
        "integers": lambda field: pa.int64() if field.name in INTEGERS else pa.string(),
        "unsigned": lambda field: pa.uint64() if field.name in INTEGERS else pa.string(),
    }
    item = {"integers": pa.int32(), "large": pa.large_string(), "view": pa.string_view()}.get(kind, pa.string())
    lists = {"large": pa.large_list(item), "view": pa.list_view(item)}.get(kind, pa.list_(item))
    columns = {}
    for field in table.schema:
        wanted = lists if field.name == "candidate_ids" else types[kind](field)
        if pa.types.is_dictionary(wanted):
            columns[field.name] = table[field.name].dictionary_encode()
        else:
            columns[field.name] = pa.array([_value(value, wanted) for value in table[field.name].to_pylist()], wanted)
    return pa.table(columns)


def _value(value: Any, wanted: pa.DataType) -> Any:
    if isinstance(value, list):
        return [_value(item, wanted.value_type) for item in value]
    if value is not None and pa.types.is_integer(wanted):
        return int(value)
    return value.encode() if value is not None and pa.types.is_binary(wanted) else value


@pytest.mark.parametrize("kind", ["large", "view", "binary", "category", "integers", "unsigned"])
def test_mentions_are_the_same_in_the_types_of_every_tool(tmp_path: Path, kind: str) -> None:
    plain, other = write(tmp_path / "a.parquet", MENTIONS), write(tmp_path / "b.parquet", as_written(kind))
    assert read_all(other) == read_all(plain)
    assert read_gold(other).equals(read_gold(plain))
    of_other, of_plain = (read_demonstrations(uri, {"10": "x", "20": "y"}) for uri in (other, plain))
    assert list(map(asdict, of_other)) == list(map(asdict, of_plain))
    assert read_drawn_mentions(other, IDS) == read_drawn_mentions(plain, IDS)
    assert read_columns(other, ["mention_id"]).equals(read_columns(plain, ["mention_id"]))


def test_an_integer_is_no_text_and_the_message_says_where(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.parquet", MENTIONS | {"text": [1, 2, 3]})
    with pytest.raises(InputError, match=r"a\.parquet: column 'text' is of type int64, it must be string: cast it"):
        plan_shards(uri, 10)
    uri = write(tmp_path / "a.parquet", MENTIONS | {"entity_id": [1.0, 2.0, None]})
    with pytest.raises(InputError, match="column 'entity_id' is of type double, it must be string: cast it"):
        read_gold(uri)
    uri = write(tmp_path / "a.parquet", {**ENTITIES, "popularity": ["much", "less"]})
    with pytest.raises(InputError, match="column 'popularity' is of type string, it must be number: cast it"):
        read_entities(uri)


@pytest.mark.parametrize("first", ["a", "b"])
def test_a_column_of_nulls_alone_has_the_type_of_the_other_files(tmp_path: Path, first: str) -> None:
    names = [name for name in MENTIONS if name not in ("mention_id", "text", "mention")]
    nulls = pa.table({**MENTIONS, "mention_id": ["4", "5", "6"]} | {name: pa.nulls(3) for name in names})
    nulls = nulls.append_column("mention_start", pa.nulls(3)).append_column("image_features", pa.nulls(3))
    second = {"a": "b", "b": "a"}[first]
    write(tmp_path / f"{first}.parquet", nulls)
    write(tmp_path / f"{second}.parquet", MENTIONS)
    write(tmp_path / "c.parquet", pa.table({name: pa.nulls(0) for name in MENTIONS}))  # of no rows
    rows = sorted(read_all(str(tmp_path)), key=lambda row: str(row["mention_id"]))
    assert [row["entity_id"] for row in rows] == ["10", "20", None, None, None, None]
    gold = read_gold(str(tmp_path))
    assert sorted(gold["entity_id"].drop_null().to_pylist()) == ["10", "20"]
    assert len(gold) == 6
    assert len(read_demonstrations(str(tmp_path), {"10": "x", "20": "y"})) == 2


def test_entities_of_several_tools_are_one_table(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet", {**ENTITIES, "entity_id": [10, 20], "popularity": pa.nulls(2), "aliases": pa.nulls(2)}
    )
    write(tmp_path / "b.parquet", {"entity_id": ["Q1"], "name": pa.array(["x"], pa.string_view()), "popularity": [3]})
    write(
        tmp_path / "c.parquet",
        {"entity_id": pa.array(["Q2"]).dictionary_encode(), "name": [1984], "description": ["d"]},
    )
    table = read_entities(str(tmp_path))
    assert table["entity_id"].to_pylist() == ["10", "20", "Q1", "Q2"]
    assert table["name"].to_pylist() == ["bear", "wolf", "x", "1984"]
    assert table["popularity"].to_pylist() == [None, None, 3.0, None]
    assert table["description"].to_pylist() == [None, None, None, "d"]
    assert read_names(str(tmp_path)) == {"10": "bear", "20": "wolf", "Q1": "x", "Q2": "1984"}


def test_a_picture_of_hugging_face_is_its_bytes_or_its_address(tmp_path: Path) -> None:
    pictures = [{"bytes": b"a", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
    for number, known in enumerate(({}, {"image_uri": [None, None, "c.png"]}, {"image_uri": pa.nulls(3)})):
        rows = {name: values for name, values in MENTIONS.items() if name != "image_uri"} | known
        uri = write(tmp_path / f"{number}.parquet", rows | {"image_bytes": pictures})
        found = read_all(uri)
        assert [row["image_bytes"] for row in found] == [b"a", None, None]
        assert [row["image_uri"] for row in found] == [None, "b.png", "c.png" if number == 1 else None]
        assert read_gold(uri)["has_picture"].to_pylist() == [True, True, number == 1]


def test_labels_of_integers_are_those_of_the_run_s_strings(tmp_path: Path) -> None:
    linked = write(tmp_path / "input.parquet", MENTIONS)
    gold = write(tmp_path / "gold.parquet", {"mention_id": [2, 1], "entity_id": [20, None]})
    labels = read_gold(gold, linked)
    assert labels.select(["mention_id", "entity_id", "mention"]).to_pylist() == [
        {"mention_id": "2", "entity_id": "20", "mention": "wolf"},
        {"mention_id": "1", "entity_id": None, "mention": "bear"},
    ]


def test_each_object_is_opened_by_one_request_and_in_its_turn(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call = [], S3FileSystem._call_s3

    async def call_and_note(client: S3FileSystem, method: str, *arguments: Any, **options: Any) -> Any:
        calls.append(method)
        return await call(client, method, *arguments, **options)

    uri = f"{s3_server.uri}/many"
    for name in "abc":
        storage.write_bytes(f"{uri}/{name}.parquet", parquet.parquet_bytes(pa.table({"mention_id": [name]})))
    monkeypatch.setattr(S3FileSystem, "_call_s3", call_and_note)
    assert [table.read()["mention_id"].to_pylist() for table in parquet.open_tables(uri)] == [["a"], ["b"], ["c"]]
    assert (calls.count("get_object"), calls.count("head_object")) == (3, 1)
    listed = storage.list_tables(uri)[1]
    storage.write_bytes(listed.uri, b"damaged")
    tables = parquet.open_tables(uri)
    assert next(tables).file.uri == f"{uri}/a.parquet"
    with pytest.raises(InputError, match=r"many/b\.parquet is not a readable Parquet table"):
        next(tables)
    with pytest.raises(InputError, match="was replaced while it was read"):
        parquet.open_table(listed.uri, file=listed)
    storage.remove_tree(uri)


def test_an_output_that_a_tool_has_written_again_is_read(tmp_path: Path) -> None:
    rows = {"mention_id": pa.array(["a"], pa.large_string()), "entity_id": pa.nulls(1), "log_prob": [-1.0]}
    table = parquet.read_tables(write(tmp_path / "a.parquet", rows), PREDICTION_COLUMNS, list(rows))
    assert table.schema.types == [pa.string(), pa.string(), pa.float64()]


def test_a_full_disk_or_a_broken_network_does_not_make_a_file_unreadable() -> None:
    for number, kind in ((errno.ENOSPC, OSError), (errno.EIO, OSError), (None, InputError)):
        with pytest.raises(kind), explain_unreadable("a.parquet"):
            raise OSError("damaged") if number is None else OSError(number, "no answer")

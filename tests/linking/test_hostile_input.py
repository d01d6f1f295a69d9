"""Rows that no honest corpus holds: each comes out once, linked or with an error, and no other row notices."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.corpus import toml
from support.names import ENTITY_NAMES

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import MentionError
from gemel_engine.linker import Linker
from gemel_engine.linking.stages import GenerateEntityNames, read_with_places, write_ordered
from gemel_engine.pipeline.corpus import Shard, order_by_surface_form, plan_shards
from gemel_engine.pipeline.stages import EncodeImages, Retrieve, read_mentions
from gemel_engine.types import PREDICTION_SCHEMA, Mention

KINDS = {kind.kind for kind in MentionError.__subclasses__()}
ROWS_PER_BATCH = 8
MEGABYTE = "x" * 1_000_000


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


# What text fields are made of. A field is bytes, since Parquet takes those that are no text, too.
PIECES = [
    *("<|endoftext|>", "<|begin|>", "[Text]", "[Question]", "[Answer]", "\n", "\r", "\t", " ", "\0", "\x1b", "\ufeff"),
    *("{text}", "{mention}", "{0}", "%s", "\u202e", "\u200f", "\ufffd", "e\u0301", "北京", "\U0001f43b", "bear", "x"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map(lambda pieces: "".join(pieces).encode())
BAD_TEXTS = st.sampled_from(
    [None, b"", b" \n", b"\xff", b"\xed\xa0\x80", b"bear\xc3", b"bear " * 999, MEGABYTE.encode()]
)
IDS = ["", "\0", "\u202e", "\n", "x" * 100_000, "<|endoftext|>"]
FEATURES: list[list[float] | list[None]] = [
    [],
    [1.0],
    [None] * 64,
    *([value] * 64 for value in (0.5, 9e5, 1e7, 3e38, 1e300, math.inf, math.nan)),
]
PICTURES = [
    b"",
    b"no picture",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    encoded(Image.new("RGB", (40, 40), "red"), "PNG"),
    encoded(Image.new("RGB", (40, 40), "red"), "PNG")[:60],
    encoded(Image.new("CMYK", (9, 9)), "JPEG"),
    encoded(Image.new("P", (1, 1)), "GIF", save_all=True, append_images=[Image.new("P", (1, 1), 1)]),
    encoded(Image.fromarray(np.zeros((3, 3), np.uint16)), "PNG"),
    encoded(Image.new("L", (1, 60_000)), "PNG"),
    encoded(Image.new("1", (60_000, 1_000)), "PNG"),
]
ADDRESSES = [
    *(
        "",
        " ",
        "\0",
        "/",
        "..",
        "DIRECTORY/bear.png",
        "DIRECTORY/../bear.png",
        "DIRECTORY/absent.png",
        "file:///etc/hosts",
    ),
    *("http://user:SECRET@127.0.0.1/", "http://[", "http://169.254.169.254/latest", "ftp://host/a?token=SECRET"),
    *("s3://bucket/a?X-Amz-Signature=SECRET", "DIRECTORY/" + "a" * 5_000, "//user:SECRET@host/", MEGABYTE),
]
CANDIDATES = [
    *([], [None], [""], ["Q1", None], ["Q1", "Q1"], ["Q9", "Q3"], ["Q1", "no entity"], ["\0"], ["x" * 10_000]),
]

Row = dict[str, Any]
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("mention_id", "text", "mention", "image_uri", "group"), pa.binary()),
        "mention_start": pa.int64(),
        "image_bytes": pa.binary(),
        "candidate_ids": pa.list_(pa.string()),
        "image_features": pa.list_(pa.float64()),
    }
)

HOSTILE: dict[str, st.SearchStrategy[Any]] = {
    "mention_id": st.sampled_from(IDS).map(str.encode),
    "text": TEXTS | BAD_TEXTS,
    "mention": TEXTS | BAD_TEXTS,
    "mention_start": st.sampled_from([0, 1, -1, -5, 2**31, 2**62, -(2**63)]),
    "image_bytes": st.sampled_from(PICTURES),
    "image_uri": st.sampled_from(ADDRESSES).map(str.encode),
    "candidate_ids": st.sampled_from(CANDIDATES),
    "image_features": st.sampled_from(FEATURES),
    "group": st.sampled_from([b"", b"g", b"\xff"]),
}
# Hostile in a few fields: else the first check would keep a row from all others.
ROWS = st.sets(st.sampled_from(sorted(HOSTILE)), max_size=3).flatmap(
    lambda fields: st.fixed_dictionaries(
        {"mention_id": st.just(b""), "text": st.just(b"Look at the bear."), "mention": st.just(b"bear")}
        | {field: HOSTILE[field] for field in fields}
    )
)
INNOCENT: list[Row] = [
    {"text": b"Look at the steam train.", "mention": b"steam train", "mention_start": 12},
    {"text": b"A bear plays the drums.", "mention": b"bear", "image_uri": b"DIRECTORY/bear.png"},
    {"text": b"A star.", "mention": b"star", "candidate_ids": ["Q15", "Q16"]},
]


@dataclass(frozen=True)
class Chain:
    """All stages of a linking job, one after the other, on tiny models."""

    directory: Path
    encode: EncodeImages
    retrieve: Retrieve
    generate: GenerateEntityNames

    def link(self, rows: Sequence[Mapping[str, Any]], *, ordered: bool) -> list[Row]:
        """Predictions in the order of the rows; `ordered` takes the way of a corpus that is sorted before it is cut."""
        filled = [dict.fromkeys(SCHEMA.names) | dict(row) for row in rows]
        for row in filled:
            row["image_uri"] = row["image_uri"] and row["image_uri"].replace(b"DIRECTORY", str(self.directory).encode())
        table = pa.Table.from_pylist(filled, schema=SCHEMA)
        for name in ("mention_id", "text", "mention", "image_uri", "group"):
            strings = pa.chunked_array([chunk.view(pa.string()) for chunk in table[name].chunks], pa.string())
            table = table.set_column(table.column_names.index(name), name, strings)
        if ordered:
            table = table.drop_columns(["image_bytes", "image_features"])
        corpus = self.directory / "corpus.parquet"
        pq.write_table(table, corpus)
        (shard,) = plan_shards(str(corpus), 1000)
        if ordered:
            shard = self._sorted(shard)
        columns = ("image_bytes", "image_uri", "image_features")
        batch = read_mentions(pa.Table.from_pylist([asdict(shard)]), str(self.directory), columns)
        linked = self.generate(self.retrieve(self.encode(batch)))
        predictions: list[Row] = linked.select(PREDICTION_SCHEMA.names).to_pylist()
        places = {row["mention_id"].decode(): place for place, row in enumerate(rows)}
        return sorted(predictions, key=lambda prediction: places[prediction["mention_id"]])

    def _sorted(self, shard: Shard) -> Shard:
        places = order_by_surface_form([shard])
        assert places is not None
        of_rows = pa.LargeListArray.from_arrays([0, len(places)], places)
        table = read_with_places(pa.Table.from_pylist([asdict(shard)]).append_column("places", of_rows))
        write_ordered(table.sort_by("place"), f"{self.directory}/ordered", 1000)
        (ordered,) = plan_shards(f"{self.directory}/ordered", 1000)
        return ordered


@pytest.fixture(scope="module")
def config(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LinkConfig:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "bear.png").write_bytes(encoded(Image.new("RGB", (40, 40), "brown"), "PNG"))
    (directory / "link.toml").write_text(toml(artifacts, "mentions.parquet", directory))
    config = load_config(LinkConfig, directory / "link.toml")
    return replace(
        config,
        image_source=replace(config.image_source, allowed_prefixes=(str(directory),)),
        retrieval=replace(config.retrieval, num_similar_pictures=1),
        search=replace(config.search, max_rollouts=2),
    )


@pytest.fixture(scope="module")
def chain(config: LinkConfig) -> Chain:
    return Chain(
        Path(config.output),
        EncodeImages(config),
        Retrieve(config),
        GenerateEntityNames(config),
    )


@pytest.fixture(scope="module")
def alone(chain: Chain) -> list[Row]:
    """What becomes of each innocent row in a batch of its own."""
    return [chain.link([{"mention_id": b"a"} | row], ordered=False)[0] for row in INNOCENT]


def check_batch(
    chain: Chain, alone: Sequence[Row], rows: Iterable[Row], innocent: Mapping[int, int], ordered: bool
) -> None:
    """Link hostile rows with innocent ones in some of their places, and look at all that comes out."""
    batch = [dict(row) for row in rows]
    for place, number in innocent.items():
        batch[place] = {"mention_id": b"innocent", **INNOCENT[number]}
    for place, row in enumerate(batch):
        row["mention_id"] = b"%d%s" % (place, row["mention_id"])
    predictions = chain.link(batch, ordered=ordered)
    assert [prediction["mention_id"].encode() for prediction in predictions] == [row["mention_id"] for row in batch]
    for place, prediction in enumerate(predictions):
        if place in innocent:
            expected = alone[innocent[place]]
            assert (prediction["entity_id"], prediction["error"]) == (expected["entity_id"], None)
            assert prediction["log_prob"] == pytest.approx(expected["log_prob"], abs=1e-3)
            assert prediction["demonstration_ids"] == expected["demonstration_ids"]
        elif prediction["error"] is None:
            assert prediction["entity_name"] in ENTITY_NAMES
            assert -math.inf < prediction["log_prob"] <= 0 <= prediction["probability"] <= 1
        else:
            assert prediction["error"].partition(": ")[0] in KINDS
            assert len(prediction["error"]) < 1000
            assert "SECRET" not in prediction["error"]
            assert prediction["entity_id"] is None


BATCHES: dict[str, Any] = {
    "rows": st.lists(ROWS, min_size=ROWS_PER_BATCH, max_size=ROWS_PER_BATCH),
    "innocent": st.dictionaries(st.integers(0, ROWS_PER_BATCH - 1), st.integers(0, len(INNOCENT) - 1), max_size=3),
    "ordered": st.sampled_from([False, False, True]),
}
SETTINGS = {"suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@settings(max_examples=20, **SETTINGS)  # type: ignore[arg-type]
@given(**BATCHES)
def test_hostile_rows_come_out_once_and_leave_the_others_alone(chain: Chain, alone: list[Row], **batch: Any) -> None:
    check_batch(chain, alone, **batch)


@pytest.mark.heavy
@settings(max_examples=1250, **SETTINGS)  # type: ignore[arg-type]
@given(**BATCHES)
def test_ten_thousand_hostile_rows(chain: Chain, alone: list[Row], **batch: Any) -> None:
    check_batch(chain, alone, **batch)


# What no Parquet file holds, but a notebook's strings may.
MISTAKES = {
    "half of a surrogate pair": Mention("a", "A bear \ud83d.", "bear"),
    r"'\\udc3b', half": Mention("a", "A bear.", "bear\udc3b"),
    "the mention is empty": Mention("a", "A bear.", "\u2003\u200b"),
    "the text is empty": Mention("a", "", "bear"),
    "mention has 1000000 char": Mention("a", MEGABYTE, MEGABYTE),
    "at mention_start -5": Mention("a", "bear!", "bear", mention_start=-5),
    "holds a null": Mention("a", "A bear.", "bear", candidate_ids=("Q3", None)),  # type: ignore[arg-type]
    r"\\udc3b'\] are not": Mention("a", "A bear.", "bear", candidate_ids=("\udc3b",)),
}


def test_a_mistake_in_a_notebook_is_named_and_leaves_the_others_alone(config: LinkConfig) -> None:
    linker = Linker(config)
    honest = Mention("honest", "A bear plays the drums.", "Bear")  # not in these letters in the text
    *mistaken, linked = linker.link([*MISTAKES.values(), honest], [None] * (len(MISTAKES) + 1))
    for message, prediction in zip(MISTAKES, mistaken, strict=True):
        assert re.search(message, prediction.error or ""), prediction.error
        assert prediction.entity_id is None
    alone = linker.link_one(honest.text, honest.mention)
    assert alone.error is None
    assert (linked.mention_id, linked.entity_id) == ("honest", alone.entity_id)
    assert linked.log_prob == pytest.approx(alone.log_prob, abs=1e-3)
    cut = linker.link_one(MEGABYTE, "bear")
    assert (cut.error, (cut.num_characters_dropped or 0) > len(MEGABYTE) - 10_000) == (None, True)
    assert (linker.link_one(honest.text, honest.mention, b"no picture").error or "").startswith("image: 10 bytes")

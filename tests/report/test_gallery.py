"""The mentions that a report shows: which are drawn, and that their texts, pictures and demonstrations are found."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.tables import damage, make_tokenizer

from gemel_engine.config.components import ImagePolicy, KnowledgeBaseSettings
from gemel_engine.errors import ImageError, InputError
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.report.entities import ShownEntity
from gemel_engine.report.gallery import GalleryItem, ShownDemonstration, gallery_items
from gemel_engine.report.pictures import shrink
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import PREDICTION_SCHEMA

SIZE = 40
GROUP = 10  # rows of a row group


def picture(seed: int = 0, edge: int = 8) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (edge, edge, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def predictions(**columns: list[Any]) -> pa.Table:
    rows = [dict.fromkeys(PREDICTION_SCHEMA.names) | {"mention_id": f"m{n}"} for n in range(SIZE)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def write_corpus(path: Path, prefix: str = "m", **columns: list[Any]) -> str:
    """Mentions of two types of strings, in files of several row groups."""
    table = pa.table(
        {
            "mention_id": pa.array([f"{prefix}{n}" for n in range(SIZE)], pa.large_string()),
            "text": [f"Bear {n} plays." for n in range(SIZE)],
            "mention": ["Bear"] * SIZE,
            "mention_start": pa.array([0] * SIZE, pa.int32()),
            **columns,
        }
    )
    path.mkdir()
    half = SIZE // 2
    pq.write_table(table.slice(0, half), path / "a.parquet", row_group_size=GROUP, use_dictionary=False)
    pq.write_table(table.slice(half), path / "b.parquet", row_group_size=GROUP, use_dictionary=False)
    return str(path)


def judged(right: Sequence[bool | None]) -> pa.Table:
    """In another order than the predictions, and with a mention that is none of them."""
    rows = [
        {"mention_id": f"m{n}", "entity_id": f"Q{n}", "entity_name": None, "right": answer}
        for n, answer in enumerate(right)
    ]
    return pa.Table.from_pylist([{**rows[0], "mention_id": "other"}, *reversed(rows)])


def test_each_kind_is_drawn_as_often_as_any_other(tmp_path: Path) -> None:
    is_error = [n in (3, 30) for n in range(SIZE)]
    is_right = [n % 10 != 0 for n in range(SIZE)]
    table = predictions(
        certified=[None if error else True for error in is_error], error=["image: bad" if e else None for e in is_error]
    )
    right = [False if error else answer for error, answer in zip(is_error, is_right, strict=True)]
    items = gallery_items(table, write_corpus(tmp_path / "mentions"), size=8, judged=judged(right))
    counts = Counter((item.right, item.prediction["error"] is not None) for item in items)
    assert counts == {(True, False): 3, (False, False): 3, (False, True): 2}
    assert all(item.gold_id == f"Q{item.mention.mention_id[1:]}" for item in items)
    again = gallery_items(table, str(tmp_path / "mentions"), size=8, judged=judged(right))
    assert again == items
    other = gallery_items(table, str(tmp_path / "mentions"), size=8, judged=judged(right), seed=1)
    assert other != items


def test_all_come_when_there_are_few_and_none_need_gold(tmp_path: Path) -> None:
    items = gallery_items(predictions(), write_corpus(tmp_path / "mentions"), size=1000)
    assert {item.mention.mention_id for item in items} == {f"m{n}" for n in range(SIZE)}
    assert all(item.mention.text == f"Bear {item.mention.mention_id[1:]} plays." for item in items)
    assert {(item.right, item.gold_id, item.picture.data) for item in items} == {(None, None, None)}
    assert gallery_items(predictions().slice(0, 0), str(tmp_path / "mentions"), size=5) == []


def test_predictions_may_have_more_text_than_one_array(tmp_path: Path) -> None:
    pools = [[{"entity_id": "x" * ((64 << 20) * (n == 0)), "score": 1.0, "reasons": []}] for n in range(SIZE)]
    chunk = predictions(pool=pools, certified=[n > 0 for n in range(SIZE)]).slice(0, 2)
    table = pa.concat_tables([chunk] * 33)
    items = gallery_items(table, write_corpus(tmp_path / "mentions"), size=2)
    assert {item.mention.mention_id for item in items} == {"m0", "m1"}


def test_pictures_are_shown_small_and_bad_ones_say_why(tmp_path: Path) -> None:
    allowed = tmp_path / "pictures"
    allowed.mkdir()
    (allowed / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").write_bytes(picture(2))
    files: list[Any] = [picture(n, 300) if n > 35 else None for n in range(SIZE)]
    files[3] = b"no picture"
    addresses = [None, str(allowed / "1.png"), str(tmp_path / "2.png"), *[None] * (SIZE - 3)]
    corpus = write_corpus(tmp_path / "mentions", image_bytes=files, image_uri=addresses)
    policy = ImagePolicy(allowed_prefixes=(str(allowed),))
    items = gallery_items(predictions(), corpus, size=SIZE, image_source=policy)
    shown = {item.mention.mention_id: item.picture for item in items}
    assert (shown["m0"].data, shown["m0"].fault) == (None, None)
    assert shown["m1"].data is not None
    assert "under none of allowed_prefixes" in (shown["m2"].fault or "")
    assert "image: 10 bytes are not a picture" in (shown["m3"].fault or "")
    for n in range(36, SIZE):
        data = shown[f"m{n}"].data
        assert data is not None
        assert len(data) <= 20_000
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == "WEBP"
            assert max(image.size) <= 256
    unread = gallery_items(predictions(), corpus, size=SIZE)
    assert {item.picture.data for item in unread if item.mention.mention_id in ("m1", "m2")} == {None}


def test_row_groups_without_a_drawn_mention_are_not_read(tmp_path: Path) -> None:
    """The pictures of all others are damaged on the disk."""
    corpus = write_corpus(tmp_path / "mentions", image_bytes=[picture(n) for n in range(SIZE)])
    (item,) = gallery_items(predictions(), corpus, size=1)
    number = int(item.mention.mention_id[1:])
    for first, path in ((0, tmp_path / "mentions/a.parquet"), (SIZE // 2, tmp_path / "mentions/b.parquet")):
        damage(
            path, "image_bytes", [group for group in range(SIZE // 2 // GROUP) if group != (number - first) // GROUP]
        )
    assert gallery_items(predictions(), corpus, size=1) == [item]
    with pytest.raises(InputError, match="is not a readable Parquet table"):
        gallery_items(predictions(), corpus, size=SIZE)


def test_demonstrations_come_in_the_order_of_the_prompt_with_their_pictures(
    tmp_path: Path, encoder: MentionEncoder
) -> None:
    demonstrations = [Demonstration(f"t{n}", f"Wolf {n}.", "Wolf", f"Q{n}", f"wolf {n}", f"t{n}") for n in range(5)]
    index = DemonstrationIndex.build(tmp_path / "index", demonstrations, encoder)
    training = write_corpus(tmp_path / "train", prefix="t", image_bytes=[picture(n) for n in range(SIZE)])
    table = predictions(demonstration_ids=[["t3", "t0", "t3"]] * SIZE)
    corpus = write_corpus(tmp_path / "mentions")
    (item,) = gallery_items(table, corpus, index, size=1, training=training)
    assert names(item) == ["wolf 3", "wolf 0", "wolf 3"]
    assert [shown.picture.data for shown in item.demonstrations] == [shrink(picture(n), 80) for n in (3, 0, 3)]
    (item,) = gallery_items(table, corpus, index, size=1)
    assert {shown.picture.data for shown in item.demonstrations} == {None}
    for path in Path(training).iterdir():
        rows = pq.read_table(path)
        pq.write_table(rows.rename_columns({"mention_id": "id"}), path)
    (item,) = gallery_items(table, corpus, index, size=1, training=training, stored_names={"mention_id": "id"})
    assert item.demonstrations[0].picture.data == shrink(picture(3), 80)
    with pytest.raises(InputError, match=r"the index has no demonstration 't7'"):
        gallery_items(predictions(demonstration_ids=[["t7"]] * SIZE), corpus, index, size=1)


def names(item: GalleryItem) -> list[str]:
    """The names of what the prompt showed, those of cards in brackets."""
    return [
        shown.demonstration.name if isinstance(shown, ShownDemonstration) else f"[{shown.name}]"
        for shown in item.demonstrations
    ]


@pytest.fixture
def knowledge_base(tmp_path: Path) -> KnowledgeBase:
    """Three bears: with a picture in a file that may be read, in one that may not, and without any."""
    (tmp_path / "allowed").mkdir()
    for number, path in enumerate((tmp_path / "allowed/0.png", tmp_path / "1.png")):
        path.write_bytes(picture(number))
    entities = {
        "entity_id": ["Q0", "Q1", "Q2"],
        "name": ["brown bear", "polar bear", "koala"],
        "description": [" a\nbear ", "x " * 1000, None],
        "image_uri": [[str(tmp_path / "allowed/0.png"), "/elsewhere"], [str(tmp_path / "1.png")], None],
    }
    build_knowledge_base(pa.table(entities), make_tokenizer(), tmp_path / "kb", KnowledgeBaseSettings())
    return KnowledgeBase.open(tmp_path / "kb")


def with_entities(*demonstration_ids: str) -> pa.Table:
    """Rows whose candidates, pool and cards have entities that are known, and one that is not."""
    ids = ["Q1", "Q0", "gone", "Q2"]
    candidates = [{"entity_id": entity_id, "name": f"name of {entity_id}", "log_prob": -1.0} for entity_id in ids]
    pool = [{"entity_id": entity_id, "score": 1.0, "reasons": [("name", 1.0)]} for entity_id in ("Q2", "lost")]
    columns: dict[str, Any] = {"candidates": candidates, "pool": pool, "demonstration_ids": list(demonstration_ids)}
    return predictions(**{name: [value] * SIZE for name, value in columns.items()})


def test_entities_have_their_descriptions_and_pictures(tmp_path: Path, knowledge_base: KnowledgeBase) -> None:
    corpus, table = write_corpus(tmp_path / "mentions"), with_entities()
    policy = ImagePolicy(allowed_prefixes=(str(tmp_path / "allowed"),))
    (item,) = gallery_items(table, corpus, size=1, knowledge_base=knowledge_base, image_source=policy)
    brown, polar, koala, gone = (item.entity(entity_id) for entity_id in ("Q0", "Q1", "Q2", "gone"))
    assert (brown.name, brown.description, brown.picture.data) == ("brown bear", "a bear", shrink(picture(0), 80))
    assert len(polar.description) == 160
    assert "under none of allowed_prefixes" in (polar.picture.fault or "")
    assert (koala.description, koala.picture.data, koala.picture.fault) == ("", None, None)
    assert gone == ShownEntity("gone")
    assert gone.name == "gone"

    (item,) = gallery_items(table, corpus, size=1, knowledge_base=knowledge_base, image_source=ImagePolicy())
    assert {item.entity(f"Q{n}").picture for n in range(3)} == {koala.picture}  # nothing may be read
    stored = {"entity_id": ["Q2", "Q1", "other"], "image_bytes": [[None, picture(2)], [b"no picture"], [picture(3)]]}
    pq.write_table(pa.table(stored), tmp_path / "entities.parquet")
    (item,) = gallery_items(
        table, corpus, size=1, knowledge_base=knowledge_base, entities=str(tmp_path / "entities.parquet")
    )
    assert item.entity("Q2").picture.data == shrink(picture(2), 80)
    assert "10 bytes are not a picture" in (item.entity("Q1").picture.fault or "")
    assert item.entity("Q0").picture.data is None
    assert gallery_items(table, corpus, size=1)[0].entities == {}


def test_cards_stand_among_the_demonstrations(
    tmp_path: Path, encoder: MentionEncoder, knowledge_base: KnowledgeBase
) -> None:
    demonstrations = [Demonstration(f"t{n}", f"Wolf {n}.", "Wolf", f"Q{n}", f"wolf {n}", f"t{n}") for n in range(2)]
    index = DemonstrationIndex.build(tmp_path / "index", demonstrations, encoder)
    corpus, table = write_corpus(tmp_path / "mentions"), with_entities("t1", "card:Q2", "t0", "card:gone")
    (item,) = gallery_items(table, corpus, index, size=1, knowledge_base=knowledge_base)
    assert names(item) == ["wolf 1", "[koala]", "wolf 0", "[gone]"]
    (item,) = gallery_items(table, corpus, size=1, knowledge_base=knowledge_base)
    assert names(item) == ["[koala]", "[gone]"]


def test_an_output_from_before_pools_is_shown(tmp_path: Path, knowledge_base: KnowledgeBase) -> None:
    table = with_entities().drop_columns(["pool"])
    (item,) = gallery_items(table, write_corpus(tmp_path / "mentions"), size=1, knowledge_base=knowledge_base)
    assert item.entity("Q2").name == "koala"


def test_refuses_another_corpus(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "mentions", prefix="x")
    with pytest.raises(InputError, match=r"mentions has no mention 'm\d+': give the mentions that the run linked"):
        gallery_items(predictions(), corpus, size=3)
    (tmp_path / "mentions/a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet is not a readable Parquet table"):
        gallery_items(predictions(), corpus, size=3)


def test_a_thumbnail_of_noise_is_small_too() -> None:
    assert len(shrink(picture(0, 1000), 1000)) <= 20_000
    with pytest.raises(ImageError):
        shrink(b"", 80)

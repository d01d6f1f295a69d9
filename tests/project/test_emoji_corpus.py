import unicodedata
from collections import defaultdict
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.paths import ROOT

from examples.emoji.build_corpus import (
    DEV_ARTIST,
    ENTITY_SCHEMA,
    MENTION_SCHEMA,
    NUM_SAMPLE_MENTIONS,
    PICTURE_SIZE,
    TEST_ARTIST,
    TRAIN_ARTISTS,
)
from gemel_engine.vision.decode import decode_image

EMOJI = ROOT / "examples" / "emoji"
SPLITS = ("train", "dev", "test", "test_unseen")


@pytest.fixture(scope="module")
def entities() -> dict[str, dict[str, Any]]:
    return {entity["entity_id"]: entity for entity in pq.read_table(EMOJI / "entities.parquet").to_pylist()}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {split: pq.read_table(EMOJI / f"{split}.parquet").to_pylist() for split in (*SPLITS, "sample")}


def test_schemas() -> None:
    assert pq.read_schema(EMOJI / "entities.parquet").equals(ENTITY_SCHEMA)
    for split in (*SPLITS, "sample"):
        assert pq.read_schema(EMOJI / f"{split}.parquet").equals(MENTION_SCHEMA)


def test_sizes(entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]) -> None:
    assert 400 <= len(entities) <= 1_000
    assert {split: len(rows) for split, rows in splits.items()}.items() >= {"sample": NUM_SAMPLE_MENTIONS}.items()
    assert min(len(splits["train"]), len(splits["dev"]), len(splits["test"])) >= 500
    assert len(splits["test_unseen"]) >= 150
    assert sum(file.stat().st_size for file in EMOJI.rglob("*") if file.is_file()) <= 12_000_000


def test_entities_and_names_and_mentions_are_unique(
    entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]
) -> None:
    assert len(entities) == pq.read_metadata(EMOJI / "entities.parquet").num_rows
    assert len({entity["name"] for entity in entities.values()}) == len(entities)
    mention_ids = [row["mention_id"] for split in SPLITS for row in splits[split]]
    assert len(set(mention_ids)) == len(mention_ids)
    assert {row["entity_id"] for split in SPLITS for row in splits[split]} == entities.keys()


def test_text_alone_cannot_decide(entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]) -> None:
    entities_of_tag = defaultdict(set)
    for entity in entities.values():
        for name in (entity["name"], *entity["aliases"]):
            entities_of_tag[name].add(entity["entity_id"])
    for split in SPLITS:
        for row in splits[split]:
            assert row["entity_id"] in entities_of_tag[row["mention"]]
            assert len(entities_of_tag[row["mention"]]) >= 2


def test_entities_have_aliases_in_several_scripts(entities: dict[str, dict[str, Any]]) -> None:
    for entity in entities.values():
        names = [entity["name"], *entity["aliases"]]
        assert all(name and name == name.strip() for name in names)
        assert len({name.casefold() for name in names}) == len(names)
        letters = "".join(names)
        scripts = {unicodedata.name(letter, "").partition(" ")[0] for letter in letters if letter.isalpha()}
        assert scripts >= {"LATIN", "CYRILLIC", "DEVANAGARI"}
        assert scripts & {"HIRAGANA", "KATAKANA", "CJK"}


def test_entities_have_a_picture_that_no_mention_has(
    entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]
) -> None:
    pictures = [entity["image_bytes"] for entity in entities.values() if entity["image_bytes"] is not None]
    assert len(pictures) >= 0.97 * len(entities)
    assert {row["image_bytes"] for split in SPLITS for row in splits[split]}.isdisjoint(pictures)


def test_each_split_has_its_own_artists(splits: dict[str, list[dict[str, Any]]]) -> None:
    artists = {split: {row["group"] for row in rows} for split, rows in splits.items()}
    assert artists == {
        "train": set(TRAIN_ARTISTS),
        "dev": {DEV_ARTIST},
        "test": {TEST_ARTIST},
        "test_unseen": {TEST_ARTIST},
        "sample": {TEST_ARTIST},
    }
    pictures = [{row["image_bytes"] for row in splits[split]} for split in SPLITS]
    assert len(set.union(*pictures)) == sum(map(len, pictures))


def test_wording_of_train_is_not_that_of_dev_and_test(splits: dict[str, list[dict[str, Any]]]) -> None:
    def templates(split: str) -> set[tuple[str, str]]:
        return {
            (row["text"][: row["mention_start"]], row["text"][row["mention_start"] + len(row["mention"]) :])
            for row in splits[split]
        }

    held_out = templates("dev") | templates("test") | templates("test_unseen")
    assert templates("train").isdisjoint(held_out)
    assert len(templates("train") | held_out) >= 40


def test_unseen_entities_are_unseen_and_all_others_complete(splits: dict[str, list[dict[str, Any]]]) -> None:
    seen = {split: {row["entity_id"] for row in splits[split]} for split in SPLITS}
    assert seen["train"] == seen["dev"] == seen["test"]
    assert seen["test_unseen"].isdisjoint(seen["train"])
    artists = defaultdict(set)
    for row in splits["train"]:
        artists[row["entity_id"]].add(row["group"])
    assert min(map(len, artists.values())) >= 2


def test_offsets_point_at_the_surface_form(splits: dict[str, list[dict[str, Any]]]) -> None:
    for rows in splits.values():
        for row in rows:
            assert row["text"][row["mention_start"] :].startswith(row["mention"])


def test_sample_is_part_of_test(splits: dict[str, list[dict[str, Any]]]) -> None:
    test = {row["mention_id"]: row for row in splits["test"]}
    assert all(test[row["mention_id"]] == row for row in splits["sample"])


def test_pictures_decode(entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]) -> None:
    for rows in (entities.values(), *(splits[split] for split in SPLITS)):
        for data in {row["image_bytes"] for row in rows} - {None}:
            assert decode_image(data, PICTURE_SIZE**2).size == (PICTURE_SIZE, PICTURE_SIZE)

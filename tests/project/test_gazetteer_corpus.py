"""The corpus of places, made anew from the package that it comes from: half a minute for files that nobody edits."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from examples.gazetteer.build_corpus import (
    ENTITY_SCHEMA,
    HERE,
    MENTION_SCHEMA,
    NUM_MENTIONS,
    NUM_SAMPLE_MENTIONS,
    NUM_SENTENCES,
    Gazetteer,
    is_latin,
    is_name,
    normal_form,
    read_places,
    write_corpus,
)
from gemel_engine.knowledge_base.build import checked_entities, read_entities

pytestmark = pytest.mark.heavy

SENTENCES = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gazetteer")
    write_corpus(Gazetteer(read_places()), SENTENCES, directory)
    return directory


@pytest.fixture(scope="module")
def entities(built: Path) -> dict[str, dict[str, Any]]:
    return {entity["entity_id"]: entity for entity in pq.read_table(built / "entities.parquet").to_pylist()}


@pytest.fixture(scope="module")
def splits(built: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: pq.read_table(built / f"{split}.parquet").to_pylist() for split in NUM_MENTIONS}


@pytest.fixture(scope="module")
def bearers(entities: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    bearers = defaultdict(list)
    for entity in entities.values():
        for name in {normal_form(name) for name in (entity["name"], *entity["aliases"])}:
            bearers[name].append(entity)
    return bearers


def test_what_is_committed_is_what_the_script_builds(built: Path) -> None:
    for split in ("dev", "test", "sample"):
        assert pq.read_table(HERE / f"{split}.parquet").equals(pq.read_table(built / f"{split}.parquet"))
    assert sum(file.stat().st_size for file in HERE.iterdir() if file.is_file()) < 2_000_000


def test_schemas_and_sizes(built: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    assert pq.read_schema(built / "entities.parquet").equals(ENTITY_SCHEMA)
    for split, num_mentions in NUM_MENTIONS.items():
        assert pq.read_schema(built / f"{split}.parquet").equals(MENTION_SCHEMA)
        assert len(splits[split]) == num_mentions


def test_sample_is_part_of_test(built: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    sample = pq.read_table(built / "sample.parquet").to_pylist()
    assert len(sample) == NUM_SAMPLE_MENTIONS
    assert all(row in splits["test"] for row in sample)


def test_the_entities_can_become_a_knowledge_base(built: Path, entities: dict[str, dict[str, Any]]) -> None:
    table = checked_entities(read_entities(str(built / "entities.parquet")))
    assert table.num_rows == len(entities)
    assert table["aliases"].null_count == 0


def test_each_entity_shares_a_name(
    entities: dict[str, dict[str, Any]], bearers: dict[str, list[dict[str, Any]]]
) -> None:
    for entity in entities.values():
        names = [entity["name"], *entity["aliases"]]
        assert len({name.casefold() for name in names}) == len(names)
        assert any(len(bearers[normal_form(name)]) > 1 for name in names)
    assert sum(len(found) > 1 for found in bearers.values()) > 30_000


def test_gold_is_an_entity_of_that_name(
    entities: dict[str, dict[str, Any]], splits: dict[str, list[dict[str, Any]]]
) -> None:
    for rows in splits.values():
        for row in rows:
            gold = entities[row["entity_id"]]
            assert row["mention"] in (gold["name"], *gold["aliases"])
            assert row["text"][row["mention_start"] :].startswith(row["mention"])


def test_splits_share_no_entity_and_no_sentence(splits: dict[str, list[dict[str, Any]]]) -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) == 2 * sum(NUM_SENTENCES.values())
    assert all("{place}" in sentence for sentence in SENTENCES)
    seen: dict[str, set[str]] = {}
    for split, rows in splits.items():
        ids = {row["entity_id"] for row in rows}
        assert len(ids) == len(rows)
        seen[split] = ids | {sentence_of(row) for row in rows}
        assert len({sentence_of(row) for row in rows}) == 2 * NUM_SENTENCES[split]
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


def sentence_of(row: dict[str, Any]) -> str:
    """Return the only sentence that a text was made of."""
    end = row["mention_start"] + len(row["mention"])
    text = row["text"][: row["mention_start"]] + "{place}" + row["text"][end:]
    found = [
        sentence
        for sentence in SENTENCES
        for before, after in [sentence.replace("{near}", "{within}").split("{within}")]
        if text.startswith(before) and text.endswith(after)
    ]
    assert len(found) == 1, row["text"]
    return found[0]


def test_most_mentions_are_ambiguous_and_the_sentence_decides(
    splits: dict[str, list[dict[str, Any]]], bearers: dict[str, list[dict[str, Any]]]
) -> None:
    ambiguous = [row for row in splits["test"] if len(bearers[normal_form(row["mention"])]) > 1]
    assert 0.85 < len(ambiguous) / len(splits["test"]) < 0.95
    assert 0.2 < sum(not is_latin(row["mention"]) for row in splits["test"]) / len(splits["test"]) < 0.4
    for row in ambiguous:
        end = row["mention_start"] + len(row["mention"])
        elsewhere = row["text"][: row["mention_start"]] + row["text"][end:]
        described = [
            entity["entity_id"]
            for entity in bearers[normal_form(row["mention"])]
            if any(place in elsewhere for place in places_in(entity["description"]))
        ]
        assert described == [row["entity_id"]]


def places_in(description: str) -> list[str]:
    """Return the state, the country and the landmark of a description."""
    return description.partition(" in ")[2].partition(", population")[0].replace("near ", "").split(", ")


@pytest.mark.parametrize("name", ["München", "Žilina", "'s-Hertogenbosch", "リッチモンド", "Ричмонд", "St. Louis"])
def test_a_name_is_kept(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "A", "JFK", "ping si ke", "http://example.org", "Ричмонд (город)", "شلی، آیداهو"])
def test_codes_transcriptions_and_remarks_are_no_names(name: str) -> None:
    assert not is_name(name)

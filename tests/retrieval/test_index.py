"""Retrieval against brute force, and the index's directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.trouble import damage, edit_manifest, forget_checksum, make_endless

from gemel_engine.config.components import RetrievalSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.retriever import DemonstrationRetriever
from gemel_engine.retrieval.table import Demonstration, FloatArray
from gemel_engine.storage.manifest import claimed
from gemel_engine.types import Mention

FORMS = ["bear", "Bear", "train", "paris", "a bear on a train", "[SEP]", "北京", "x"]
C = 3


class TableEncoder:
    """Stands in for `MentionEncoder` where a test chooses the embeddings."""

    fingerprint = "table"

    def __init__(self, embeddings: dict[str, list[float]]) -> None:
        self.embeddings = embeddings
        self.width = len(next(iter(embeddings.values())))

    def encode(self, surface_forms: Sequence[str]) -> FloatArray:
        return np.array([self.embeddings[form] for form in surface_forms], np.float32)


def demonstrations(forms: Sequence[str], num_entities: int = 1000, num_groups: int = 1000) -> list[Demonstration]:
    return [
        Demonstration(f"m{i:03}", f"about {form}", form, f"Q{i % num_entities}", f"name {i}", f"g{i % num_groups}")
        for i, form in enumerate(forms)
    ]


def ids(index: DemonstrationIndex, rows: Sequence[int]) -> list[str]:
    return [index[row].mention_id for row in rows]


def brute_force(
    rows: Sequence[Demonstration], embeddings: dict[str, list[float]], form: str, k: int, excluded: str | None
) -> list[str]:
    """What `retrieve` is to return, of rows in the order of the index."""
    meanings = [(row.mention, row.entity_id) for row in rows]

    def order(number: int) -> tuple[float, str, int, int, int]:
        row, meaning = rows[number], meanings[number]
        similarity = round(float(np.dot(embeddings[row.mention], embeddings[form])), 5)
        num_before = sum(meanings[i] == meaning and rows[i].group != excluded for i in range(number))
        return -similarity, row.mention, num_before, -meanings.count(meaning), meanings.index(meaning)

    kept = sorted((number for number, row in enumerate(rows) if row.group != excluded), key=order)[:k]
    return [rows[number].mention_id for number in reversed(kept)]


@given(
    points=st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=8),
    forms=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    queries=st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 5)), max_size=5),
    k=st.integers(0, 25),
    num_entities=st.integers(1, 20),
    num_groups=st.integers(1, 5) | st.just(20),
)
def test_retrieve_equals_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    points: list[tuple[int, int]],
    forms: list[int],
    queries: list[tuple[int, int | None]],
    k: int,
    num_entities: int,
    num_groups: int,
) -> None:
    """Few points on a grid: many surface forms with equal similarities, many demonstrations of one surface form."""
    embeddings = {chr(ord("a") + i): [float(x) for x in points[i % len(points)]] for i in range(8)}
    rows = demonstrations([chr(ord("a") + form) for form in forms], num_entities, num_groups)
    table = TableEncoder(embeddings)
    index = DemonstrationIndex.build(tmp_path_factory.mktemp("index"), rows, table)  # type: ignore[arg-type]
    asked = [chr(ord("a") + form) for form, _ in queries]
    excluded = [None if i is None else f"g{i}" for _, i in queries]
    found = index.retrieve(table.encode(asked).reshape(-1, 2), k, excluded)
    ordered = [index[row] for row in range(len(index))]
    expected = [brute_force(ordered, embeddings, form, k, group) for form, group in zip(asked, excluded, strict=True)]
    assert [ids(index, rows) for rows in found] == expected


def test_each_entity_of_a_surface_form_comes_before_a_second_of_any(encoder: MentionEncoder, tmp_path: Path) -> None:
    entities = ["Q1"] * 5 + ["Q2"] * 2 + ["Q3"]
    rows = [Demonstration(f"m{i}", "text", "bear", entity, "name", f"g{i % 2}") for i, entity in enumerate(entities)]
    index = DemonstrationIndex.build(tmp_path, [*rows, *demonstrations(["beer"])], encoder)
    query = encoder.encode(["bear"])
    (found,) = index.retrieve(query, 9)
    assert [index[row].entity_id for row in found[::-1]] == ["Q1", "Q2", "Q3", "Q1", "Q2", "Q1", "Q1", "Q1", "Q0"]
    (found,) = index.retrieve(query, 9, ["g0"])
    assert {index[row].mention_id for row in found} == {"m1", "m3", "m5", "m7"}  # that of "beer" is of the group too


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["bear", "beer"]), st.integers(0, 3), st.none() | st.tuples(*[st.integers(-2, 2)] * C)
        ),
        min_size=1,
        max_size=12,
    ),
    query=st.tuples(*[st.integers(-2, 2)] * C),
    k=st.integers(0, 5),
    excluded=st.none() | st.integers(0, 3),
)
def test_similar_pictures_equal_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, int, tuple[int, ...] | None]],
    query: tuple[int, ...],
    k: int,
    excluded: int | None,
) -> None:
    table = TableEncoder({"bear": [1.0, 0.0], "beer": [0.0, 1.0]})
    given_rows = [
        Demonstration(
            f"m{i}", "text", form, "Q1", "name", f"g{group}", None if picture is None else np.array(picture, np.float32)
        )
        for i, (form, group, picture) in enumerate(rows)
    ]
    index = DemonstrationIndex.build(tmp_path_factory.mktemp("index"), given_rows, table)  # type: ignore[arg-type]
    ordered = [index[row] for row in range(len(index))]
    pictured = [item.features for item in ordered if item.features is not None]
    group = None if excluded is None else f"g{excluded}"
    first = next(row for row, item in enumerate(ordered) if item.mention == rows[0][0])
    found = index.similar_pictures(first, np.array(query, np.float32), k, group)
    kept = [
        row
        for row, item in enumerate(ordered)
        if item.mention == rows[0][0] and item.group != group and item.features is not None
    ]

    def likeness(row: int) -> float:
        mean, deviation = np.mean(pictured, axis=0), np.maximum(np.std(pictured, axis=0), 1e-6)
        vectors = [(np.array(features) - mean) / deviation for features in (ordered[row].features, query)]
        lengths = [max(float(np.linalg.norm(vector)), 1e-6) for vector in vectors]
        return float(vectors[0] @ vectors[1]) / lengths[0] / lengths[1]

    assert len(found) == min(k, len(kept))
    assert set(found) <= set(kept)
    values = [likeness(row) for row in found]
    assert values == pytest.approx(sorted(map(likeness, kept))[len(kept) - len(found) :], abs=1e-4)


def test_similar_pictures_stand_behind_the_others(encoder: MentionEncoder, tmp_path: Path) -> None:
    pictures = [np.array(row, np.float32) for row in ([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.1])]
    rows = [Demonstration(f"m{i}", "text", "bear", f"Q{i}", "name", f"g{i}", item) for i, item in enumerate(pictures)]
    index = DemonstrationIndex.build(tmp_path, rows, encoder)
    settings = RetrievalSettings(num_demonstrations=2, num_similar_pictures=1)
    retriever = DemonstrationRetriever(settings, index, encoder)
    mentions = [Mention(str(i), "text", "bear") for i in range(3)]
    without, like_m1, unfit = retriever.retrieve(mentions, [None, pictures[1], np.zeros(7, np.float32)])
    assert without == unfit == like_m1[:2]
    assert ids(index, like_m1[2:]) == ["m1"]


@pytest.mark.parametrize("policy", ["similar", "random"])
@pytest.mark.parametrize("num_demonstrations", [0, 2])
def test_similar_pictures_are_of_the_most_similar_form_whatever_the_others_are(
    encoder: MentionEncoder, tmp_path: Path, policy: Literal["similar", "random"], num_demonstrations: int
) -> None:
    picture = np.array([0, 1, 0], np.float32)
    rows = [Demonstration(f"m{i}", "text", FORMS[i % 8], f"Q{i}", "name", f"g{i}", picture + i) for i in range(40)]
    index = DemonstrationIndex.build(tmp_path, rows, encoder)
    settings = RetrievalSettings(num_demonstrations=num_demonstrations, num_similar_pictures=3, policy=policy)
    found = DemonstrationRetriever(settings, index, encoder).retrieve(
        [Mention(form, "text", form) for form in FORMS], [picture] * len(FORMS)
    )
    for form, items in zip(FORMS, found, strict=True):
        assert len(items) == num_demonstrations + 3
        assert {index[row].mention for row in items[num_demonstrations:]} == {form}


def test_list_does_not_depend_on_the_last_bits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(8)
    forms = {f"form {i:02}": list(base + rng.normal(scale=1e-8, size=8)) for i in range(40)}
    index = DemonstrationIndex.build(tmp_path, demonstrations(list(forms)), TableEncoder(forms))  # type: ignore[arg-type]
    query = np.array([base / np.linalg.norm(base) ** 2], np.float32)
    for shift in (0.0, 1e-8, -1e-8):
        (found,) = index.retrieve(query + np.float32(shift), 4)
        assert found == [3, 2, 1, 0]


def test_similar_surface_forms_come_last(encoder: MentionEncoder, tmp_path: Path) -> None:
    index = DemonstrationIndex.build(tmp_path, demonstrations(FORMS), encoder)
    for form, rows in zip(FORMS, index.retrieve(encoder.encode(FORMS), 3), strict=True):
        assert index[rows[-1]].mention == form


def test_sample_depends_on_surface_form_and_seed_only(encoder: MentionEncoder, tmp_path: Path) -> None:
    index = DemonstrationIndex.build(tmp_path, demonstrations(FORMS), encoder)
    drawn = index.sample("bear", 4, seed=1)
    assert drawn == index.sample("bear", 4, seed=1)
    assert len(set(drawn)) == 4
    assert len({tuple(index.sample("bear", 4, seed=seed)) for seed in range(20)}) > 10
    assert len({tuple(index.sample(f"bear {i}", 4, seed=1)) for i in range(20)}) > 10
    without = index.sample("bear", 4, seed=1, exclude_group=index[drawn[0]].group)
    assert without[:3] == drawn[1:]
    assert len(without) == 4
    assert len(index.sample("bear", 99, seed=1, exclude_group="g0")) == len(FORMS) - 1
    assert sorted(index.sample("bear", 99, seed=1)) == list(range(len(FORMS)))


@pytest.mark.parametrize("policy", ["similar", "random"])
def test_a_mention_is_not_shown_its_own_group(
    encoder: MentionEncoder, tmp_path: Path, policy: Literal["similar", "random"]
) -> None:
    rows = demonstrations(["bear", "bear", "bear", "beer"], num_groups=2)
    index = DemonstrationIndex.build(tmp_path, rows, encoder)
    settings = RetrievalSettings(num_demonstrations=4, policy=policy, exclude_group=True)
    retriever = DemonstrationRetriever(settings, index, encoder)
    mentions = [Mention("m000", "text", "bear", group="g0"), Mention("new", "text", "bear")]
    found = retriever.retrieve(mentions, [None, None])
    assert [sorted(ids(index, rows)) for rows in found] == [["m001", "m003"], ["m000", "m001", "m002", "m003"]]
    with pytest.raises(InputError, match=r"'m000' of group None has another group"):
        retriever.retrieve([Mention("m000", "text", "bear")], [None])


# The directory


def build_with_features(directory: Path, encoder: MentionEncoder) -> DemonstrationIndex:
    numbers = count()
    rows = [
        Demonstration(f"m{next(numbers)}", "text", form, "Q1", "name", "group", features)
        for form in FORMS
        for features in (None, np.arange(C, dtype=np.float32) + len(form))
    ]
    return DemonstrationIndex.build(directory, rows, encoder, image_encoder_fingerprint="vision")


def test_open_returns_what_was_built(encoder: MentionEncoder, tmp_path: Path) -> None:
    built = build_with_features(tmp_path, encoder)
    opened = DemonstrationIndex.open(tmp_path, verify=True)
    assert opened.metadata == built.metadata
    assert opened.metadata.num_images == len(FORMS)
    assert len(opened) == 2 * len(FORMS)
    queries = encoder.encode(FORMS)
    assert opened.retrieve(queries, 5) == built.retrieve(queries, 5)
    for row in range(len(opened)):
        assert opened[row].mention_id == built[row].mention_id
        features = opened[row].features
        if int(opened[row].mention_id[1:]) % 2 == 0:
            assert features is None
        else:
            assert features is not None
            assert features.tolist() == [len(opened[row].mention) + i for i in range(C)]


def test_index_without_pictures(encoder: MentionEncoder, tmp_path: Path) -> None:
    DemonstrationIndex.build(tmp_path, demonstrations(FORMS), encoder)
    index = DemonstrationIndex.open(tmp_path)
    assert index.metadata.vision_width is None
    assert all(index[row].features is None for row in range(len(index)))


def test_build_twice_gives_the_same_bytes(encoder: MentionEncoder, tmp_path: Path) -> None:
    rows = demonstrations(FORMS)
    DemonstrationIndex.build(tmp_path / "a", rows, encoder)
    DemonstrationIndex.build(tmp_path / "b", rows[::-1], encoder)
    for name in ("index.json", "demonstrations.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_mention_ids_and_an_empty_split_are_refused(encoder: MentionEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m000"):
        DemonstrationIndex.build(tmp_path, demonstrations(["a"]) + demonstrations(["b"]), encoder)
    card = Demonstration("card:Q1", "about a", "a", "Q1", "name", "g")
    with pytest.raises(InputError, match="'card:Q1' begins with 'card:', as ids of cards do: rename it"):
        DemonstrationIndex.build(tmp_path, [card], encoder)
    with pytest.raises(InputError, match="no demonstrations"):
        DemonstrationIndex.build(tmp_path, [], encoder)


@pytest.mark.parametrize("name", ["index.json", "demonstrations.parquet"])
def test_missing_or_truncated_file_is_refused(encoder: MentionEncoder, tmp_path: Path, name: str) -> None:
    build_with_features(tmp_path, encoder)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ArtifactError):
        DemonstrationIndex.open(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        DemonstrationIndex.open(tmp_path)


@pytest.mark.parametrize("name", ["index.json", "demonstrations.parquet"])
def test_a_pipe_in_place_of_a_file_is_refused(encoder: MentionEncoder, tmp_path: Path, name: str) -> None:
    build_with_features(tmp_path, encoder)
    make_endless(tmp_path / name)
    for verify in (False, True):
        with pytest.raises(ArtifactError, match=r"(not a|no) regular file"):
            DemonstrationIndex.open(tmp_path, verify=verify)


def test_one_command_at_a_time_writes_an_index(encoder: MentionEncoder, tmp_path: Path) -> None:
    build_with_features(tmp_path, encoder)
    before = (tmp_path / "index.json").read_bytes()
    with claimed(tmp_path, must_be_empty=False), pytest.raises(ConfigurationError, match="written by another command"):
        build_with_features(tmp_path, encoder)
    assert (tmp_path / "index.json").read_bytes() == before
    build_with_features(tmp_path, encoder)


def test_an_index_of_an_earlier_release_is_read(encoder: MentionEncoder, tmp_path: Path) -> None:
    build_with_features(tmp_path, encoder)
    forget_checksum(tmp_path / "index.json", format_version=2)
    DemonstrationIndex.open(tmp_path, verify=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 1},
        {"surface_width": 31},
        {"surface_width": 1 << 40},
        {"vision_width": None},
        {"num_demonstrations": 3},
        {"num_demonstrations": 10**400},
        {"num_images": [[[]]]},
        {"surface_width": "32"},
        {"extra": 1},
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    encoder: MentionEncoder, tmp_path: Path, changes: dict[str, object]
) -> None:
    build_with_features(tmp_path, encoder)
    edit_manifest(tmp_path / "index.json", changes)
    with pytest.raises(ArtifactError):
        DemonstrationIndex.open(tmp_path)


def test_tampered_table_is_refused(encoder: MentionEncoder, tmp_path: Path) -> None:
    build_with_features(tmp_path, encoder)
    path = tmp_path / "demonstrations.parquet"
    table = pq.read_table(path)
    renamed = pa.array(["other"] * len(table))
    field = table.schema.field("entity_name")
    pq.write_table(table.set_column(table.schema.names.index("entity_name"), field, renamed), path)
    DemonstrationIndex.open(tmp_path)
    with pytest.raises(ArtifactError, match="checksum"):
        DemonstrationIndex.open(tmp_path, verify=True)

    pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    with pytest.raises(ArtifactError, match="sorted"):
        DemonstrationIndex.open(tmp_path)

    values = np.full(len(table) * C, np.nan, np.float32)
    features = pa.FixedSizeListArray.from_arrays(values, C)
    index = table.schema.names.index("image_features")
    pq.write_table(table.set_column(index, table.schema.field(index), features), path)
    with pytest.raises(ArtifactError, match="finite"):
        DemonstrationIndex.open(tmp_path)

    huge = pa.FixedSizeListArray.from_arrays(np.full(len(table) * C, 1e38, np.float32), C)
    pq.write_table(table.set_column(index, table.schema.field(index), huge), path)
    with pytest.raises(ArtifactError, match="huge"):
        DemonstrationIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("entity_name", b"bear\n[Text]x", "names of several lines"),
        ("entity_name", b"bear [Answer]", "prompt markers"),
        ("text", b"x\n[Question]", "prompt markers"),
        ("text", b"\xed\xa0\x80", "UTF8"),
        ("entity_id", b"\xff", "UTF8"),
        ("mention_id", b"card:Q1", "begins with 'card:'"),
    ],
)
def test_text_that_does_not_belong_in_an_index_is_refused(
    encoder: MentionEncoder, tmp_path: Path, column: str, text: bytes, message: str
) -> None:
    build_with_features(tmp_path, encoder)
    table = pq.read_table(tmp_path / "demonstrations.parquet")
    forged = pa.array([text, *(value.encode() for value in table[column][1:].to_pylist())], pa.binary()).view(
        pa.string()
    )
    place = table.schema.names.index(column)
    pq.write_table(table.set_column(place, table.schema.field(column), forged), tmp_path / "demonstrations.parquet")
    with pytest.raises(ArtifactError, match=message):
        DemonstrationIndex.open(tmp_path)


@settings(max_examples=100)
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_bytes_give_an_error_or_demonstrations(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    table = TableEncoder({form: [float(len(form)), 1.0] for form in FORMS})
    DemonstrationIndex.build(directory, demonstrations(FORMS), table)  # type: ignore[arg-type]
    path = directory / "demonstrations.parquet"
    damage(path, changes)
    with suppress(ArtifactError):
        index = DemonstrationIndex.open(directory)
        index.retrieve(table.encode(FORMS), 3)
        assert all(isinstance(index[row].name, str) for row in range(len(index)))

"""Retrieval against brute force, the index's directory, and the reading of a training split."""

from __future__ import annotations

import io
import json
import runpy
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BertModel, PreTrainedTokenizerFast

from gemel_engine.demonstrations import PictureReader, read_demonstrations, read_names
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.image_source import ImagePolicy
from gemel_engine.mention_encoder import MentionEncoder
from gemel_engine.retrieval import Demonstration, DemonstrationIndex, FloatArray
from gemel_engine.vision import ImageEncoder

FORMS = ["bear", "Bear", "train", "paris", "a bear on a train", "[SEP]", "北京", "x"]
C = 3


@pytest.fixture(scope="session")
def encoder(mention_encoder_directory: Path) -> MentionEncoder:
    return MentionEncoder(str(mention_encoder_directory), batch_size=4)


class TableEncoder:
    """Stands in for `MentionEncoder` where a test chooses the embeddings."""

    fingerprint = "table"

    def __init__(self, embeddings: dict[str, list[float]]) -> None:
        self.embeddings = embeddings
        self.width = len(next(iter(embeddings.values())))

    def encode(self, surface_forms: Sequence[str]) -> FloatArray:
        return np.array([self.embeddings[form] for form in surface_forms], np.float32)


class ColourEncoder(ImageEncoder):
    """The mean colour of a picture as its features; counts the pictures that it is given."""

    def __init__(self) -> None:
        self.width = C
        self.fingerprint = "colour"
        self.num_encoded = 0

    def encode(self, images: Sequence[Image.Image]) -> FloatArray:
        self.num_encoded += len(images)
        return np.array([np.asarray(image).mean(axis=(0, 1)) for image in images], np.float32)


def demonstrations(forms: Sequence[str]) -> list[Demonstration]:
    return [Demonstration(f"m{i:03}", f"about {form}", form, f"Q{i}", f"name {i}") for i, form in enumerate(forms)]


def picture(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stream, "PNG")
    return stream.getvalue()


def ids(index: DemonstrationIndex, rows: Sequence[int]) -> list[str]:
    return [index[row].mention_id for row in rows]


# Mention encoder


def test_embeddings_have_unit_length(encoder: MentionEncoder) -> None:
    embeddings = encoder.encode(FORMS)
    assert embeddings.shape == (len(FORMS), encoder.width)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    assert encoder.encode([]).shape == (0, encoder.width)


@settings(deadline=None, max_examples=10)
@given(batch=st.lists(st.sampled_from(FORMS), min_size=1, max_size=9))
def test_embedding_does_not_depend_on_the_batch(encoder: MentionEncoder, batch: list[str]) -> None:
    alone = np.concatenate([encoder.encode([form]) for form in batch])
    assert encoder.encode(batch).tobytes() == alone.tobytes()


def test_long_surface_form_is_cut_where_special_tokens_in_text_are_letters(encoder: MentionEncoder) -> None:
    text = "[SEP]" * 8  # 8 tokens if it were special, else 40, of which 38 fit
    assert np.array_equal(*encoder.encode([text, text[:38]]))
    assert not np.array_equal(*encoder.encode([text, text[:37]]))


def test_fingerprint_tells_weights_apart(
    encoder: MentionEncoder, mention_encoder_directory: Path, tmp_path: Path
) -> None:
    assert MentionEncoder(str(mention_encoder_directory)).fingerprint == encoder.fingerprint
    model = BertModel.from_pretrained(mention_encoder_directory)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(mention_encoder_directory).save_pretrained(tmp_path)
    assert MentionEncoder(str(tmp_path)).fingerprint != encoder.fingerprint


def test_missing_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        MentionEncoder(str(tmp_path / "nowhere"))


# Retrieval


def brute_force(
    rows: Sequence[Demonstration], embeddings: dict[str, list[float]], form: str, k: int, excluded: str | None
) -> list[str]:
    def order(row: Demonstration) -> tuple[float, str, str]:
        similarity = round(float(np.dot(embeddings[row.mention], embeddings[form])), 5)
        return -similarity, row.mention, row.mention_id

    kept = sorted((row for row in rows if row.mention_id != excluded), key=order)[:k]
    return [row.mention_id for row in reversed(kept)]


@settings(deadline=None)
@given(
    points=st.lists(st.tuples(*[st.integers(-2, 2)] * 2), min_size=1, max_size=8),
    forms=st.lists(st.integers(0, 7), min_size=1, max_size=20),
    queries=st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 19)), max_size=5),
    k=st.integers(0, 25),
)
def test_retrieve_equals_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    points: list[tuple[int, int]],
    forms: list[int],
    queries: list[tuple[int, int | None]],
    k: int,
) -> None:
    """Few points on a grid: many surface forms with equal similarities, many demonstrations of one surface form."""
    embeddings = {chr(ord("a") + i): [float(x) for x in points[i % len(points)]] for i in range(8)}
    rows = demonstrations([chr(ord("a") + form) for form in forms])
    table = TableEncoder(embeddings)
    index = DemonstrationIndex.build(tmp_path_factory.mktemp("index"), rows, table)  # type: ignore[arg-type]
    asked = [chr(ord("a") + form) for form, _ in queries]
    excluded = [None if i is None else f"m{i:03}" for _, i in queries]
    found = index.retrieve(table.encode(asked).reshape(-1, 2), k, excluded)
    expected = [brute_force(rows, embeddings, *query) for query in zip(asked, [k] * len(asked), excluded, strict=True)]
    assert [ids(index, rows) for rows in found] == expected


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
    without = index.sample("bear", 4, seed=1, exclude_mention_id=index[drawn[0]].mention_id)
    assert without[:3] == drawn[1:]
    assert len(without) == 4
    assert sorted(index.sample("bear", 99, seed=1)) == list(range(len(FORMS)))


# The directory


def build_with_features(directory: Path, encoder: MentionEncoder) -> DemonstrationIndex:
    numbers = count()
    rows = [
        Demonstration(f"m{next(numbers)}", "text", form, "Q1", "name", features)
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


def test_repeated_mention_id_and_empty_split_are_refused(encoder: MentionEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="m000"):
        DemonstrationIndex.build(tmp_path, demonstrations(["a"]) + demonstrations(["b"]), encoder)
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


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"surface_width": 31},
        {"surface_width": 1 << 40},
        {"vision_width": None},
        {"num_demonstrations": 3},
        {"extra": 1},
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    encoder: MentionEncoder, tmp_path: Path, changes: dict[str, object]
) -> None:
    build_with_features(tmp_path, encoder)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
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


# Reading a training split


def write(path: Path, rows: Sequence[Any]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_names_are_normalised(tmp_path: Path) -> None:
    rows = [{"entity_id": "Q1", "name": " Cafe\u0301 "}, {"entity_id": "Q2", "name": None}]
    assert read_names(write(tmp_path / "entities.parquet", rows)) == {"Q1": "Café"}


def test_mentions_without_a_target_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"mention_id": "a", "text": "t", "mention": "x", "entity_id": "Q1", "entity_name": "ignored"},
        {"mention_id": "b", "text": "t", "mention": "x", "entity_id": None, "entity_name": "NIL"},
        {"mention_id": "c", "text": "t", "mention": "x", "entity_id": "Q2", "entity_name": "its own"},
        {"mention_id": "d", "text": "t", "mention": "x", "entity_id": "Q3", "entity_name": None},
        {"mention_id": "e", "text": "t", "mention": "", "entity_id": "Q1", "entity_name": None},
    ]
    found = read_demonstrations(write(tmp_path / "train.parquet", rows), {"Q1": "one"})
    assert [(d.mention_id, d.name) for d in found] == [("a", "one"), ("c", "its own")]
    assert "left out 3 mentions" in caplog.text


@pytest.mark.parametrize("column", ["mention_id", "text", "mention", "entity_id"])
def test_missing_column_is_named(tmp_path: Path, column: str) -> None:
    row = dict.fromkeys({"mention_id", "text", "mention", "entity_id"} - {column}, "x")
    with pytest.raises(InputError, match=f"'{column}'"):
        read_demonstrations(write(tmp_path / "train.parquet", [row]), {})


def test_row_without_id_and_unreadable_table_are_refused(tmp_path: Path) -> None:
    rows = [{"mention_id": i, "text": "t", "mention": "x", "entity_id": "Q1"} for i in ("a", None)]
    with pytest.raises(InputError, match="None"):
        read_demonstrations(write(tmp_path / "train.parquet", rows), {"Q1": "one"})
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match=r"bad\.parquet"):
        read_names(str(tmp_path / "bad.parquet"))


def test_equal_pictures_are_encoded_once_and_bad_ones_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red, blue = picture((255, 0, 0)), picture((0, 0, 255))
    (tmp_path / "blue.png").write_bytes(blue)
    pictures: list[tuple[bytes | None, str | None]] = [
        (red, None),
        (b"no picture", None),
        (None, str(tmp_path / "blue.png")),
        (red, None),
        (None, None),
        (None, "/etc/hostname"),
        (blue, None),
    ]
    rows = [
        {
            "mention_id": str(i),
            "text": "t",
            "mention": "x",
            "entity_id": "Q1",
            "image_bytes": data,
            "image_uri": uri,
        }
        for i, (data, uri) in enumerate(pictures * 100)
    ]
    colours = ColourEncoder()
    policy = ImagePolicy((str(tmp_path),), max_bytes=1000, timeout_seconds=1.0, max_retries=0)
    reader = PictureReader(colours, policy, max_pixels=100)
    found = read_demonstrations(write(tmp_path / "train.parquet", rows), {"Q1": "one"}, reader)
    features = [None if d.features is None else d.features.tolist() for d in found]
    assert features == [[255, 0, 0], None, [0, 0, 255], [255, 0, 0], None, None, [0, 0, 255]] * 100
    assert colours.num_encoded == 2
    assert reader.num_unusable == 200
    assert "200 demonstrations go without" in caplog.text


# The job


def run_job(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    job = str(Path(__file__).parent.parent / "jobs" / "build_demonstration_index.py")
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    runpy.run_path(job, run_name="__main__")


def test_job_builds_an_index_and_names_errors(
    mention_encoder_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entities = write(tmp_path / "entities.parquet", [{"entity_id": "Q1", "name": "one"}])
    rows = [{"mention_id": "a", "text": "t", "mention": "x", "entity_id": "Q1"}]
    train = write(tmp_path / "train.parquet", rows)
    output = tmp_path / "index"
    run_job(monkeypatch, train, entities, str(output), "--mention-encoder", str(mention_encoder_directory))
    assert DemonstrationIndex.open(output, verify=True)[0].name == "one"

    with pytest.raises(SystemExit) as stopped:
        run_job(monkeypatch, entities, entities, str(output), "--mention-encoder", str(mention_encoder_directory))
    assert stopped.value.code == InputError.exit_code
    assert "no column 'mention_id'" in capsys.readouterr().err

"""Knowledge bases with evidence: built, killed and gone on with, updated, merged."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import picture
from support.models import TINY_VIT, write_image_encoder
from support.names import ENTITY_NAMES
from support.paths import ROOT
from support.s3_server import S3Server
from transformers import PreTrainedTokenizerFast

from gemel_engine import storage
from gemel_engine.config.components import ImagePolicy, KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.index import EvidenceIndex, open_evidence
from gemel_engine.evidence.pool import CandidatePool
from gemel_engine.evidence.update import local_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.pipeline.entity_vectors import EncodeEntities, EntityEncoders
from gemel_engine.pipeline.knowledge_bases import build, compact, update
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import Mention
from gemel_engine.vision.decode import decode_image
from gemel_engine.vision.encoder import ImageEncoder

STRICT, SKIP = KnowledgeBaseSettings(), KnowledgeBaseSettings(on_bad_name="skip")
COLOURS = ["red", "green", "blue", "yellow", "black"]


@pytest.fixture(scope="module")
def image_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("image_encoder"), TINY_VIT)


def rows(num_entities: int = len(ENTITY_NAMES)) -> list[dict[str, Any]]:
    """Entities of which some have several pictures, one a broken one, and one an unusable name."""
    found: list[dict[str, Any]] = [
        {
            "entity_id": f"Q{n}",
            "name": name,
            "aliases": [f"the {name}", "thing"] if n % 3 == 0 else None,
            "description": f"a {name} is a thing" if n % 2 else None,
            "popularity": float(n % 7) if n % 7 else None,
            "image_bytes": [picture(COLOURS[n % 5]), picture(COLOURS[n % 3])] if n % 4 == 0 else None,
        }
        for n, name in enumerate(ENTITY_NAMES[:num_entities])
    ]
    found[1]["image_bytes"] = [b"no picture"]
    return [*found, {"entity_id": "bad", "name": "", "image_bytes": [picture("red")]}]


def write(path: Path, table: list[dict[str, Any]] | pa.Table) -> str:
    if not isinstance(table, pa.Table):
        names = dict.fromkeys(name for row in table for name in row)
        table = pa.table({name: [row.get(name) for row in table] for name in names})
    pq.write_table(table, path)
    return str(path)


def encoders_of(mention_encoder: Path | None, image_encoder: Path | None, **more: Any) -> EntityEncoders:
    paths = (None if path is None else str(path) for path in (mention_encoder, image_encoder))
    text, image = paths
    return EntityEncoders(mention_encoder=text, image_encoder=image, **more)


def opened(directory: Path) -> EvidenceIndex:
    evidence = open_evidence(directory, verify=True)
    assert evidence is not None
    return evidence


def pools(
    directory: Path, encoder: MentionEncoder, image_encoder: Path
) -> list[list[tuple[str, float, dict[str, float]]]]:
    """Candidates of some mentions, with the ids of their entities."""
    knowledge_base, vision = KnowledgeBase.open(directory, verify=True), ImageEncoder(str(image_encoder))
    names = [*ENTITY_NAMES[::4], "the star", "thing", "wolf", "brown wolf"]
    mentions = [Mention(f"m{n}", f"Look, a {name}!", name) for n, name in enumerate(names)]
    features = [vision.encode([decode_image(picture(COLOURS[n % 5]), 10_000)])[0] for n in range(len(names))]
    found = CandidatePool(opened(directory)).pool(
        mentions, encoder.encode(names), encoder.encode([mention.text for mention in mentions]), features
    )
    return [
        [
            (knowledge_base.entity(candidate.row).entity_id, round(candidate.score, 5), dict(candidate.reasons))
            for candidate in pool.candidates
        ]
        for pool in found
    ]


def test_without_encoders_names_and_words_are_indexed_and_no_ray_is_started(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import ray

    report = build(write(tmp_path / "e.parquet", rows()), str(tmp_path / "kb"), tokenizer, SKIP, EntityEncoders())
    assert not ray.is_initialized()
    evidence = opened(tmp_path / "kb")
    assert report.evidence == evidence.manifest
    assert evidence.names is None
    assert evidence.pictures is None
    assert evidence.manifest.num_entities == KnowledgeBase.open(tmp_path / "kb", verify=True).num_entities == 28
    assert sorted(path.name for path in (tmp_path / "kb").iterdir()) == [
        "entities.arrow", "evidence", "knowledge_base.json", "trie",
    ]  # fmt: skip
    report = build(write(tmp_path / "e.parquet", rows()), str(tmp_path / "without"), tokenizer, SKIP, None)
    assert report.evidence is None
    assert open_evidence(tmp_path / "without") is None
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        build(str(tmp_path / "e.parquet"), str(tmp_path / "kb"), tokenizer, SKIP, EntityEncoders())


def test_features_of_the_table_are_indexed_without_an_encoder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    features = [[1.0, 2.0], None, [3.0, 4.0], [5.0], [float("nan"), 1.0]]
    table = pa.table({"entity_id": list("abcde"), "name": ENTITY_NAMES[:5], "image_features": features})
    with caplog.at_level(logging.WARNING):
        report = build(write(tmp_path / "e.parquet", table), str(tmp_path / "kb"), tokenizer, STRICT, EntityEncoders())
    evidence, knowledge_base = opened(tmp_path / "kb"), KnowledgeBase.open(tmp_path / "kb")
    assert evidence.pictures is not None
    assert (evidence.manifest.num_pictures, evidence.manifest.image_encoder_fingerprint) == (2, None)
    assert report.num_unusable_pictures == 2
    assert "2 pictures of entities are left out, such as one of 'd': " in caplog.text
    found = {knowledge_base.entity(row).entity_id: evidence.pictures.features_of(row) for row in range(5)}
    assert {key: value.tolist() for key, value in found.items() if value is not None} == {"a": [1, 2], "c": [3, 4]}


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    mention_encoder_directory: Path,
    image_encoder: Path,
) -> Path:
    directory = tmp_path_factory.mktemp("built")
    encoders = encoders_of(mention_encoder_directory, image_encoder)
    report = build(write(directory / "e.parquet", rows()), str(directory / "kb"), tokenizer, SKIP, encoders)
    assert report.num_unusable_pictures == 1
    return directory / "kb"


def test_texts_and_pictures_are_those_of_the_encoders(
    built: Path, encoder: MentionEncoder, image_encoder: Path
) -> None:
    evidence, knowledge_base = opened(built), KnowledgeBase.open(built)
    assert evidence.names is not None
    assert evidence.pictures is not None
    assert evidence.manifest.mention_encoder_fingerprint == encoder.fingerprint
    assert (evidence.manifest.num_embedded_names, evidence.manifest.num_descriptions) == (28 + 2 * 10, 14)
    assert evidence.manifest.num_pictures == 2 * 7
    vision = ImageEncoder(str(image_encoder))
    for row in range(28):
        entity = knowledge_base.entity(row)
        number = int(entity.entity_id[1:])
        assert row in {found for found, _ in evidence.names.nearest(encoder.encode([entity.name]), 3)[0]}
        features = evidence.pictures.features_of(row)
        assert (features is None) == (number % 4 != 0)
        if features is not None:
            expected = vision.encode([decode_image(picture(COLOURS[number % 5]), 10_000)])[0]
            np.testing.assert_allclose(features, expected, atol=1e-5)


def test_an_update_merged_has_the_evidence_of_one_built_anew(
    built: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    mention_encoder_directory: Path,
    image_encoder: Path,
    encoder: MentionEncoder,
    s3_server: S3Server,
) -> None:
    encoders = encoders_of(mention_encoder_directory, image_encoder)
    base = f"{s3_server.uri}/with-evidence"
    for name in storage.list_files(str(built)):
        storage.write_bytes(f"{base}/{name}", (built / name).read_bytes())
    changes: list[dict[str, Any]] = [
        {"entity_id": "Q0", "name": "brown wolf", "retired": False},
        {"entity_id": "Q4", "retired": True},
        {"entity_id": "new", "name": "wolf", "aliases": ["grey wolf"], "retired": False},
        {"entity_id": "Q3", "name": "bear", "aliases": ["bruin"], "retired": False},
    ]
    update(base, write(tmp_path / "c.parquet", changes), tmp_path / "up", tokenizer, STRICT, encoders)
    assert sorted(path.name for path in (tmp_path / "up").iterdir()) == [
        "changes.arrow", "evidence", "knowledge_base.json",
    ]  # fmt: skip
    pictures: list[dict[str, Any]] = [
        {"entity_id": "Q8", "name": "red apple", "image_bytes": [picture("black")]},
        {"entity_id": "Q12", "name": "crescent moon", "image_bytes": None},
    ]
    up = str(tmp_path / "up")
    update(up, write(tmp_path / "p.parquet", pictures), tmp_path / "second", tokenizer, STRICT, encoders)
    compact(str(tmp_path / "second"), tmp_path / "compact")

    anew: dict[str, dict[str, Any]] = {row["entity_id"]: row for row in rows()}
    for change in [*changes, *pictures]:
        changed = {name: value for name, value in change.items() if name != "retired"}
        lacking = {"aliases": None} if change in changes else {}
        anew[change["entity_id"]] = anew.get(change["entity_id"], {}) | lacking | changed
    del anew["Q4"]
    build(write(tmp_path / "a.parquet", list(anew.values())), str(tmp_path / "anew"), tokenizer, SKIP, encoders)
    expected = pools(tmp_path / "anew", encoder, image_encoder)
    merged = local_knowledge_base(str(tmp_path / "second"), tmp_path / "cache")
    for directory in (merged, tmp_path / "compact"):
        ours, theirs = opened(directory).manifest, opened(tmp_path / "anew").manifest
        assert replace(ours, files={}) == replace(theirs, files={}, knowledge_base=ours.knowledge_base)
        assert pools(directory, encoder, image_encoder) == expected


def test_an_update_needs_the_encoders_of_its_base(
    built: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mention_encoder_directory: Path,
    image_encoder: Path,
) -> None:  # fmt: skip
    changes = write(tmp_path / "c.parquet", [{"entity_id": "new", "name": "wolf"}])
    (tmp_path / "other").mkdir()
    other = write_image_encoder(tmp_path / "other", TINY_VIT, seed=1)

    def refused(text: Path | None, image: Path | None, base: Path = built) -> str:
        with pytest.raises(ConfigurationError) as error:
            update(str(base), changes, tmp_path / "up", tokenizer, STRICT, encoders_of(text, image))
        assert not (tmp_path / "up").exists()
        return str(error.value)

    assert "was built with --mention-encoder: give that encoder" in refused(None, image_encoder)
    assert "was built with another encoder: give --image-encoder that one" in refused(mention_encoder_directory, other)
    build(changes, str(tmp_path / "plain"), tokenizer, STRICT, EntityEncoders())
    plain = tmp_path / "plain"
    assert "was built without --mention-encoder: leave it out" in refused(mention_encoder_directory, None, plain)


def test_an_update_without_its_vectors_or_with_damaged_ones_is_refused(
    built: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mention_encoder_directory: Path,
    image_encoder: Path,
) -> None:  # fmt: skip
    changes = write(tmp_path / "c.parquet", [{"entity_id": "new", "name": "wolf"}])
    encoders = encoders_of(mention_encoder_directory, image_encoder)
    update(str(built), changes, tmp_path / "up", tokenizer, STRICT, encoders)
    part = tmp_path / "up/evidence/part-00000.parquet"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet is missing or damaged: write the update again"):
        local_knowledge_base(str(tmp_path / "up"), tmp_path / "cache")
    shutil.rmtree(tmp_path / "up/evidence")
    with pytest.raises(ArtifactError, match="has embeddings or pictures, the update has none"):
        local_knowledge_base(str(tmp_path / "up"), tmp_path / "cache")


def test_pictures_by_address_are_read_within_the_allowed_prefixes_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, image_encoder: Path
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture("red"))
    (tmp_path / "b.png").write_bytes(picture("red"))
    addresses = [[str(tmp_path / "pictures/a.png"), str(tmp_path / "b.png")], [str(tmp_path / "pictures/c.png")]]
    table = pa.table({"entity_id": ["a", "b"], "name": ENTITY_NAMES[:2], "image_uri": addresses})
    policy = ImagePolicy((str(tmp_path / "pictures"),))
    encoders = encoders_of(None, image_encoder, images=policy)
    report = build(write(tmp_path / "e.parquet", table), str(tmp_path / "kb"), tokenizer, STRICT, encoders)
    assert report.num_unusable_pictures == 2
    assert opened(tmp_path / "kb").manifest.num_pictures == 1


def test_a_knowledge_base_is_built_from_s3_to_s3(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mention_encoder_directory: Path, s3_server: S3Server
) -> None:
    entities, output = f"{s3_server.uri}/entities/e.parquet", f"{s3_server.uri}/built"
    storage.write_bytes(entities, Path(write(tmp_path / "e.parquet", rows())).read_bytes())
    build(entities, output, tokenizer, SKIP, encoders_of(mention_encoder_directory, None))
    local = local_knowledge_base(output, tmp_path / "cache")
    assert opened(local).names is not None
    assert not any("evidence-parts" in name for name in storage.list_files(output))
    with pytest.raises(ConfigurationError, match="not an empty directory"):
        build(entities, output, tokenizer, SKIP, EntityEncoders())
    storage.remove_tree(output)


def test_a_killed_build_goes_on_from_its_parts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, mention_encoder_directory: Path, image_encoder: Path
) -> None:
    """Actors of Ray encode them; the last one alone is encoded in the process that goes on."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    count = 2 * 1024
    table = pa.table({"entity_id": [f"Q{n}" for n in range(count)], "name": [f"bear {n}" for n in range(count)]})
    entities, output, log = write(tmp_path / "e.parquet", table), tmp_path / "kb", tmp_path / "log"
    arguments = entities, output, "--tokenizer", tmp_path / "tokenizer", "--mention-encoder", mention_encoder_directory
    command = [sys.executable, "-m", "gemel_engine.cli.main", "build-kb", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    parts = output / "evidence-parts"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
    while not any(parts.glob("*.parquet")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    for ended in [*psutil.Process(process.pid).children(recursive=True), process]:  # those of Ray, too
        with suppress(psutil.NoSuchProcess):
            ended.kill()
    process.wait()
    written, *others = parts.glob("*.parquet")
    for path in others:  # of another actor, at the same moment
        path.unlink()
    assert not (output / "knowledge_base.json").exists()

    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    with pytest.raises(ConfigurationError, match="unfinished run with another image_encoder: remove it, or give the"):
        build(entities, str(output), loaded, STRICT, encoders_of(mention_encoder_directory, image_encoder))
    Path(entities).rename(tmp_path / "kept.parquet")
    write(tmp_path / "e.parquet", table.slice(1))
    with pytest.raises(ConfigurationError, match="unfinished run with another entities, files: remove it"):
        build(entities, str(output), loaded, STRICT, encoders_of(mention_encoder_directory, None))
    (tmp_path / "kept.parquet").rename(entities)

    with patch.object(EncodeEntities, "write_part", autospec=True, side_effect=EncodeEntities.write_part) as write_part:
        build(entities, str(output), loaded, STRICT, encoders_of(mention_encoder_directory, None))
    (missing,) = {"shard-00000", "shard-00001"} - {written.stem}
    assert [call.args[1].name for call in write_part.call_args_list] == [missing]
    assert opened(output).manifest.num_embedded_names == count
    assert not parts.exists()

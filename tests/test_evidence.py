"""The evidence index of a knowledge base, and the candidate pool over it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import MANIFEST, EntityPictures, EvidenceIndex, build_evidence
from gemel_engine.evidence.pool import CandidatePool, PoolSettings
from gemel_engine.mention_encoder import MentionEncoder
from gemel_engine.types import Mention

ENTITIES = pa.table(
    {
        "name": ["Mercury (planet)", "Mercury (element)", "Freddie Mercury", "Oslo", "Lyon"],
        "aliases": [["Hermes"], None, ["Farrokh Bulsara"], [], ["Hermes"]],
        "description": ["innermost planet", None, "singer of Queen", None, None],
        "popularity": [10.0, None, 90.0, 5.0, None],
    }
)
MENTION = Mention("m", "Queen and Mercury in Oslo", "Mercury", group="g")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, encoder: MentionEncoder) -> Path:
    directory = tmp_path_factory.mktemp("evidence")
    pictures = EntityPictures(np.eye(3, 4, dtype=np.float32), np.array([2, 2, 3], np.uint32), "an image encoder")
    build_evidence(ENTITIES, directory, knowledge_base="abc", mention_encoder=encoder, pictures=pictures)
    return directory


@pytest.fixture(scope="module")
def evidence(directory: Path) -> EvidenceIndex:
    return EvidenceIndex.open(directory, knowledge_base="abc", verify=True)


def test_an_index_knows_its_counts_and_encoders(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    assert evidence.texts is not None
    assert evidence.pictures is not None
    counts = evidence.manifest.num_entities, evidence.manifest.num_names, evidence.manifest.num_texts
    assert counts == (5, 8, 10)
    assert evidence.manifest.num_pictures == evidence.pictures.num_pictures == 3
    assert evidence.manifest.mention_encoder_fingerprint == encoder.fingerprint
    assert evidence.popularity is not None
    assert evidence.popularity.tolist() == [10, 0, 90, 5, 0]


def test_an_index_of_names_alone_is_searched_without_encoders(tmp_path: Path) -> None:
    evidence = build_evidence(ENTITIES.select(["name"]), tmp_path, knowledge_base="abc")
    assert evidence.texts is None
    assert evidence.pictures is None
    assert CandidatePool(evidence).pool([MENTION])[0]
    with pytest.raises(InputError, match="no entities"):
        build_evidence(ENTITIES.slice(0, 0), tmp_path / "none", knowledge_base="abc")


def test_a_damaged_or_foreign_index_is_refused(tmp_path: Path) -> None:
    build_evidence(ENTITIES, tmp_path, knowledge_base="abc")
    with pytest.raises(ArtifactError, match="of another knowledge base"):
        EvidenceIndex.open(tmp_path, knowledge_base="abd")
    (tmp_path / "dictionary/kinds.npy").write_bytes((tmp_path / "dictionary/rows.npy").read_bytes())
    with pytest.raises(ArtifactError, match=r"kinds\.npy has another checksum"):
        EvidenceIndex.open(tmp_path, verify=True)
    (tmp_path / "surprise").touch()
    with pytest.raises(ArtifactError, match="are not those of its"):
        EvidenceIndex.open(tmp_path, verify=True)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["num_texts"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="not the manifest of an evidence index"):
        EvidenceIndex.open(tmp_path)


def test_each_candidate_has_its_reasons(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    forms = FormStatistics(["Mercury"], [2], ["g"], encoder.encode(["Mercury"]))
    embeddings = encoder.encode(["Mercury"])
    features = [np.eye(4, dtype=np.float32)[2]]
    candidates = CandidatePool(evidence, forms).pool([MENTION], embeddings, encoder.encode([MENTION.text]), features)[0]
    reasons = {candidate.row: candidate.reasons for candidate in candidates}
    assert candidates[0].row == 2
    assert {"form", "words", "context", "similar_form", "similar_name", "popularity"} <= set(reasons[2])
    assert reasons[0]["base_name"] == 1
    assert "in_text" in reasons[3]
    assert "picture" in reasons[3]
    assert "alias" not in reasons[4]


def test_an_alias_of_several_entities_finds_all_of_them(evidence: EvidenceIndex) -> None:
    candidates = CandidatePool(evidence).pool([Mention("m", "hermes!", "Hermes")])[0]
    assert [candidate.row for candidate in candidates if "alias" in candidate.reasons] == [0, 4]


def test_a_mention_has_the_same_candidates_in_any_batch(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    mentions = [Mention(str(n), text, form) for n, (text, form) in enumerate([("x", "Oslo"), ("y", "Lyon"), ("", "?")])]
    embeddings = encoder.encode([mention.mention for mention in mentions])
    pool = CandidatePool(evidence, FormStatistics(["Oslo", "Lyons"], [3, 4], ["a", "b"], embeddings[:2]))
    together = pool.pool(mentions, embeddings)
    assert together == [pool.pool([mention], embeddings[n : n + 1])[0] for n, mention in enumerate(mentions)]


def test_a_training_mention_s_own_group_can_be_left_out(evidence: EvidenceIndex) -> None:
    pool = CandidatePool(evidence, FormStatistics(["Mercury"], [3], ["g"]))
    with_own = pool.pool([MENTION])[0]
    without = pool.pool([MENTION], leave_out_own_group=True)[0]
    assert any(candidate.reasons.get("form") for candidate in with_own)
    assert not any("form" in candidate.reasons or "frequency" in candidate.reasons for candidate in without)


def test_a_pool_is_empty_where_nothing_is_found_and_never_too_large(evidence: EvidenceIndex) -> None:
    pool = CandidatePool(evidence, settings=PoolSettings(size=2))
    few, none = pool.pool([MENTION, Mention("n", "", "qqq")])
    assert len(few) == 2
    assert none == []


def test_impossible_settings_of_a_pool_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="size is 0"):
        PoolSettings(size=0)
    with pytest.raises(ConfigurationError, match="no source 'guess'"):
        PoolSettings(weights={"guess": 1.0})

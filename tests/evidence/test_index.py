"""The evidence index of a knowledge base, and the candidate pool over it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.evidence import build_evidence
from support.tables import make_tokenizer

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import (
    MANIFEST,
    EvidenceIndex,
    entities_checksum,
    open_evidence,
)
from gemel_engine.evidence.pool import CandidatePool, Pool
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.retrieval.encoder import MentionEncoder
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
    first, second, third = np.eye(3, 4, dtype=np.float32)
    pictures = {2: np.stack([first, second]), 3: third[None]}
    build_evidence(ENTITIES, directory, mention_encoder=encoder, pictures=pictures)
    return directory


@pytest.fixture(scope="module")
def evidence(directory: Path) -> EvidenceIndex:
    return EvidenceIndex.open(directory, knowledge_base="abc", verify=True)


def test_an_index_knows_its_counts_and_encoders(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    assert evidence.names is not None
    assert evidence.descriptions is not None
    assert evidence.pictures is not None
    manifest = evidence.manifest
    assert (manifest.num_entities, manifest.num_names) == (5, 8)
    assert (manifest.num_embedded_names, manifest.num_descriptions) == (8, 2)
    assert evidence.manifest.num_pictures == evidence.pictures.index.num_vectors == 3
    assert evidence.manifest.mention_encoder_fingerprint == encoder.fingerprint
    assert evidence.popularity is not None
    assert evidence.popularity.tolist() == [10, 0, 90, 5, 0]


def test_an_index_of_names_alone_is_searched_without_encoders(tmp_path: Path) -> None:
    evidence = build_evidence(ENTITIES.select(["name"]), tmp_path)
    assert evidence.names is None
    assert evidence.pictures is None
    assert CandidatePool(evidence).pool([MENTION])[0].candidates
    with pytest.raises(InputError, match="no entities"):
        build_evidence(ENTITIES.slice(0, 0), tmp_path / "none")


def test_a_damaged_or_foreign_index_is_refused(tmp_path: Path) -> None:
    build_evidence(ENTITIES, tmp_path)
    with pytest.raises(ArtifactError, match="of another knowledge base"):
        EvidenceIndex.open(tmp_path, knowledge_base="abd")
    (tmp_path / "dictionary/kinds.npy").write_bytes((tmp_path / "dictionary/rows.npy").read_bytes())
    with pytest.raises(ArtifactError, match=r"kinds\.npy has another checksum"):
        EvidenceIndex.open(tmp_path, verify=True)
    (tmp_path / "surprise").touch()
    with pytest.raises(ArtifactError, match="are not those of its"):
        EvidenceIndex.open(tmp_path, verify=True)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["num_descriptions"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has been changed since it was written"):
        EvidenceIndex.open(tmp_path)


def test_each_candidate_has_its_reasons(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    forms = FormStatistics(["Mercury"], [2], ["g"], encoder.encode(["Mercury"]))
    embeddings = encoder.encode(["Mercury"])
    features = [np.eye(4, dtype=np.float32)[2]]
    of_texts = encoder.encode([MENTION.text])
    candidates = CandidatePool(evidence, forms).pool([MENTION], embeddings, of_texts, features)[0].candidates
    reasons = {candidate.row: candidate.reasons for candidate in candidates}
    assert candidates[0].row == 2
    assert {"form", "words", "context", "similar_form", "similar_name", "description", "popularity"} <= set(reasons[2])
    assert reasons[0]["base_name"] == 1
    assert "in_text" in reasons[3]
    assert "picture" in reasons[3]
    assert "alias" not in reasons[4]


def test_a_candidate_far_from_form_text_and_picture_is_compared_with_them(
    evidence: EvidenceIndex, encoder: MentionEncoder
) -> None:
    embeddings, of_texts = encoder.encode([MENTION.mention]), encoder.encode([MENTION.text])
    features = [np.ones(4, np.float32) + np.eye(4, dtype=np.float32)[2]]
    pool = CandidatePool(evidence, depth=2)  # few of the entities are among the nearest
    candidates = pool.pool([MENTION], embeddings, of_texts, features)[0].candidates
    assert len(candidates) > 2
    assert evidence.names is not None
    assert evidence.descriptions is not None
    assert evidence.pictures is not None
    rows = [candidate.row for candidate in candidates]
    for source, expected in (
        ("similar_name", evidence.names.similarities(embeddings[0], rows)),
        ("text_name", evidence.names.similarities(of_texts[0], rows)),
        ("description", evidence.descriptions.similarities(of_texts[0], rows)),
        ("picture", evidence.pictures.similarities(features[0], rows)),
    ):
        known = {row: next(c for c in candidates if c.row == row).reasons.get(source, 0.0) for row in expected}
        assert known == pytest.approx({row: max(0.0, value) for row, value in expected.items()}, abs=2e-5)


def test_allowed_entities_alone_are_candidates_however_many_rivals_they_have(
    tmp_path: Path, encoder: MentionEncoder
) -> None:
    num_entities, chosen = 100, frozenset({90, 95, 99})
    names = ["Springfield"] * (num_entities - 1) + ["Oslo"]
    descriptions = [f"town number {row}" for row in range(num_entities)]
    table = pa.table({"name": names, "description": descriptions, "popularity": [1.0] * num_entities})
    pictures = {row: np.random.default_rng(row).normal(size=(1, 4)).astype(np.float32) for row in range(num_entities)}
    evidence = build_evidence(table, tmp_path, mention_encoder=encoder, pictures=pictures)
    mention = Mention("m", descriptions[95], "Springfield")
    inputs = encoder.encode([mention.mention]), encoder.encode([mention.text]), [pictures[95][0]]
    pool = CandidatePool(evidence, FormStatistics(["Springfield"], [90], ["g"]), size=2, depth=4)
    twice = [np.repeat(item, 2, axis=0) for item in inputs]
    restricted, whole = pool.pool([mention] * 2, *twice, allowed=[chosen, None])  # type: ignore[arg-type]
    assert whole == pool.pool([mention], *inputs)[0]
    assert not {candidate.row for candidate in whole.candidates} & {95, 99}
    reasons = {candidate.row: candidate.reasons for candidate in restricted.candidates}
    assert reasons.keys() == {90, 95}
    assert set(restricted.of_form) <= chosen
    assert {"name", "words", "similar_name", "description", "picture", "popularity"} <= set(reasons[95])
    assert reasons[95]["picture"] == pytest.approx(1, abs=1e-4)
    assert reasons[90]["form"] == 1
    everything = CandidatePool(evidence, depth=4).pool([mention], *inputs, allowed=[chosen])[0].candidates
    assert {candidate.row for candidate in everything} == chosen  # one has no word of the form
    assert pool.pool([mention], *inputs, allowed=[frozenset()]) == [Pool()]


@pytest.mark.parametrize("num_words", [80, 20_000])
def test_the_text_around_a_mention_is_read_wherever_it_stands(evidence: EvidenceIndex, num_words: int) -> None:
    filler = " ".join(f"word{number}" for number in range(num_words))
    queen = "Freddie sang with Mercury and Queen in Oslo."
    text = f"Mercury in Lyon, Hermes. {filler} {queen} {filler}"
    places = [text.index("Mercury"), text.rindex("Mercury")]
    mentions = [Mention("m", queen, "Mercury"), *(Mention("m", text, "Mercury", place) for place in places)]
    alone, first, last = (
        {item.row: item.reasons.keys() & {"context", "in_text"} for item in pool.candidates if item.row >= 2}
        for pool in CandidatePool(evidence).pool(mentions)
    )
    assert last == alone != first


def test_an_alias_of_several_entities_finds_all_of_them(evidence: EvidenceIndex) -> None:
    candidates = CandidatePool(evidence).pool([Mention("m", "hermes!", "Hermes")])[0].candidates
    assert [candidate.row for candidate in candidates if "alias" in candidate.reasons] == [0, 4]


def test_a_mention_has_the_same_candidates_in_any_batch(evidence: EvidenceIndex, encoder: MentionEncoder) -> None:
    mentions = [Mention(str(n), text, form) for n, (text, form) in enumerate([("x", "Oslo"), ("y", "Lyon"), ("", "?")])]
    embeddings = encoder.encode([mention.mention for mention in mentions])
    pool = CandidatePool(evidence, FormStatistics(["Oslo", "Lyons"], [3, 4], ["a", "b"], embeddings[:2]))
    together = pool.pool(mentions, embeddings)
    assert together == [pool.pool([mention], embeddings[n : n + 1])[0] for n, mention in enumerate(mentions)]


def test_candidates_of_the_form_alone_ignore_text_and_picture(evidence: EvidenceIndex) -> None:
    mentions = [MENTION, Mention("n", "A ship left Oslo.", "Mercury")]
    pools = CandidatePool(evidence).pool(mentions, features=[np.eye(4, dtype=np.float32)[2], None])
    assert pools[0].of_form == pools[1].of_form
    assert pools[0].candidates != pools[1].candidates


def test_a_training_mention_s_own_group_can_be_left_out(evidence: EvidenceIndex) -> None:
    pool = CandidatePool(evidence, FormStatistics(["Mercury"], [3], ["g"]))
    with_own = pool.pool([MENTION])[0].candidates
    without = pool.pool([MENTION], leave_out_own_group=True)[0].candidates
    assert any(candidate.reasons.get("form") for candidate in with_own)
    assert not any("form" in candidate.reasons or "frequency" in candidate.reasons for candidate in without)


def test_a_pool_is_empty_where_nothing_is_found_and_never_too_large(evidence: EvidenceIndex) -> None:
    pool = CandidatePool(evidence, size=2)
    few, none = pool.pool([MENTION, Mention("n", "", "qqq")])
    assert (len(few.candidates), len(few.of_form)) == (2, 2)
    assert none == Pool()


def test_the_raw_features_of_an_entity_s_first_picture_are_kept(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(3, 5, (4, 6)).astype(np.float32)
    pictures = {0: features[3:], 1: features[1:2], 3: features[[0, 2]]}
    found = build_evidence(ENTITIES, tmp_path, pictures=pictures).pictures
    assert found is not None
    kept = [found.features_of(row) for row in range(5)]
    assert [None if values is None else values.tolist() for values in kept] == [
        features[3].tolist(), features[1].tolist(), None, features[0].tolist(), None,
    ]  # fmt: skip
    assert found.nearest([features[2]], 1) == [[(3, 1.0)]]
    np.testing.assert_allclose(found.moments[0], features.mean(axis=0), rtol=1e-5)
    np.save(tmp_path / "pictures/features.npy", features[:3])
    with pytest.raises(ArtifactError, match=r"arrays in .*pictures have the shapes \(\(3, 6\), \(4,\), \(2, 6\)\)"):
        EvidenceIndex.open(tmp_path)


def test_the_evidence_of_a_knowledge_base_lies_in_its_directory(tmp_path: Path) -> None:
    entities = pa.table({"entity_id": ["Q1", "Q2"], "name": ["Bear", "Zoo"]})
    directories = [tmp_path / "kb", tmp_path / "other"]
    for directory, table in zip(directories, (entities, entities.slice(1)), strict=True):
        build_knowledge_base(table, make_tokenizer(), directory, KnowledgeBaseSettings())
    assert open_evidence(directories[0]) is None
    build_evidence(entities, directories[0] / "evidence", knowledge_base=entities_checksum(directories[0]))
    evidence = open_evidence(directories[0], verify=True)
    assert evidence is not None
    assert evidence.manifest.num_entities == 2
    (directories[0] / "evidence").rename(directories[1] / "evidence")
    with pytest.raises(ArtifactError, match="is the evidence index of another knowledge base"):
        open_evidence(directories[1])

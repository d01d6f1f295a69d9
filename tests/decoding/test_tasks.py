"""The work for one mention: who ranks, what is certified, and what a prediction says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.names import ENTITY_NAMES

from gemel_engine.config.components import KnowledgeBaseSettings, PromptSettings, SearchSettings
from gemel_engine.decoding.engines.reference import TransformersEngine
from gemel_engine.decoding.generator import Artifacts, EntityNameGenerator
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.evidence.retrieved import PoolCandidate, PromptItem, Retrieved
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import CARD_PREFIX, Mention, Prediction, predictions_to_table, row_to_prediction

MENTION = Mention("m", "They saw the brown bear again.", "brown bear")
WEIGHTS = ScoreWeights(
    features={"form_prior": 1.0, "picture": 2.0},
    language_model=0.5,
    risks=((0.0, 0.2), (0.9, 0.01)),
    fitted_on={},
)


@pytest.fixture(scope="module")
def opened(artifacts: dict[str, Path]) -> Artifacts:
    return Artifacts(
        load_tokenizer(str(artifacts["language_model"])),
        KnowledgeBase.open(artifacts["knowledge_base"]),
        artifacts["knowledge_base"] / "trie",
        DemonstrationIndex.open(artifacts["demonstrations"]),
        None,
    )


@pytest.fixture(scope="module")
def engine(artifacts: dict[str, Path], opened: Artifacts) -> TransformersEngine:
    model = FrozenLanguageModel(str(artifacts["language_model"]), "float32")
    terminator = EntityNameGenerator(opened, None, PromptSettings(), SearchSettings()).terminator  # type: ignore[arg-type]
    return TransformersEngine(model, opened.knowledge_base.trie, terminator, 10)


def generator(
    opened: Artifacts,
    engine: TransformersEngine,
    weights: ScoreWeights | None = WEIGHTS,
    risk: float = 0.0,
    search: SearchSettings | None = None,
) -> EntityNameGenerator:
    return EntityNameGenerator(opened, engine, PromptSettings(), search or SearchSettings(), weights=weights, risk=risk)


def retrieved(opened: Artifacts, counts: dict[str, float]) -> Retrieved:
    """A pool with training mentions of the form for each entity, one demonstration and one card."""
    rows = {entity_id: opened.knowledge_base.row_of_entity(entity_id) for entity_id in counts}
    pool = [
        PoolCandidate(row, 1.0, {"form": count, "picture": 0.5} if count else {})
        for row, count in zip(rows.values(), counts.values(), strict=True)
        if row is not None
    ]
    return Retrieved((PromptItem(0),), (PromptItem(pool[0].row, is_card=True),), tuple(pool))


def link(linking: EntityNameGenerator, found: Retrieved, mention: Mention = MENTION) -> Prediction:
    (prediction,) = linking.generate([mention], [None], [found])
    (row,) = predictions_to_table([prediction]).to_pylist()
    stored = row_to_prediction(row)
    assert stored.candidates == prediction.candidates
    assert [item.entity_id for item in stored.pool] == [item.entity_id for item in prediction.pool]
    return prediction


def bonus(count: float) -> float:
    return math.log1p(count / 0.1) + 2.0 * 0.5 if count else 0.0


@pytest.mark.parametrize("counts", [{"Q3": 0.2, "Q5": 3.0, "Q7": 0.0}, {"Q3": 0.01, "Q9": 0.02}])
def test_the_score_is_the_best_of_all_entities(
    opened: Artifacts, engine: TransformersEngine, counts: dict[str, float]
) -> None:
    found = retrieved(opened, counts)
    everything = SearchSettings(num_candidates=99, num_to_certify=99, max_rollouts=9999, ranking="objective")
    by_model = link(generator(opened, engine, None, search=everything), found)
    assert (by_model.decided_by, by_model.score, by_model.confidence) == ("language_model", None, None)
    log_probs = {item.entity_id: item.log_prob for item in by_model.candidates}
    assert len(log_probs) == opened.knowledge_base.num_entities
    scores = {
        entity_id: 0.5 * (log_prob or 0.0) + bonus(counts.get(entity_id, 0.0))
        for entity_id, log_prob in log_probs.items()
    }
    best = max(scores, key=lambda entity_id: scores[entity_id])

    prediction = link(generator(opened, engine), found)
    assert prediction.decided_by == "score"
    assert prediction.certified
    assert prediction.entity_id == best
    assert prediction.score == pytest.approx(scores[best], abs=1e-3)
    assert prediction.log_prob == pytest.approx(log_probs[best], abs=1e-3)
    assert prediction.confidence is not None
    assert 0 < prediction.confidence <= 1
    first = prediction.candidates[0]
    assert first.score == pytest.approx(0.5 * (first.log_prob or 0.0) + (first.bonus or 0.0))
    assert {item.entity_id for item in prediction.pool} == set(counts)
    assert prediction.demonstration_ids[-1].startswith(CARD_PREFIX)
    assert prediction.demonstration_entity_ids[-1] == prediction.demonstration_ids[-1].removeprefix(CARD_PREFIX)


def test_pool_entities_that_the_search_did_not_reach_are_listed_too(
    opened: Artifacts, engine: TransformersEngine
) -> None:
    counts = {"Q5": 1e9, **{f"Q{number}": 0.0 for number in range(6, 14)}}
    search = SearchSettings(num_candidates=opened.knowledge_base.num_entities)
    prediction = link(generator(opened, engine, search=search), retrieved(opened, counts))
    assert prediction.entity_id == "Q5"
    assert {item.entity_id for item in prediction.candidates} >= set(counts)
    silent = [item for item in prediction.candidates if item.log_prob is None]
    assert silent
    assert all(item.score is None and item.bonus == 0.0 for item in silent)


def test_evidence_decides_alone_where_its_risk_is_accepted(opened: Artifacts, engine: TransformersEngine) -> None:
    plain, unclear = retrieved(opened, {"Q5": 50.0, "Q7": 0.0}), retrieved(opened, {"Q5": 1.0, "Q7": 1.0})
    linking = generator(opened, engine, risk=0.01)
    prediction = link(linking, plain)
    assert (prediction.decided_by, prediction.entity_id, prediction.num_rollouts) == ("evidence", "Q5", 0)
    assert (prediction.certified, prediction.log_prob, prediction.probability) == (False, None, None)
    assert prediction.confidence is not None
    assert prediction.confidence > 0.9
    assert prediction.demonstration_ids == ()
    assert [item.log_prob for item in prediction.candidates] == [None, None]
    assert link(linking, unclear).decided_by == "score"
    assert link(generator(opened, engine), plain).decided_by == "score"


def test_image_features_that_fit_no_picture_are_refused_without_a_mapper_too(
    opened: Artifacts, engine: TransformersEngine
) -> None:
    assert opened.index is not None
    width = opened.index.metadata.vision_width
    assert width is not None
    plain = retrieved(opened, {"Q5": 50.0, "Q7": 0.0})
    for weights, risk in ((None, 0.0), (WEIGHTS, 0.0), (WEIGHTS, 0.01)):  # with the last one, evidence decides alone
        linking = generator(opened, engine, weights, risk)
        features = [np.zeros(width + 1, np.float32), np.full(width, np.nan, np.float32), np.zeros(width, np.float32)]
        wide, unknown, fit = linking.generate([MENTION] * 3, features, [plain] * 3)
        assert (wide.error or "").startswith(f"invalid_mention: image_features holds {width + 1} numbers")
        assert "0 of them finite" in (unknown.error or "")
        assert fit.entity_id is not None


def test_a_mention_s_own_candidates_restrict_pool_and_search(opened: Artifacts, engine: TransformersEngine) -> None:
    found = retrieved(opened, {"Q5": 50.0, "Q7": 1.0})
    linking = generator(opened, engine, risk=0.2)
    restricted = Mention("m", MENTION.text, MENTION.mention, candidate_ids=("Q7", "Q2"))
    assert {item.entity_id for item in link(linking, found, restricted).candidates} <= {"Q7", "Q2"}
    outside = Mention("m", MENTION.text, MENTION.mention, candidate_ids=("Q1", "Q2"))
    prediction = link(linking, found, outside)
    assert prediction.decided_by == "score"
    assert prediction.certified
    assert {item.entity_id for item in prediction.candidates} <= {"Q1", "Q2"}
    unknown = Mention("m", MENTION.text, MENTION.mention, candidate_ids=("Q999",))
    (failed,) = linking.generate([unknown], [None], [found])
    assert failed.error is not None
    assert failed.error.startswith("invalid_mention: candidate_ids ['Q999']")


def test_a_mention_s_own_candidates_leave_the_bonuses_as_they_are(
    opened: Artifacts, engine: TransformersEngine
) -> None:
    found = retrieved(opened, {"Q5": 50.0, "Q7": 1.0})
    everything = SearchSettings(num_candidates=opened.knowledge_base.num_entities)
    linking = generator(opened, engine, replace(WEIGHTS, features={"likeness": 1.0}), search=everything)
    restricted = Mention("m", MENTION.text, MENTION.mention, candidate_ids=("Q7", "Q2"))
    alone, beside = (
        {item.entity_id: item.bonus for item in link(linking, found, mention).candidates}["Q7"]
        for mention in (restricted, MENTION)
    )
    assert alone == beside != 0.0


def test_without_candidates_the_language_model_ranks_alone(opened: Artifacts, engine: TransformersEngine) -> None:
    assert len(ENTITY_NAMES) > 10
    prediction = link(generator(opened, engine), Retrieved((PromptItem(0),)))
    assert prediction.decided_by == "language_model"
    assert prediction.pool == ()


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["language model", "score"])
def test_the_best_of_an_entitys_names_counts(
    weights: ScoreWeights | None,
    artifacts: dict[str, Path],
    opened: Artifacts,
    engine: TransformersEngine,
    tmp_path: Path,
) -> None:
    names = {"A": ["brown bear", "Braunb\u00e4r"], "B": ["river bank", "brown bears"], "C": ["polar bear"]}
    several = pa.table(
        {"entity_id": list(names), "name": [main for main, *_ in names.values()], "other_names": [*names.values()]}
    )
    flat = [name for of_entity in names.values() for name in of_entity]
    tables = {"several": several, "single": pa.table({"entity_id": flat, "name": flat})}
    everything = SearchSettings(num_candidates=99, num_to_certify=99, max_rollouts=9999, ranking="objective")
    model = FrozenLanguageModel(str(artifacts["language_model"]), "float32")
    newline = generator(opened, engine).terminator
    found = {}
    for name, table in tables.items():
        build_knowledge_base(table, opened.tokenizer, tmp_path / name, KnowledgeBaseSettings())
        knowledge_base = KnowledgeBase.open(tmp_path / name, verify=True)
        known = replace(opened, knowledge_base=knowledge_base, trie_directory=knowledge_base.trie_directory, index=None)
        reference = TransformersEngine(model, knowledge_base.trie, newline, 10)
        row = knowledge_base.row_of_entity("A" if name == "several" else "brown bear")
        assert row is not None
        pool = (PoolCandidate(row, 1.0, {"form": 0.01}),)
        found[name] = link(generator(known, reference, weights, search=everything), Retrieved((), (), pool))

    single = {candidate.entity_id: candidate.log_prob for candidate in found["single"].candidates}
    for candidate in found["several"].candidates:
        best = max(log_prob for name in names[candidate.entity_id] if (log_prob := single[name]) is not None)
        assert candidate.log_prob == pytest.approx(best, abs=1e-4)
    assert sorted(candidate.entity_id for candidate in found["several"].candidates) == ["A", "B", "C"]
    assert found["several"].certified


@pytest.mark.parametrize("counts", [{"Q3": 0.2, "Q5": 3.0, "Q7": 0.0}, {"Q5": 5.0, "Q7": 4.0}])
def test_other_weights_rank_an_earlier_prediction_again_where_it_proves_them(
    opened: Artifacts, engine: TransformersEngine, counts: dict[str, float]
) -> None:
    found, num_proved = retrieved(opened, counts), 0
    everything = SearchSettings(num_candidates=5, num_to_certify=5, max_rollouts=9999)
    for search in (SearchSettings(), everything):
        earlier = link(generator(opened, engine, search=search), found)
        for prior in (0.0, 0.5, 1.0, 5.0):
            weights = ScoreWeights(
                features={"form_prior": prior, "picture": 1.0}, language_model=0.7, risks=(), fitted_on={}
            )
            other = generator(opened, engine, weights)
            full = link(other, found)
            is_proved = other.can_continue(MENTION, None, found, earlier)
            num_proved += is_proved
            (again,) = other.generate([MENTION], [None], [found], [earlier if is_proved else None])
            assert (again.entity_id, again.certified) == (full.entity_id, full.certified)
            assert again.score == pytest.approx(full.score, abs=1e-3)
            assert again.demonstration_ids == full.demonstration_ids
            if is_proved:
                assert again.num_rollouts == earlier.num_rollouts
    assert num_proved
    earlier = link(generator(opened, engine), found)
    unclear = generator(opened, engine, risk=0.2)
    assert not unclear.can_continue(MENTION, None, found, earlier)  # evidence decides now
    elsewhere = Retrieved((), found.own, found.candidates)
    assert not generator(opened, engine).can_continue(MENTION, None, elsewhere, earlier)

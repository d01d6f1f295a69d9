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
from gemel_engine.decoding.search import FoundName, SearchResult
from gemel_engine.decoding.tasks import NameTask
from gemel_engine.evidence.retrieved import PoolCandidate, PromptItem, Retrieved
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.trie import PrefixTrie
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
        DemonstrationIndex.open(artifacts["demonstrations"]),
        None,
    )


@pytest.fixture(scope="module")
def model(artifacts: dict[str, Path]) -> FrozenLanguageModel:
    return FrozenLanguageModel(str(artifacts["language_model"]), "float32")


@pytest.fixture(scope="module")
def engine(model: FrozenLanguageModel, opened: Artifacts) -> TransformersEngine:
    terminator = EntityNameGenerator(opened, None, PromptSettings(), SearchSettings()).terminator  # type: ignore[arg-type]
    return TransformersEngine(model, opened.knowledge_base.trie, terminator, 10)


def built(opened: Artifacts, entities: dict[str, list[str]], directory: Path) -> Artifacts:
    """Artifacts with a knowledge base of these entities, each with its main name and others."""
    columns = {"name": [main for main, *_ in entities.values()], "other_names": [*entities.values()]}
    build_knowledge_base(
        pa.table({"entity_id": [*entities], **columns}), opened.tokenizer, directory, KnowledgeBaseSettings()
    )
    knowledge_base = KnowledgeBase.open(directory, verify=True)
    return replace(opened, knowledge_base=knowledge_base, index=None)


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
    model: FrozenLanguageModel,
    opened: Artifacts,
    engine: TransformersEngine,
    tmp_path: Path,
) -> None:
    names = {"A": ["brown bear", "Braunb\u00e4r"], "B": ["river bank", "brown bears"], "C": ["polar bear"]}
    single = {name: [name] for of_entity in names.values() for name in of_entity}
    everything = SearchSettings(num_candidates=99, num_to_certify=99, max_rollouts=9999, ranking="objective")
    newline = generator(opened, engine).terminator
    found = {}
    for kind, entities in {"several": names, "single": single}.items():
        known = built(opened, entities, tmp_path / kind)
        reference = TransformersEngine(model, known.knowledge_base.trie, newline, 10)
        row = known.knowledge_base.row_of_entity("A" if kind == "several" else "brown bear")
        assert row is not None
        pool = (PoolCandidate(row, 1.0, {"form": 0.01}),)
        found[kind] = link(generator(known, reference, weights, search=everything), Retrieved((), (), pool))

    log_probs = {candidate.entity_id: candidate.log_prob for candidate in found["single"].candidates}
    for candidate in found["several"].candidates:
        best = max(log_prob for name in names[candidate.entity_id] if (log_prob := log_probs[name]) is not None)
        assert candidate.log_prob == pytest.approx(best, abs=1e-4)
    assert sorted(candidate.entity_id for candidate in found["several"].candidates) == ["A", "B", "C"]
    assert found["several"].certified


@pytest.mark.parametrize(("num_names", "num_entities"), [(0, 0), (1, 1), (2, 1), (3, 3), (4, 3)])
def test_what_is_certified_are_entities_of_certified_names(
    num_names: int, num_entities: int, opened: Artifacts, engine: TransformersEngine, tmp_path: Path
) -> None:
    entities = {
        "A": ["brown bear", "Braunb\u00e4r"],
        "B": ["river bank"],
        **{f"C{n}": ["polar bear"] for n in range(9)},
    }
    known = built(opened, entities, tmp_path / "knowledge_base")
    trie = known.knowledge_base.trie
    order = ["brown bear", "Braunb\u00e4r", "polar bear", "river bank"]
    numbers = [trie.name_index(trie.walk(known.tokenizer.encode(name, add_special_tokens=False))) for name in order]
    names = tuple(FoundName(number, -1.0 - place, -1.0 - place) for place, number in enumerate(numbers))
    limited = generator(known, engine, None, search=SearchSettings(num_candidates=3))
    task = NameTask(limited, MENTION, None, Retrieved(), None)
    task.finish(SearchResult(names, num_names, -1.0, 0.1, 4, -9.0))
    found = task.prediction
    assert [candidate.entity_id for candidate in found.candidates] == ["A", "C0", "C1"]
    assert (found.certified, found.num_certified) == (num_names > 0, num_entities)


@pytest.mark.parametrize("num_to_certify", [1, 2])
def test_entities_of_one_name_leave_what_an_added_name_is_compared_with(
    num_to_certify: int, model: FrozenLanguageModel, opened: Artifacts, engine: TransformersEngine, tmp_path: Path
) -> None:
    before = {f"{name}{n}": [name] for name in ("river bank", "polar bear", "star") for n in range(3)}
    search = SearchSettings(num_candidates=3, num_to_certify=num_to_certify, ranking="objective")
    old, new = built(opened, before, tmp_path / "old"), built(opened, {**before, "B": ["brown bear"]}, tmp_path / "new")
    terminator = generator(opened, engine).terminator
    engines = [TransformersEngine(model, known.knowledge_base.trie, terminator, 10) for known in (old, new)]
    linking = generator(old, engines[0], None, search=search)
    earlier = link(linking, Retrieved())
    assert len({candidate.entity_name for candidate in earlier.candidates}) == 1
    assert earlier.num_certified == 3
    (kept,) = linking.generate([MENTION], [None], [Retrieved()], [earlier])
    assert replace(kept, probability=earlier.probability) == earlier
    full, adding = generator(new, engines[1], None, search=search), generator(new, engines[1], None, search=search)
    brown_bear = opened.tokenizer.encode("brown bear", add_special_tokens=False)
    adding.added_names = PrefixTrie.from_sequences([brown_bear])[0]
    (continued,) = adding.generate([MENTION], [None], [Retrieved()], [earlier])
    expected = link(full, Retrieved())
    assert [item.entity_id for item in continued.candidates] == [item.entity_id for item in expected.candidates]
    assert continued.margin == pytest.approx(expected.margin, abs=1e-4)
    assert 0 < (continued.num_certified or 0) <= (expected.num_certified or 0)


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

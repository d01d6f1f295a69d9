"""Ranking a row again by other weights: what it proves is never false."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from gemel_engine.decoding.ranking import Heard, ranked_again, ranking_of
from gemel_engine.decoding.scope import Scope
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of
from gemel_engine.types import Candidate, Prediction

pytestmark = pytest.mark.unit


class Names:
    """Entities Q0, Q1, … with their names, some shared, as much of a knowledge base as ranking needs."""

    def __init__(self, names_of: list[list[int]]) -> None:
        self.names_of = names_of

    def row_of_entity(self, entity_id: str) -> int | None:
        row = int(entity_id.removeprefix("Q"))
        return row if row < len(self.names_of) else None

    def entity(self, row: int) -> SimpleNamespace:
        return SimpleNamespace(entity_id=f"Q{row}", name=f"name {self.names_of[row][0]}")

    def names_of_row(self, row: int) -> list[int]:
        return self.names_of[row]

    def entities_of_name(self, name: int) -> list[int]:
        return [row for row, names in enumerate(self.names_of) if name in names]


def scope(names: Names) -> Scope:
    return Scope(names, None)  # type: ignore[arg-type]


def row(names: Names, found: list[int], log_probs: np.ndarray, size: int, unexplored: float = 0.0) -> Prediction:
    """What a search says that found these names, and stores the most probable of their entities."""
    best: dict[int, float] = {}
    for name in found:
        for entity in names.entities_of_name(name):
            best[entity] = max(float(log_probs[name]), best.get(entity, -np.inf))
    stored = sorted(best, key=lambda entity: -best[entity])[:size]
    first = best[stored[0]]
    return Prediction(
        "m",
        entity_id=f"Q{stored[0]}",
        log_prob=first,
        probability=float(np.exp(first) / (np.exp(log_probs).sum() + unexplored)),
        candidates=(*(Candidate(f"Q{e}", "", best[e]) for e in stored), Candidate("Q0", "", None, 1.0)),
    )


@pytest.mark.parametrize("num_names_of_entity", [1, 3])
@pytest.mark.parametrize("seed", range(150))
def test_what_is_certified_is_the_best_of_all_entities(seed: int, num_names_of_entity: int) -> None:
    rng = np.random.default_rng(seed)
    num_names = int(rng.integers(3, 12))
    names = Names(
        [rng.permutation(num_names)[: rng.integers(1, num_names_of_entity + 1)].tolist() for _ in range(2 * num_names)]
    )
    used = sorted({name for of_entity in names.names_of for name in of_entity})
    log_probs = np.log(np.maximum(rng.dirichlet(np.full(num_names, 0.2)), 1e-12) * rng.uniform(0.3, 1.0))
    found = rng.permutation(used)[: rng.integers(1, 5)].tolist()
    prediction = row(names, found, log_probs, int(rng.integers(1, 6)), float(rng.uniform(0, 0.05)))
    pool = rng.permutation(2 * num_names)[: rng.integers(0, num_names)].tolist()
    bonuses = dict(zip(pool, rng.normal(scale=2.0, size=len(pool)).tolist(), strict=True))
    weight = float(rng.uniform(0.1, 2.0))

    heard = Heard.of(prediction, scope(names))
    assert heard is not None
    again = ranked_again(prediction, scope(names), bonuses, heard, weight, 99)
    truth = {
        e: weight * max(log_probs[name] for name in of_entity) + bonuses.get(e, 0.0)
        for e, of_entity in enumerate(names.names_of)
    }
    best = sorted(truth.values(), reverse=True)
    for place, candidate in enumerate(again.candidates[: again.num_certified]):
        assert truth[int(candidate.entity_id[1:])] == pytest.approx(best[place])
        assert candidate.score == pytest.approx(best[place])
    assert again.certified == bool(again.num_certified)
    assert again.log_prob == again.candidates[0].log_prob
    assert 0 < (again.confidence or 0) <= 1


def test_most_rows_of_a_finished_search_are_proved_again() -> None:
    rng, num_proved = np.random.default_rng(0), 0
    names = Names([[name] for name in range(10)])
    for _ in range(100):
        log_probs = np.log(rng.dirichlet(np.full(10, 0.2)) + 1e-12)
        known = np.argsort(-log_probs)[:4].tolist()
        heard = Heard.of(row(names, known, log_probs, 4), scope(names))
        num_proved += ranking_of({known[1]: 1.0, 9: 0.5}, heard, 0.5).num_certified > 0
    assert num_proved > 70


@pytest.mark.parametrize("probability", [0.0, 5e-324])
def test_a_share_too_small_for_float64_proves_nothing_of_other_names(probability: float) -> None:
    names = Names([[0], [1]])
    stated = Prediction("m", log_prob=-760.0, probability=probability, candidates=(Candidate("Q0", "", -760.0),))
    heard = Heard.of(stated, scope(names))
    assert heard is not None
    assert heard.log_mass == 0.0
    assert ranking_of({0: 46.0}, heard, 0.0628).num_certified == 0  # the other entity may score -0.04
    assert ranking_of({0: 50.0}, heard, 0.0628).num_certified == 1


def test_entities_of_one_name_are_looked_up_once() -> None:
    names = Names([[0]] * 20 + [[1, 0]])
    prediction = row(names, [0], np.log([0.5, 0.1]), 5)
    with patch.object(names, "entities_of_name", wraps=names.entities_of_name) as lookup:
        heard = Heard.of(prediction, scope(names))
    assert lookup.call_count == 1
    assert heard is not None
    assert heard.log_probs == dict.fromkeys(range(20), pytest.approx(np.log(0.5)))
    assert heard.log_limits == {20: pytest.approx(np.log(0.5))}


def test_evidence_alone_orders_by_bonus_and_proves_nothing() -> None:
    names = Names([[0], [1], [2]])
    weights = ScoreWeights(features={"form_prior": 1.0}, language_model=1.0, risks=(), fitted_on={})
    bonuses = bonuses_of("x", [0, 2], [{"form": 0.9}, {"form": 9.9}], weights, names)  # type: ignore[arg-type]
    assert list(bonuses) == [2, 0]
    before = Prediction("m", log_prob=-1.0, probability=0.5, demonstration_ids=("d",), num_rollouts=3)
    again = ranked_again(before, scope(names), bonuses, None, 1.0, 5)
    assert (again.entity_id, again.decided_by, again.certified, again.num_rollouts) == ("Q2", "evidence", False, 0)
    assert (again.log_prob, again.probability, again.score, again.demonstration_ids) == (None, None, None, ())
    assert again.margin == pytest.approx(np.log(100) - np.log(10))
    assert again.confidence == pytest.approx(10 / 11)


def test_an_entity_held_out_is_not_found() -> None:
    names = Names([[0], [1]])
    heard = Heard.of(row(names, [0, 1], np.log([0.6, 0.3]), 2), scope(names))
    assert heard is not None
    assert heard.without(0).log_probs == {1: pytest.approx(np.log(0.3))}
    assert Heard.of(Prediction("m"), scope(names)) is None

"""The search for entities against brute force: random tries, scorers, bonuses of both signs, homonyms, many names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.scorer import (
    PROMPT,
    TERMINATOR,
    VOCABULARY,
    RandomScorer,
    assert_mass_is_accounted_for,
    many_examples,
    random_names,
)

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.entity_search import EntitySearch, EntitySearchResult, PoolEntity
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch, SearchResult
from gemel_engine.errors import ConfigurationError
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.unit


@dataclass
class World:
    """A random trie and scorer, and entities that share names and may have several."""

    trie: PrefixTrie
    scorer: RandomScorer
    rows_of_name: list[list[int]]
    pool: list[PoolEntity]
    weight: float = 1.0

    @classmethod
    def random(
        cls, seed: int, num_names: int, num_links: int, num_in_pool: int, bonus: float, weight: float, num_children: int
    ) -> Self:
        """Name n is of entity n and of those that links add; bonuses are multiples of a quarter."""
        rng = np.random.default_rng(seed)
        trie, _ = PrefixTrie.from_sequences(random_names(rng, num_names))
        owners = [{name} for name in range(trie.num_names)]
        for name in rng.integers(0, trie.num_names, num_links):
            owners[name].add(int(rng.integers(0, trie.num_names + 5)))
        rows = rng.permutation(sorted(set().union(*owners)))[:num_in_pool].tolist()
        bonuses = (rng.normal(size=len(rows)) * bonus * 4).round() / 4
        world = cls(trie, RandomScorer(trie, seed, float(rng.choice([0.3, 0.5, 1.0])), num_children), [], [], weight)
        world.rows_of_name = [sorted(of_name) for of_name in owners]
        names_of_row = world.names_of_row
        world.pool = [
            PoolEntity(row, b, tuple(names_of_row[row])) for row, b in zip(rows, bonuses.tolist(), strict=True)
        ]
        return world

    @property
    def names_of_row(self) -> dict[int, list[int]]:
        names: dict[int, list[int]] = {}
        for name, rows in enumerate(self.rows_of_name):
            for row in rows:
                names.setdefault(row, []).append(name)
        return names

    @cached_property
    def log_probs(self) -> list[float]:
        """Log-prob of each name."""
        return [self.scorer.name_log_prob(tuple(self.trie.name_tokens(n))) for n in range(self.trie.num_names)]

    def truth(self) -> list[tuple[float, int]]:
        """All entities as (score, row), best first, ties by row."""
        bonuses = {entity.row: entity.bonus for entity in self.pool}
        scores = [
            (self.weight * max(self.log_probs[name] for name in names) + bonuses.get(row, 0.0), row)
            for row, names in self.names_of_row.items()
        ]
        return sorted(scores, key=lambda scored: (-scored[0], scored[1]))

    def search(self, search_settings: SearchSettings) -> EntitySearch:
        return EntitySearch(
            self.trie, self.rows_of_name.__getitem__, self.pool, self.weight, TERMINATOR, search_settings
        )

    def run(self, search_settings: SearchSettings) -> EntitySearchResult:
        ((_, result),) = run_searches(self.scorer, [("key", PROMPT, self.search(search_settings))], max_in_flight=1)
        return result

    def run_names(self, trie: PrefixTrie, search_settings: SearchSettings) -> SearchResult:
        search = NameSearch(trie, TERMINATOR, search_settings, are_candidates=trie is not self.trie)
        ((_, result),) = run_searches(self.scorer, [("key", PROMPT, search)], max_in_flight=1)
        return result


def worlds(bonuses: st.SearchStrategy[float], num_links: st.SearchStrategy[int]) -> st.SearchStrategy[World]:
    return st.builds(
        World.random,
        seed=st.integers(0, 2**32 - 1),
        num_names=st.integers(1, 80),
        num_links=num_links,
        num_in_pool=st.integers(0, 32),
        bonus=bonuses,
        weight=st.floats(0.1, 3),
        num_children=st.integers(1, VOCABULARY),
    )


any_worlds = worlds(st.sampled_from([1.0, 3.0, 10.0]), st.integers(0, 30))
worlds_of_one_name_each = worlds(st.just(0.0), st.just(0)).map(lambda world: replace(world, weight=1.0))


@many_examples
@given(world=any_worlds, width=st.integers(1, 6))
def test_certified_entities_are_the_best_of_all(world: World, width: int) -> None:
    result = world.run(SearchSettings(num_to_certify=5, width=width, max_rollouts=10_000))
    expected = world.truth()[:5]
    assert result.num_certified == len(expected)
    assert [found.row for found in result.entities] == [row for _, row in expected]
    assert [found.score for found in result.entities] == pytest.approx([score for score, _ in expected])
    for found in result.entities:
        assert found.row in world.rows_of_name[found.name_index]
        assert found.log_prob == pytest.approx(world.log_probs[found.name_index])


@many_examples
@given(
    world=any_worlds,
    width=st.integers(1, 6),
    num_to_certify=st.integers(1, 5),
    budget=st.integers(1, 12),
    num_tokens=st.none() | st.integers(1, 20),
    newest_first=st.booleans(),
)
def test_a_budget_never_makes_a_false_claim(
    world: World, width: int, num_to_certify: int, budget: int, num_tokens: int | None, newest_first: bool
) -> None:
    """Checked after every answer, in whatever order the answers come, and so is the bound that proves it."""
    search = world.search(
        SearchSettings(
            num_candidates=100, num_to_certify=num_to_certify, width=width, max_rollouts=budget, max_tokens=num_tokens
        )
    )
    truth, requests = world.truth(), search.next_requests()
    total = math.fsum(map(math.exp, world.log_probs))
    while requests:
        request = requests.pop(-1 if newest_first else 0)
        search.observe(request, world.scorer.rollout(request))
        result = search.result()
        assert 1 <= result.num_rollouts <= budget
        proved = result.entities[: result.num_certified]
        assert [found.row for found in proved] == [row for _, row in truth[: len(proved)]]
        assert [found.score for found in proved] == pytest.approx([score for score, _ in truth[: len(proved)]])
        assert all(found.score >= result.highest_bound for found in proved)
        scores = {found.row: found.score for found in result.entities}
        still_higher = [score for score, row in truth if score > scores.get(row, -math.inf) + 1e-9]
        assert all(score <= result.highest_bound + 1e-9 for score in still_higher)
        assert_mass_is_accounted_for(result, total)
        if search.is_done:
            break
        requests += search.next_requests()
    assert search.is_done


@many_examples
@given(world=worlds_of_one_name_each, width=st.integers(1, 6), budget=st.sampled_from([1, 3, 10_000]))
def test_without_a_pool_it_is_the_search_for_names(world: World, width: int, budget: int) -> None:
    world.pool = []
    by_log_prob = SearchSettings(ranking="objective", num_to_certify=3, width=width, max_rollouts=budget)
    result, names = world.run(by_log_prob), world.run_names(world.trie, by_log_prob)
    assert [(e.row, e.name_index, e.log_prob, e.score) for e in result.entities] == [
        (name.name_index, name.name_index, name.log_prob, name.score) for name in names.names
    ]
    assert (result.num_certified, result.num_rollouts) == (names.num_certified, names.num_rollouts)
    assert (result.highest_bound, result.log_explored_mass) == (names.highest_bound, names.log_explored_mass)
    assert result.unexplored_mass == names.unexplored_mass


@many_examples
@given(world=worlds_of_one_name_each, width=st.integers(1, 6), num_to_certify=st.integers(1, 3))
def test_a_pool_without_bonuses_asks_as_the_search_for_names_does(
    world: World, width: int, num_to_certify: int
) -> None:
    limits = SearchSettings(ranking="objective", num_to_certify=num_to_certify, width=width, max_rollouts=10_000)
    search, names = world.search(limits), NameSearch(world.trie, TERMINATOR, limits)
    while not names.is_done:
        requests = names.next_requests()
        assert search.next_requests() == requests
        for request in requests:
            names.observe(request, world.scorer.rollout(request))
            search.observe(request, world.scorer.rollout(request))
    assert search.is_done


def tree(bonuses: dict[int, float]) -> World:
    """All names of three tokens out of five, each of one entity."""
    trie, _ = PrefixTrie.from_sequences([(a, b, c) for a in range(5) for b in range(5) for c in range(5)])
    pool = [PoolEntity(row, bonus, (row,)) for row, bonus in bonuses.items()]
    return World(trie, RandomScorer(trie, 2, 1.0, 3), [[name] for name in range(trie.num_names)], pool)


def test_once_a_bonus_outweighs_all_names_rollouts_are_restricted_to_the_pool() -> None:
    world = tree({7: 30.0, 70: 20.0, 71: -5.0})
    search = world.search(SearchSettings(width=1, num_to_certify=2))
    over_all_names = []  # for each rollout, whether it is, and whether a score above 0 was known before
    is_known = False
    while not search.is_done:
        for request in search.next_requests():
            over_all_names.append((request.candidates is None, is_known))
            search.observe(request, world.scorer.rollout(request))
            is_known = len(search.result().entities) > 1 and search.result().entities[1].score > 0
    assert [found.row for found in search.result().entities[:2]] == [7, 70]
    assert search.result().num_certified >= 2
    assert (False, False) in over_all_names, "a rollout in the pool finds the first of the two"
    assert (True, True) not in over_all_names


def test_the_least_probable_name_wins_exactly_where_its_bonus_is_large_enough() -> None:
    world = tree({})
    (best, by_model), (worst, in_pool) = world.truth()[0], world.truth()[-1]
    for bonus, winner in ((best - worst + 0.01, in_pool), (best - worst - 0.01, by_model)):
        world.pool = [PoolEntity(in_pool, bonus, (in_pool,))]
        result = world.run(SearchSettings())
        assert result.num_certified >= 1
        assert result.entities[0].row == winner


def test_homonyms_differ_by_their_bonuses_alone() -> None:
    world = tree({})
    world.rows_of_name[3] = [3, 125, 126]
    world.pool = [PoolEntity(126, 30.0, (3,)), PoolEntity(3, 20.0, (3,))]
    result = world.run(SearchSettings(num_candidates=200, num_to_certify=2))
    assert [found.row for found in result.entities[: result.num_certified]] == [126, 3]
    of_name = {found.row: found.score - found.log_prob for found in result.entities if found.name_index == 3}
    assert of_name == pytest.approx({126: 30.0, 3: 20.0, 125: 0.0})


def test_searches_of_both_kinds_share_an_engine() -> None:
    world = tree({5: 2.0, 9: 1.0, 40: 3.0})
    limits = SearchSettings(ranking="objective")
    kinds: list[EntitySearch | NameSearch] = [
        world.search(limits) if number % 2 else NameSearch(world.trie, TERMINATOR, limits) for number in range(12)
    ]
    results = dict(run_searches(world.scorer, [(n, PROMPT, kind) for n, kind in enumerate(kinds)], max_in_flight=5))
    alone = [world.run_names(world.trie, limits), world.run(limits)]
    assert [results[number] for number in range(12)] == alone * 6


@pytest.mark.parametrize(
    ("weight", "bonus", "named"),
    [
        (0.0, 1.0, "the weight is 0.0"),
        (math.inf, 1.0, "the weight is inf"),
        (math.nan, 1.0, "the weight is nan"),
        (1.0, math.nan, "the bonus of row 2 is nan"),
        (1.0, math.inf, "the bonus of row 2 is inf"),
    ],
)
def test_a_score_without_an_order_is_refused(weight: float, bonus: float, named: str) -> None:
    world = tree({2: bonus})
    world.weight = weight
    with pytest.raises(ConfigurationError, match=f"{named}: give finite ones, the weight above 0"):
        world.search(SearchSettings())

"""The search for entities against brute force: random tries, scorers, bonuses of both signs, homonyms, many names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scorer import PROMPT, TERMINATOR, RandomScorer, problems

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
    weight: float

    def __init__(self, problem: dict[str, Any], links: list[list[int]], bonuses: dict[int, float], weight: float):
        self.trie, _ = PrefixTrie.from_sequences(problem["names"])
        self.scorer = RandomScorer(self.trie, problem["seed"], problem["temperature"], problem["num_children"])
        # Name n belongs to entity n and to those that `links` adds.
        num_names = self.trie.num_names
        self.rows_of_name = [
            sorted({name, *(row % (num_names + 5) for row in links[name % len(links)])}) for name in range(num_names)
        ]
        names_of_row: dict[int, list[int]] = {}
        for name, rows in enumerate(self.rows_of_name):
            for row in rows:
                names_of_row.setdefault(row, []).append(name)
        self.names_of_row = names_of_row
        self.pool = [PoolEntity(row, b, tuple(names_of_row[row])) for row, b in bonuses.items() if row in names_of_row]
        self.weight = weight
        self.log_probs = [self.scorer.name_log_prob(tuple(self.trie.name_tokens(name))) for name in range(num_names)]

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


rows = st.integers(0, 64)
bonuses = st.dictionaries(rows, st.integers(-32, 32).map(lambda n: n / 4), max_size=32)
worlds = st.builds(
    World,
    problem=problems,
    links=st.lists(st.lists(rows, max_size=3), min_size=1, max_size=10),
    bonuses=bonuses,
    weight=st.floats(0.1, 3),
)
worlds_of_one_name_each = st.builds(
    World,
    problem=problems,
    links=st.just([[]]),
    bonuses=st.dictionaries(rows, st.just(0.0), max_size=32),
    weight=st.just(1.0),
)


@settings(max_examples=1000)
@given(world=worlds, width=st.integers(1, 6))
def test_certified_entities_are_the_best_of_all(world: World, width: int) -> None:
    result = world.run(SearchSettings(num_to_certify=5, width=width, max_rollouts=10_000))
    expected = world.truth()[:5]
    assert result.num_certified == len(expected)
    assert [found.row for found in result.entities] == [row for _, row in expected]
    assert [found.score for found in result.entities] == pytest.approx([score for score, _ in expected])
    for found in result.entities:
        assert found.row in world.rows_of_name[found.name_index]
        assert found.log_prob == pytest.approx(world.log_probs[found.name_index])


@settings(max_examples=1000)
@given(
    world=worlds,
    width=st.integers(1, 6),
    num_to_certify=st.integers(1, 5),
    budget=st.integers(1, 6),
    num_tokens=st.none() | st.integers(1, 20),
    newest_first=st.booleans(),
)
def test_a_budget_never_makes_a_false_claim(
    world: World, width: int, num_to_certify: int, budget: int, num_tokens: int | None, newest_first: bool
) -> None:
    """Checked after every answer, in whatever order the answers come."""
    search = world.search(
        SearchSettings(
            num_candidates=100, num_to_certify=num_to_certify, width=width, max_rollouts=budget, max_tokens=num_tokens
        )
    )
    truth, requests = world.truth(), search.next_requests()
    while requests:
        request = requests.pop(-1 if newest_first else 0)
        search.observe(request, world.scorer.rollout(request))
        result = search.result()
        assert 1 <= result.num_rollouts <= budget
        proved = result.entities[: result.num_certified]
        assert [found.row for found in proved] == [row for _, row in truth[: len(proved)]]
        assert [found.score for found in proved] == pytest.approx([score for score, _ in truth[: len(proved)]])
        explored = math.exp(result.log_explored_mass)
        assert explored + result.unexplored_mass >= math.fsum(map(math.exp, world.log_probs)) - 1e-9
        if search.is_done:
            break
        requests += search.next_requests()
    assert search.is_done


@settings(max_examples=500)
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


@settings(max_examples=500)
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


def tree(bonuses: dict[int, float], temperature: float = 1.0) -> World:
    """All names of three tokens out of five, each of one entity."""
    names = [(a, b, c) for a in range(5) for b in range(5) for c in range(5)]
    problem = {"names": names, "seed": 0, "temperature": temperature, "num_children": 3}
    return World(problem, [[]], bonuses, 1.0)


def test_a_bonus_that_outweighs_all_names_needs_one_rollout_over_them() -> None:
    world = tree({7: 30.0, 70: 20.0, 71: -5.0})
    search = world.search(SearchSettings())
    asked = []
    while not search.is_done:
        for request in search.next_requests():
            asked.append(request)
            search.observe(request, world.scorer.rollout(request))
    result = search.result()
    assert result.entities[0].row == 7
    assert result.num_certified >= 1
    assert [request.candidates is None for request in asked] == [True, *[False] * (len(asked) - 1)]
    assert len(asked) <= 4


def test_a_pool_that_the_model_does_not_find_is_found_and_another_name_still_wins_where_it_scores_higher() -> None:
    world = tree({})
    best, worst = world.truth()[0], world.truth()[-1]
    needed = best[0] - worst[0]
    for bonus, winner in ((needed + 0.1, worst[1]), (needed - 0.1, best[1])):
        world.pool = [PoolEntity(worst[1], bonus, (worst[1],))]
        result = world.run(SearchSettings(num_to_certify=2))
        assert result.num_certified == 2
        assert result.entities[0].row == winner
        assert {found.row for found in result.entities[:2]} == {best[1], worst[1]}


def test_homonyms_differ_by_their_bonuses_alone() -> None:
    world = tree({})
    world.rows_of_name[3] = [3, 125, 126]
    world.pool = [PoolEntity(126, 9.0, (3,)), PoolEntity(3, 8.0, (3,))]
    result = world.run(SearchSettings(num_to_certify=2))
    assert [(found.row, found.name_index) for found in result.entities] == [(126, 3), (3, 3), (125, 3)]
    assert [found.score - found.log_prob for found in result.entities] == pytest.approx([9.0, 8.0, 0.0])
    assert (result.num_certified, result.num_rollouts) == (2, 1)


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

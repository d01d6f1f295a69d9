"""The search against brute force: random tries, random scorers, every claim it makes checked."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.scorer import (
    PROMPT,
    TERMINATOR,
    VOCABULARY,
    Problem,
    RandomScorer,
    assert_mass_is_accounted_for,
    many_examples,
    problems,
)

from gemel_engine.config.components import Objective, SearchSettings
from gemel_engine.decoding.engines.base import RolloutRequest
from gemel_engine.decoding.resume import merge_results, numbered_in
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch, SearchResult
from gemel_engine.errors import GemelError
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.unit


def true_ranking(
    problem: Problem, scorer: RandomScorer, numbers: Iterable[int], objective: Objective
) -> list[tuple[float, int]]:
    """All names as (objective, name index), best first."""
    lengths = [1 if objective == "sum" else len(name) + 1 for name in problem.names]
    scores = [scorer.name_log_prob(name) / length for name, length in zip(problem.names, lengths, strict=True)]
    return sorted(zip(scores, map(int, numbers), strict=True), reverse=True)


def solve(
    problem: Problem, search_settings: SearchSettings
) -> tuple[list[tuple[float, int]], SearchResult, RandomScorer]:
    """The true ranking, and what the search says."""
    trie, numbers = PrefixTrie.from_sequences(problem.names)
    scorer = problem.scorer(trie)
    search = NameSearch(trie, TERMINATOR, search_settings)
    ((_, result),) = run_searches(scorer, [("key", PROMPT, search)], max_in_flight=1)
    return true_ranking(problem, scorer, numbers, search_settings.objective), result, scorer


@pytest.mark.parametrize("objective", ["sum", "mean"])
@many_examples
@given(problem=problems, width=st.integers(1, 6))
def test_certified_names_are_the_best_of_all(problem: Problem, width: int, objective: Objective) -> None:
    unlimited = SearchSettings(
        objective=objective, ranking="objective", num_to_certify=5, width=width, max_rollouts=10_000
    )
    truth, result, _ = solve(problem, unlimited)
    expected = truth[:5]
    assert result.num_certified == len(expected)
    assert [name.name_index for name in result.names] == [index for _, index in expected]
    assert [name.score for name in result.names] == pytest.approx([score for score, _ in expected])


@pytest.mark.parametrize("objective", ["sum", "mean"])
@many_examples
@given(
    problem=problems,
    budget=st.integers(1, 12),
    num_tokens=st.none() | st.integers(1, 20),
    num_to_certify=st.integers(1, 5),
    newest_first=st.booleans(),
)
def test_a_budget_never_makes_a_false_claim(
    problem: Problem, budget: int, num_tokens: int | None, num_to_certify: int, newest_first: bool, objective: Objective
) -> None:
    """Checked after every answer, in whatever order the answers come, and so is the bound that proves it."""
    limited = SearchSettings(
        objective=objective,
        ranking="objective",
        num_candidates=60,
        num_to_certify=num_to_certify,
        width=3,
        max_rollouts=budget,
        max_tokens=num_tokens,
    )
    trie, numbers = PrefixTrie.from_sequences(problem.names)
    scorer = problem.scorer(trie)
    truth = true_ranking(problem, scorer, numbers, objective)
    total = math.fsum(math.exp(scorer.name_log_prob(name)) for name in problem.names)
    search = NameSearch(trie, TERMINATOR, limited)
    requests = search.next_requests()
    while requests:
        request = requests.pop(-1 if newest_first else 0)
        search.observe(request, scorer.rollout(request))
        result = search.result()
        assert 1 <= result.num_rollouts <= budget
        proved = result.names[: result.num_certified]
        assert [name.name_index for name in proved] == [index for _, index in truth[: len(proved)]]
        assert all(name.score >= result.highest_bound for name in proved)
        found = {name.name_index for name in result.names}
        assert all(score <= result.highest_bound + 1e-9 for score, number in truth if number not in found)
        assert_mass_is_accounted_for(result, total)
        if search.is_done:
            break
        requests += search.next_requests()
    assert search.is_done


@many_examples
@given(
    problem=problems,
    width=st.integers(1, 6),
    num_children=st.integers(1, VOCABULARY),
    num_to_certify=st.integers(1, 5),
    newest_first=st.booleans(),
)
def test_ranked_by_the_mean_come_the_names_that_any_proof_meets(
    problem: Problem, width: int, num_children: int, num_to_certify: int, newest_first: bool
) -> None:
    by_mean = SearchSettings(
        ranking="mean", num_candidates=100, num_to_certify=num_to_certify, width=width, max_rollouts=10_000
    )
    trie, _ = PrefixTrie.from_sequences(problem.names)
    scorer = replace(problem, num_children=num_children).scorer(trie)
    search = NameSearch(trie, TERMINATOR, by_mean)
    requests: list[RolloutRequest] = []
    while not search.is_done:
        requests += search.next_requests()
        request = requests.pop(-1 if newest_first else 0)
        search.observe(request, scorer.rollout(request))
    result = search.result()

    score_of = {name: scorer.name_log_prob(name) for name in problem.names}
    best = max(score_of, key=lambda name: score_of[name])
    needed = {best}
    for prefix in {name[:length] for name in score_of for length in range(1, len(name) + 1)}:
        if scorer.log_prob(prefix) > score_of[best]:
            rollout = scorer.rollout(RolloutRequest(prefix))
            needed.add((*prefix, *(tokens[0] for tokens in rollout.tokens[:-1])))
    by_score = sorted(score_of, key=lambda name: -score_of[name])
    expected = sorted(needed, key=lambda name: -score_of[name] / (len(name) + 1))
    expected += [name for name in by_score if name not in needed]
    certified = [tuple(trie.name_tokens(name.name_index)) for name in result.names[: result.num_certified]]
    assert certified == expected[: len(certified)]
    assert len(certified) >= min(num_to_certify, len(expected))


@many_examples
@given(problem=problems)
def test_one_rollout_of_greedy_decoding_comes_first(problem: Problem) -> None:
    _, result, scorer = solve(problem, SearchSettings(max_rollouts=1))
    greedy = scorer.rollout(RolloutRequest(()))
    node = scorer.trie.walk([step[0] for step in greedy.tokens[:-1]])
    assert scorer.trie.name_index(node) in {name.name_index for name in result.names}


def test_the_token_budget_ends_a_search_after_the_rollout_that_spends_it() -> None:
    sequences = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    trie, _ = PrefixTrie.from_sequences(sequences)
    scorer = RandomScorer(trie, seed=0, temperature=5.0, num_children=3)
    limited = SearchSettings(max_rollouts=1000, max_tokens=10, width=1)
    ((_, result),) = run_searches(scorer, [("key", PROMPT, NameSearch(trie, TERMINATOR, limited))], 1)
    # A first rollout is of three tokens and the terminator, the others of what is left of that.
    assert result.num_certified == 0
    assert 3 <= result.num_rollouts <= 10


def test_speculation_grows_with_the_search() -> None:
    """No more rollouts are in flight than were answered before, and never more than `width`."""
    sequences = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    trie, _ = PrefixTrie.from_sequences(sequences)
    scorer = RandomScorer(trie, seed=0, temperature=5.0, num_children=3)
    search = NameSearch(trie, TERMINATOR, SearchSettings(width=4))
    waves = []
    while not search.is_done and (requests := search.next_requests()):
        waves.append(len(requests))
        for request in requests:
            search.observe(request, scorer.rollout(request))
    assert waves[:5] == [1, 1, 2, 4, 4]
    assert max(waves) == 4


def test_many_searches_share_an_engine() -> None:
    sequences = [[a, b] for a in range(5) for b in range(5)]
    trie, _ = PrefixTrie.from_sequences(sequences)
    few, numbers = PrefixTrie.from_sequences(sequences[:3])
    scorer = RandomScorer(trie, 1, 1.0, 3)
    search_settings = SearchSettings(num_to_certify=3, num_candidates=25, max_rollouts=1000)
    mentions = [
        (
            position,
            PROMPT,
            NameSearch(few, TERMINATOR, search_settings, are_candidates=True)
            if position % 2
            else NameSearch(trie, TERMINATOR, search_settings),
        )
        for position in range(20)
    ]
    results = dict(run_searches(scorer, mentions, max_in_flight=7))
    assert sorted(results) == list(range(20))
    best_of_all = max(sequences, key=lambda s: scorer.name_log_prob(tuple(s)))
    best_of_few = max(range(3), key=lambda i: scorer.name_log_prob(tuple(sequences[i])))
    assert {results[i].names[0].name_index for i in range(0, 20, 2)} == {trie.name_index(trie.walk(best_of_all))}
    assert {results[i].names[0].name_index for i in range(1, 20, 2)} == {int(numbers[best_of_few])}
    assert all(results[i].unexplored_mass == 0 for i in range(1, 20, 2))


def test_a_call_after_an_interrupted_one_takes_no_answer_of_that() -> None:
    trie, _ = PrefixTrie.from_sequences([[a, b] for a in range(5) for b in range(5)])
    few, _ = PrefixTrie.from_sequences([[4, 4], [3, 3], [2, 2]])
    scorer = RandomScorer(trie, 1, 1.0, 3)

    def search(names: PrefixTrie) -> NameSearch:
        return NameSearch(names, TERMINATOR, SearchSettings(), are_candidates=names is few)

    ((_, expected),) = run_searches(scorer, [("key", PROMPT, search(trie))], max_in_flight=1)
    interrupted = run_searches(scorer, [(n, PROMPT, search(few)) for n in range(3)], max_in_flight=3)
    next(interrupted)
    del interrupted
    assert scorer.queue
    ((_, result),) = run_searches(scorer, [("key", PROMPT, search(trie))], max_in_flight=1)
    assert result == expected


def test_log_probs_that_are_not_numbers() -> None:
    class BrokenScorer(RandomScorer):
        def log_probs(self, path: tuple[int, ...]) -> np.ndarray:
            return np.full(VOCABULARY, np.nan)

    scorer = BrokenScorer(PrefixTrie.from_sequences([[0], [1]])[0], 1, 1.0, 3)
    search = NameSearch(scorer.trie, TERMINATOR, SearchSettings())
    with pytest.raises(GemelError, match="not numbers: use dtype bfloat16 or float32"):
        list(run_searches(scorer, [("key", PROMPT, search)], max_in_flight=1))


def test_probability_mass_is_complete_when_everything_is_explored() -> None:
    problem = Problem([(a,) for a in range(TERMINATOR)], seed=3, temperature=1.0, num_children=2)
    truth, result, _ = solve(problem, SearchSettings(num_to_certify=7, num_candidates=7, max_rollouts=1000))
    assert result.unexplored_mass == 0
    assert math.exp(result.log_explored_mass) == pytest.approx(math.fsum(math.exp(score) for score, _ in truth))


def as_stored(result: SearchResult) -> SearchResult:
    """What is left of a result in a row of the output: the names listed, and that those proved lie above all others."""
    return replace(result, highest_bound=result.names[result.num_certified - 1].score)


@pytest.mark.parametrize("objective", ["sum", "mean"])
@many_examples
@given(
    problem=problems,
    share_added=st.floats(0, 1),
    num_retired=st.integers(0, 20),
    num_to_certify=st.integers(1, 3),
    budget=st.sampled_from([2, 5, 10_000]),
)
def test_searching_added_names_alone_gives_the_best_of_all(
    problem: Problem,
    share_added: float,
    num_retired: int,
    num_to_certify: int,
    budget: int,
    objective: Objective,
) -> None:
    """The names before are those without the added ones; then some that the first search did not list go."""
    assume(len(problem.names) > 1)
    num_added = 1 + round(share_added * (len(problem.names) - 2))
    before, added = problem.names[num_added:], problem.names[:num_added]
    num_to_certify = min(num_to_certify, len(before))
    every_name = SearchSettings(
        objective=objective,
        ranking="objective",
        num_to_certify=num_to_certify,
        num_candidates=60,
        max_rollouts=10_000,
    )
    old_trie, _ = PrefixTrie.from_sequences(before)
    scorer = problem.scorer(old_trie)
    ((_, first),) = run_searches(scorer, [(0, PROMPT, NameSearch(old_trie, TERMINATOR, every_name))], 1)
    assert first.num_certified >= num_to_certify
    listed = {tuple(old_trie.name_tokens(name.name_index)) for name in first.names}
    retired = [name for name in before if name not in listed][:num_retired]
    names = [name for name in problem.names if name not in retired]

    trie, _ = PrefixTrie.from_sequences(names)
    stored = numbered_in(trie, as_stored(first), old_trie)
    added_trie, _ = PrefixTrie.from_sequences(added)
    limited = replace(every_name, max_rollouts=budget)
    rivals = [name.score for name in stored.names]
    search = NameSearch(added_trie, TERMINATOR, limited, rivals, are_candidates=True)
    ((_, second),) = run_searches(scorer, [(0, PROMPT, search)], 1)
    merged = merge_results(stored, numbered_in(trie, second, added_trie), num_candidates=60)

    def score(name: tuple[int, ...]) -> float:
        log_prob = scorer.name_log_prob(name)
        return log_prob if objective == "sum" else log_prob / (len(name) + 1)

    truth = [trie.name_index(trie.walk(name)) for name in sorted(names, key=score, reverse=True)]
    assert [name.name_index for name in merged.names[: merged.num_certified]] == truth[: merged.num_certified]
    if budget == 10_000:
        assert merged.num_certified >= num_to_certify
    assert merged.num_rollouts == first.num_rollouts + second.num_rollouts
    found = {tuple(trie.name_tokens(name.name_index)) for name in merged.names}
    unfinished = [name for name in names if name not in found]
    assert math.fsum(math.exp(scorer.name_log_prob(name)) for name in unfinished) <= merged.unexplored_mass + 1e-9


def test_a_search_with_better_rivals_ends_after_one_rollout_or_before() -> None:
    sequences = [[a, b, c] for a in range(6) for b in range(6) for c in range(6)]
    trie, _ = PrefixTrie.from_sequences(sequences)
    scorer = RandomScorer(trie, seed=0, temperature=5.0, num_children=3)
    search = NameSearch(trie, TERMINATOR, SearchSettings(), rivals=[-0.01])
    ((_, result),) = run_searches(scorer, [("key", PROMPT, search)], 1)
    assert result.num_rollouts == 1
    assert result.highest_bound < -0.01
    assert NameSearch(trie, TERMINATOR, SearchSettings(), rivals=[0.0]).is_done
    assert not NameSearch(trie, TERMINATOR, SearchSettings(num_to_certify=2), rivals=[0.0]).is_done

"""The masses of open items, by hand: how much probability the names have that no rollout has finished."""

from __future__ import annotations

import math

import pytest

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout
from gemel_engine.decoding.frontier import Frontier, NameSet
from gemel_engine.knowledge_base.trie import PrefixTrie

pytestmark = pytest.mark.unit
END = 7
BONUS = 30.0


def names(*sequences: tuple[int, ...], bonus: float = 0.0) -> NameSet:
    trie, _ = PrefixTrie.from_sequences(sequences)
    return NameSet(trie, lambda log_prob, depth, node, excluded: log_prob + bonus)


def rollout(*steps: dict[int, float]) -> Rollout:
    """A rollout of these probabilities by token, the token taken first."""
    return Rollout([[*step] for step in steps], [[math.log(share) for share in step.values()] for step in steps])


def test_the_mass_left_is_that_of_the_tokens_not_taken_and_not_reported() -> None:
    frontier = Frontier(names((0,), (1,), (1, 2), (3,), (4,)), END, SearchSettings())
    (root,) = frontier.next_requests(-math.inf)
    assert frontier.mass == 1
    frontier.observe(root, rollout({0: 0.5, 1: 0.3}, {END: 0.8}))
    assert frontier.mass == pytest.approx(0.3 + 0.2, abs=1e-4), "two names are not reported: what is left of 1"
    (one,) = frontier.next_requests(math.log(0.25))
    frontier.observe(one, rollout({2: 0.6, END: 0.4}, {END: 0.5}))
    assert frontier.mass == pytest.approx(0.2, abs=1e-4), "both names of the item are finished"
    (rest,) = frontier.next_requests(math.log(0.1))
    assert rest.path == ()
    assert rest.excluded == {0, 1}
    frontier.observe(rest, rollout({3: 0.05, 4: 0.01}, {END: 1.0}))
    assert frontier.mass == pytest.approx(0.01, abs=1e-4)


def test_names_not_reported_have_no_more_mass_than_the_least_reported() -> None:
    frontier = Frontier(names((0,), (1,), (2,), (3,)), END, SearchSettings())
    (root,) = frontier.next_requests(-math.inf)
    frontier.observe(root, rollout({0: 0.5, 1: 0.02}, {END: 0.8}))
    assert frontier.mass == pytest.approx(0.02 + 2 * 0.02)


def test_names_of_the_pool_are_taken_from_the_mass_once() -> None:
    """All names stay behind, and of their mass what a rollout restricted to the pool has finished is known."""
    pool = names((0,), (0, 1), (2,), bonus=BONUS)
    frontier = Frontier(names((0,), (0, 1), (2,), (3,)), END, SearchSettings(), pool)
    (first,) = frontier.next_requests(1.0)
    assert first.candidates is pool.trie
    assert frontier.mass == 1
    finished = frontier.observe(first, rollout({0: 0.5, 2: 0.4}, {1: 0.6, END: 0.3}, {END: 0.9}))
    masses = {name.path: math.exp(name.log_prob) for name in finished}
    assert masses == pytest.approx({(0,): 0.5 * 0.3, (0, 1): 0.5 * 0.6 * 0.9})
    assert frontier.mass == pytest.approx(1 - 0.15 - 0.27)
    (second,) = frontier.next_requests(1.0)
    assert (second.path, second.candidates) == ((2,), pool.trie)
    frontier.observe(second, rollout({END: 0.25}))
    assert frontier.mass == pytest.approx(1 - 0.15 - 0.27 - 0.1)

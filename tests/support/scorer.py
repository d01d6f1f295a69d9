"""An engine whose language model is a table of random numbers, and random tries for it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Self

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gemel_engine.decoding.engines.base import CacheStatistics, Rollout, RolloutRequest, allowed_next_tokens
from gemel_engine.decoding.entity_search import EntitySearchResult
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.decoding.search import SearchResult
from gemel_engine.knowledge_base.trie import PrefixTrie

VOCABULARY = 8
TERMINATOR = 7
PROMPT = Prompt((), ())
# So many find each of the seeded faults of the bounds and of their masses that were tried; a hundred miss some.
many_examples = settings(max_examples=max(500, settings().max_examples))


def assert_mass_is_accounted_for(result: SearchResult | EntitySearchResult, total: float) -> None:
    """Check that the mass of all names lies between what was explored and that with what may be left."""
    explored = math.exp(result.log_explored_mass)
    assert explored - 1e-9 <= total <= explored + result.unexplored_mass + 1e-9


class RandomScorer:
    """A table of random next-token distributions, as sharp or flat as `temperature` says; an engine of width one."""

    def __init__(self, trie: PrefixTrie, seed: int, temperature: float, num_children: int) -> None:
        self.trie = trie
        self.temperature = temperature
        self.num_children = num_children
        self.queue: deque[tuple[str, RolloutRequest]] = deque()
        self.cache_statistics = CacheStatistics()
        self._random = np.random.default_rng(seed)
        self._table = np.empty((0, VOCABULARY))  # of the paths asked for so far, and of some to come
        self._rows: dict[tuple[int, ...], int] = {}  # of the table, by path
        self._totals: dict[tuple[int, ...], float] = {(): 0.0}  # log-probs by path

    def log_probs(self, path: tuple[int, ...]) -> NDArray[np.float64]:
        row = self._rows.setdefault(path, len(self._rows))
        if row == len(self._table):
            logits = self._random.normal(size=(128, VOCABULARY)) / self.temperature
            log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            self._table = np.concatenate([self._table, log_probs])
        found: NDArray[np.float64] = self._table[row]
        return found

    def log_prob(self, path: tuple[int, ...]) -> float:
        if path not in self._totals:
            *before, token = path
            self._totals[path] = self.log_prob(tuple(before)) + float(self.log_probs(tuple(before))[token])
        return self._totals[path]

    def name_log_prob(self, tokens: tuple[int, ...]) -> float:
        return self.log_prob((*tokens, TERMINATOR))

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest) -> None:
        self.queue.append((request_id, request))

    def step(self) -> list[tuple[str, Rollout]]:
        request_id, request = self.queue.popleft()
        return [(request_id, self.rollout(request))]

    def rollout(self, request: RolloutRequest) -> Rollout:
        trie, path, excluded = request.candidates or self.trie, request.path, request.excluded
        rollout = Rollout([], [])
        while True:
            allowed = allowed_next_tokens(trie, trie.walk(path), TERMINATOR, excluded)
            log_probs = self.log_probs(path)[allowed]
            best = np.argsort(-log_probs)[: self.num_children]
            rollout.tokens.append(allowed[best].tolist())
            rollout.log_probs.append(log_probs[best].tolist())
            if allowed[best[0]] == TERMINATOR:
                return rollout
            path, excluded = (*path, int(allowed[best[0]])), frozenset()


def random_names(rng: np.random.Generator, num_names: int) -> list[tuple[int, ...]]:
    """At most so many names, all different, of one to five tokens from small and large alphabets."""
    drawn = [rng.integers(0, rng.integers(2, TERMINATOR + 1), rng.integers(1, 6)).tolist() for _ in range(num_names)]
    return list(dict.fromkeys(map(tuple, drawn)))


@dataclass(frozen=True)
class Problem:
    """Names, and what the scorer of them is made of."""

    names: list[tuple[int, ...]]
    seed: int
    temperature: float
    num_children: int

    @classmethod
    def random(cls, seed: int, num_names: int, temperature: float, num_children: int) -> Self:
        return cls(random_names(np.random.default_rng(seed), num_names), seed, temperature, num_children)

    def scorer(self, trie: PrefixTrie) -> RandomScorer:
        return RandomScorer(trie, self.seed, self.temperature, self.num_children)


# Of few numbers, from which names are made: drawing the names one by one takes longer than the search.
problems = st.builds(
    Problem.random,
    seed=st.integers(0, 2**32 - 1),
    num_names=st.integers(1, 60),
    temperature=st.sampled_from([0.2, 0.5, 1.0, 3.0]),
    num_children=st.integers(1, VOCABULARY),
)

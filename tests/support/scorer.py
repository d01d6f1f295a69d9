"""An engine whose language model is a table of random numbers, and random tries for it."""

from __future__ import annotations

import math
from collections import deque
from random import Random

import numpy as np
from hypothesis import strategies as st

from gemel_engine.decoding.engines.base import CacheStatistics, Rollout, RolloutRequest, allowed_next_tokens
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.knowledge_base.trie import PrefixTrie

VOCABULARY = 8
TERMINATOR = 7
PROMPT = Prompt((), ())


class RandomScorer:
    """A table of random next-token distributions, as sharp or flat as `temperature` says; an engine of width one."""

    def __init__(self, trie: PrefixTrie, seed: int, temperature: float, num_children: int) -> None:
        self.trie = trie
        self.seed = seed
        self.temperature = temperature
        self.num_children = num_children
        self.queue: deque[tuple[str, RolloutRequest]] = deque()
        self.cache_statistics = CacheStatistics()
        self._log_probs: dict[tuple[int, ...], np.ndarray] = {}  # by path

    def log_probs(self, path: tuple[int, ...]) -> np.ndarray:
        if path not in self._log_probs:
            rng = Random(f"{self.seed} {path}")
            logits = np.array([rng.gauss() for _ in range(VOCABULARY)]) / self.temperature
            self._log_probs[path] = logits - np.logaddexp.reduce(logits)
        return self._log_probs[path]

    def log_prob(self, path: tuple[int, ...]) -> float:
        return math.fsum(self.log_probs(path[:depth])[token] for depth, token in enumerate(path))

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


names = st.lists(st.integers(0, TERMINATOR - 1), min_size=1, max_size=5).map(tuple)
problems = st.fixed_dictionaries(
    {
        "names": st.lists(names, min_size=1, max_size=60, unique=True),
        "seed": st.integers(0, 2**32 - 1),
        "temperature": st.sampled_from([0.2, 0.5, 1.0, 3.0]),
        "num_children": st.integers(1, VOCABULARY),
    }
)

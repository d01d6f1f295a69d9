"""What the search asks of a language model: rollouts under a prefix trie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemel_engine.decoding.prompt import Prompt
from gemel_engine.knowledge_base.trie import PrefixTrie


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Decode greedily from the trie node at `path`; the first step may not take a token of `excluded`."""

    path: tuple[int, ...]
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Rollout:
    """What greedy decoding saw, step by step; the last token chosen is the terminator.

    Attributes:
        tokens: For each step, the K best allowed tokens (all, where fewer are allowed), the best first. The best is
            the one taken.
        log_probs: Their log-probabilities under the full softmax, in nats, in the same layout.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]


@dataclass(slots=True)
class CacheStatistics:
    """Number of prompt tokens sent to an engine, and of those that its prefix cache contained."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class RolloutEngine(Protocol):
    """A language model that answers rollouts, many at a time.

    Attributes:
        cache_statistics: Counts since the engine was started; zeros if it does not count.
    """

    cache_statistics: CacheStatistics

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest, candidates: PrefixTrie | None) -> None:
        """Queue a rollout under the engine's trie, or under `candidates` where that is given."""

    def step(self) -> list[tuple[str, Rollout]]:
        """Advance all queued rollouts; returns the finished ones with their request ids. Blocks for one step."""


def allowed_next_tokens(trie: PrefixTrie, node: int, terminator: int, excluded: frozenset[int]) -> np.ndarray:
    """Tokens that may follow a trie node: its children and, where a name ends, the terminator; (N,) int64."""
    tokens = np.asarray(trie.children(node)[0], dtype=np.int64)
    if trie.is_terminal(node):
        tokens = np.append(tokens, terminator)
    if excluded:
        tokens = tokens[~np.isin(tokens, list(excluded))]
    return tokens

"""Rollouts under a prefix trie, which the search requests, and the interface of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gemel_engine.decoding.prompt import Prompt
from gemel_engine.knowledge_base.trie import PrefixTrie


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """Greedy decoding from a node of a prefix trie.

    Attributes:
        path: Tokens from the root to the node.
        excluded: Tokens that may not be taken first.
        candidates: Trie of the allowed names; None: the engine's.
    """

    path: tuple[int, ...]
    excluded: frozenset[int] = frozenset()
    candidates: PrefixTrie | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """Result of greedy decoding, step by step; the last token taken is the terminator.

    Attributes:
        tokens: The K best allowed tokens of each step (all, if fewer are allowed), best first. The
            first one is the token taken.
        log_probs: Log-probs of these tokens under the full softmax, in nats, in the same layout.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]


@dataclass(slots=True)
class CacheStatistics:
    """Number of prompt tokens sent to an engine, and number of them found in its prefix cache."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class RolloutEngine(Protocol):
    """A language model that answers rollouts, many at a time.

    Attributes:
        cache_statistics: Counts since the engine was started; zeros if it does not count.
    """

    cache_statistics: CacheStatistics

    def submit(self, request_id: str, prompt: Prompt, request: RolloutRequest) -> None:
        """Queue a rollout."""

    def step(self) -> list[tuple[str, Rollout]]:
        """Run one step, blocking; returns the finished rollouts with their request ids."""


def allowed_next_tokens(trie: PrefixTrie, node: int, terminator: int, excluded: frozenset[int]) -> np.ndarray:
    """Return the tokens (N,) int64 that may follow a trie node, without those in `excluded`.

    They are the node's children and, where a name ends, the terminator.
    """
    tokens = np.asarray(trie.children(node)[0], dtype=np.int64)
    if trie.is_terminal(node):
        tokens = np.append(tokens, terminator)
    if excluded:
        tokens = tokens[~np.isin(tokens, list(excluded))]
    return tokens

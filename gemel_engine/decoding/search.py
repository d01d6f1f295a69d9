"""Exact best-first search for the entity name that a language model finds most probable.

Log-probs are never positive, so the score of a node bounds the score of every name below it. Once
no open item's bound exceeds the score of the best finished name, that name is the argmax over *all*
allowed names: it is certified. Any proof must follow each token off a rollout's path whose bound is
above that score, whatever the order and K. The names reached from these tokens are therefore a
property of the model and the trie, and `ranking` may choose among them.

    search = NameSearch(trie, terminator, settings)
    while not search.is_done:
        for request in search.next_requests():
            search.observe(request, ask_the_model(request))
    search.result()
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout, RolloutRequest
from gemel_engine.decoding.frontier import FinishedName, Frontier, NameSet, log_sum_exp
from gemel_engine.knowledge_base.trie import PrefixTrie


@dataclass(frozen=True, slots=True)
class FoundName:
    """A finished name: number in the trie, log-prob in nats (terminator included), objective."""

    name_index: int
    log_prob: float
    score: float


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Names in the order of the ranking, and what is proved about them.

    Attributes:
        names: The best names, at most `num_candidates`.
        num_certified: Number of leading names that are proved to be at their rank. Ranked by the
            objective, they are the best of all allowed names.
        log_explored_mass: Log of the total probability of all finished names.
        unexplored_mass: Upper bound of the total probability of all unfinished names, as far as two
            passes over the same prefix give the same probabilities.
        num_rollouts: Number of rollouts requested.
        highest_bound: Upper bound of the score of every unfinished name.
    """

    names: tuple[FoundName, ...]
    num_certified: int
    log_explored_mass: float
    unexplored_mass: float
    num_rollouts: int
    highest_bound: float


class NameSearch:
    """The search for one mention.

    Args:
        trie: Prefix trie of the allowed names, whose tokens don't include the terminator.
        terminator: Token that ends a name.
        settings: Limits of the search.
        rivals: Scores of names found elsewhere. The search ends as soon as no open item can contain
            one of the `num_to_certify` best names of both.
        are_candidates: Whether rollouts must be restricted to `trie`; false if it is the engine's.
    """

    def __init__(
        self,
        trie: PrefixTrie,
        terminator: int,
        settings: SearchSettings,
        rivals: Sequence[float] = (),
        *,
        are_candidates: bool = False,
    ) -> None:
        self._trie = trie
        self._settings = settings
        self._rivals = tuple(rivals)
        self._frontier = Frontier(NameSet(trie, self._bound), terminator, settings, are_candidates=are_candidates)
        self._found: list[FinishedName] = []  # in descending order of the score, ties by path

    def next_requests(self) -> list[RolloutRequest]:
        """Return the next requests: items that could change the certified names, best first."""
        return self._frontier.next_requests(self._score_to_beat)

    def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
        """Add the answer to a request: its finished names, and the open items off its path."""
        for finished in self._frontier.observe(request, rollout):
            insort(self._found, finished, key=lambda name: (-self._score(name), name.path))

    @property
    def is_done(self) -> bool:
        """Whether enough names are certified, nothing is left to explore or the budget is spent."""
        return self._frontier.is_done(self._score_to_beat)

    def result(self) -> SearchResult:
        """Return the best names so far, without rivals; at least one after the first `observe`."""
        found, num_certified = self._ranked()
        listed = found[: self._settings.num_candidates]
        return SearchResult(
            names=tuple(FoundName(name.name_index, name.log_prob, self._score(name)) for name in listed),
            num_certified=min(num_certified, self._settings.num_candidates),
            log_explored_mass=log_sum_exp([name.log_prob for name in self._found]),
            unexplored_mass=self._frontier.mass,
            num_rollouts=self._frontier.num_rollouts,
            highest_bound=self._frontier.highest_bound,
        )

    def _ranked(self) -> tuple[list[FinishedName], int]:
        """Return all finished names, best first, and how many leading ones are certified."""
        highest_bound = self._frontier.highest_bound
        num_certified = sum(self._score(name) >= highest_bound for name in self._found)
        if self._settings.ranking == "objective" or self._settings.objective == "mean" or not self._found:
            return self._found, num_certified
        best = self._found[0]
        needed = [best, *(name for name in self._found[1:] if name.start_log_prob > best.log_prob)]
        others = [name for name in self._found[1:] if name.start_log_prob <= best.log_prob]
        needed.sort(key=lambda name: (-name.mean, name.path))
        if num_certified:  # then `needed` is complete, and the others follow by their scores
            num_certified = len(needed) + sum(name.log_prob >= highest_bound for name in others)
        return [*needed, *others], num_certified

    @property
    def _score_to_beat(self) -> float:
        n = self._settings.num_to_certify
        best = sorted([*self._rivals, *map(self._score, self._found[:n])], reverse=True)
        return best[n - 1] if len(best) >= n else -math.inf

    def _score(self, name: FinishedName) -> float:
        return name.log_prob if self._settings.objective == "sum" else name.mean

    def _bound(self, log_prob: float, depth: int, node: int, _excluded: frozenset[int]) -> float:
        """Return an upper bound of the objective below `node`; the terminator counts as a token."""
        if self._settings.objective == "sum":
            return log_prob
        return log_prob / (depth + self._trie.longest(node) + 1)

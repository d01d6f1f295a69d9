"""Exact best-first search for the entity name that a language model finds most probable.

The search has a prefix trie and asks for *rollouts*. It does not depend on what answers them: a
language model, or a table of random numbers in a test. A rollout starts at a trie node, decodes
greedily under the trie to the end of a name, and reports at each step the log-probs of the K best
allowed tokens. Every token not taken becomes an open item with a known score; where a node allows
more than K tokens, the rest becomes one item bounded by the K-th.

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

import heapq
import itertools
import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout, RolloutRequest
from gemel_engine.knowledge_base.trie import PrefixTrie

_ROUNDING = 1e-5  # largest rounding error of a sum of probabilities in float32


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


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished name, and the `mean` of its log-probs in nats.

    For the name at the end of a rollout, `bound` is the bound of the first token that its rollout
    took. For a name found off the rollout's path it is the name's score.
    """

    name: FoundName
    path: tuple[int, ...]
    mean: float
    bound: float


@dataclass(order=True, slots=True)
class _OpenItem:
    """A set of unfinished names: all below `path`, except the subtrees of the `excluded` tokens.

    Items are ordered so that a heap returns the highest bound first, ties by path.
    """

    negative_bound: float
    path: tuple[int, ...]
    node: int = field(compare=False)
    log_prob: float = field(compare=False)
    mass: float = field(compare=False)
    excluded: frozenset[int] = field(compare=False, default=frozenset())
    excluded_mass: float = field(compare=False, default=0.0)

    @property
    def bound(self) -> float:
        """Upper bound of the score of every name in the item."""
        return -self.negative_bound


class NameSearch:
    """The search for one mention.

    Args:
        trie: Prefix trie of the allowed names, whose tokens don't include the terminator.
        terminator: Token that ends a name.
        settings: Limits of the search.
        rivals: Scores of names found elsewhere. The search ends as soon as no open item can contain
            one of the `num_to_certify` best names of both.
    """

    def __init__(
        self, trie: PrefixTrie, terminator: int, settings: SearchSettings, rivals: Sequence[float] = ()
    ) -> None:
        self._trie = trie
        self._terminator = terminator
        self._settings = settings
        self._rivals = tuple(rivals)
        self._frontier = [self._item((), 0, 0.0)]
        self._in_flight: dict[RolloutRequest, _OpenItem] = {}
        self._found: list[_Finished] = []  # in descending order of the score, ties by path
        self._num_rollouts = 0
        self._num_tokens = 0

    def next_requests(self) -> list[RolloutRequest]:
        """Return the next requests: items that could change the certified names, best first."""
        requests = []
        num_answered = self._num_rollouts - len(self._in_flight)
        while (
            self._frontier
            and len(self._in_flight) < min(self._settings.width, max(1, num_answered))
            and not self._is_spent
            and self._frontier[0].bound > self._score_to_beat
        ):
            item = heapq.heappop(self._frontier)
            request = RolloutRequest(item.path, item.excluded)
            self._in_flight[request] = item
            self._num_rollouts += 1
            requests.append(request)
        return requests

    def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
        """Add the answer to a request: its finished names, and the open items off its path."""
        item = self._in_flight.pop(request)
        bound = None if request.excluded else item.bound
        self._num_tokens += len(rollout.tokens)
        for tokens, log_probs in zip(rollout.tokens, rollout.log_probs, strict=True):
            self._open_remainder(item, tokens, log_probs)
            taken, *others = [self._child(item, *child) for child in zip(tokens, log_probs, strict=True)]
            for other in others:
                self._add(other)
            bound = taken.bound if bound is None else bound
            if isinstance(taken, _Finished):
                self._add(replace(taken, bound=bound))
                return
            item = taken
        raise AssertionError("a rollout ends with the terminator")

    @property
    def is_done(self) -> bool:
        """Whether enough names are certified, nothing is left to explore or the budget is spent."""
        if self._highest_bound <= self._score_to_beat:
            return True
        return not self._in_flight and self._is_spent

    def result(self) -> SearchResult:
        """Return the best names so far, without rivals; at least one after the first `observe`."""
        found, num_certified = self._ranked()
        open_items = itertools.chain(self._frontier, self._in_flight.values())
        return SearchResult(
            names=tuple(finished.name for finished in found[: self._settings.num_candidates]),
            num_certified=min(num_certified, self._settings.num_candidates),
            log_explored_mass=_log_sum_exp([finished.name.log_prob for finished in self._found]),
            unexplored_mass=min(1.0, sum(item.mass for item in open_items)),
            num_rollouts=self._num_rollouts,
            highest_bound=self._highest_bound,
        )

    def _ranked(self) -> tuple[list[_Finished], int]:
        """Return all finished names, best first, and how many leading ones are certified."""
        highest_bound = self._highest_bound
        num_certified = sum(finished.name.score >= highest_bound for finished in self._found)
        if self._settings.ranking == "objective" or self._settings.objective == "mean" or not self._found:
            return self._found, num_certified
        best = self._found[0]
        needed = [best, *(finished for finished in self._found[1:] if finished.bound > best.name.score)]
        others = [finished for finished in self._found[1:] if finished.bound <= best.name.score]
        needed.sort(key=lambda finished: (-finished.mean, finished.path))
        if num_certified:  # then `needed` is complete, and the others follow by their scores
            num_certified = len(needed) + sum(finished.name.score >= highest_bound for finished in others)
        return [*needed, *others], num_certified

    @property
    def _is_spent(self) -> bool:
        max_tokens = self._settings.max_tokens
        return self._num_rollouts >= self._settings.max_rollouts or (
            max_tokens is not None and self._num_tokens >= max_tokens
        )

    @property
    def _highest_bound(self) -> float:
        bounds = [item.bound for item in self._in_flight.values()]
        if self._frontier:
            bounds.append(self._frontier[0].bound)
        return max(bounds, default=-math.inf)

    @property
    def _score_to_beat(self) -> float:
        n = self._settings.num_to_certify
        best = sorted([*self._rivals, *(finished.name.score for finished in self._found[:n])], reverse=True)
        return best[n - 1] if len(best) >= n else -math.inf

    def _bound(self, log_prob: float, depth: int, node: int) -> float:
        """Return an upper bound of the objective below `node`; the terminator counts as a token."""
        if self._settings.objective == "sum":
            return log_prob
        return log_prob / (depth + self._trie.longest(node) + 1)

    def _item(self, path: tuple[int, ...], node: int, log_prob: float) -> _OpenItem:
        return _OpenItem(-self._bound(log_prob, len(path), node), path, node, log_prob, math.exp(log_prob))

    def _child(self, parent: _OpenItem, token: int, log_prob: float) -> _OpenItem | _Finished:
        """Return the child's open item, or the finished name if the token is the terminator."""
        total = parent.log_prob + log_prob
        if token == self._terminator and self._trie.is_terminal(parent.node):
            mean = total / (len(parent.path) + 1)
            score = total if self._settings.objective == "sum" else mean
            name = FoundName(self._trie.name_index(parent.node), total, score)
            return _Finished(name, parent.path, mean, bound=score)
        node = self._trie.child(parent.node, token)
        assert node is not None, f"token {token} is not allowed after {parent.path}"
        return self._item((*parent.path, token), node, total)

    def _add(self, item: _OpenItem | _Finished) -> None:
        if isinstance(item, _OpenItem):
            heapq.heappush(self._frontier, item)
        else:
            insort(self._found, item, key=lambda finished: (-finished.name.score, finished.path))

    def _open_remainder(self, item: _OpenItem, tokens: list[int], log_probs: list[float]) -> None:
        """Add the allowed children of `item` that a step did not report, if any, as one item."""
        excluded = item.excluded.union(tokens)
        num_left = self._trie.num_children(item.node) + self._trie.is_terminal(item.node) - len(excluded)
        if num_left == 0:
            return
        excluded_mass = item.excluded_mass + math.fsum(map(math.exp, log_probs))
        not_reported = max(0.0, 1.0 - excluded_mass) + _ROUNDING
        mass_left = min(num_left * math.exp(log_probs[-1]), not_reported)
        # A child's log-prob is at most the K-th, and at most the log of the mass left. The second
        # bound needs all log-probs to be from one step of the model: those of another step at the
        # same node may differ in the last bits, and the mass left may be as small as these.
        highest = log_probs[-1] if item.excluded else min(log_probs[-1], math.log(not_reported))
        bound = self._bound(item.log_prob + highest, len(item.path), item.node)
        remainder = _OpenItem(
            -bound, item.path, item.node, item.log_prob, math.exp(item.log_prob) * mass_left, excluded, excluded_mass
        )
        self._add(remainder)


def _log_sum_exp(values: list[float]) -> float:
    if not values:
        return -math.inf
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))

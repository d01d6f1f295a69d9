"""The open items of a best-first search: names that no rollout has finished yet, with bounds.

A frontier has a prefix trie and asks for *rollouts*. It does not depend on what answers them: a
language model, or a table of random numbers in a test. A rollout starts at a trie node, decodes
greedily under the trie to the end of a name, and reports at each step the log-probs of the K best
allowed tokens. Every token not taken becomes an open item with a known log-prob; where a node
allows more than K tokens, the rest becomes one item bounded by the K-th.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout, RolloutRequest
from gemel_engine.knowledge_base.trie import PrefixTrie

_ROUNDING = 1e-5  # largest rounding error of a sum of probabilities in float32


@dataclass(frozen=True, slots=True, eq=False)
class NameSet:
    """Names to search, and how their scores are bounded.

    Attributes:
        trie: Prefix trie of the names, whose tokens don't include the terminator.
        bound: Function that returns an upper bound of the scores of the names below a node, from an
            upper bound of their log-probs, the node's depth, the node, and those of its tokens whose
            names don't count; -inf if no name is left.
    """

    trie: PrefixTrie
    bound: Callable[[float, int, int, frozenset[int]], float]


@dataclass(frozen=True, slots=True)
class FinishedName:
    """A name whose log-prob is known.

    Attributes:
        name_index: Number of the name in the trie of all names.
        path: Tokens of the name, without the terminator.
        log_prob: Log-prob in nats, terminator included.
        start_log_prob: Log-prob of the first token that the rollout to this name took, with its
            path. For a name found off the rollout's path it is the name's log-prob.
    """

    name_index: int
    path: tuple[int, ...]
    log_prob: float
    start_log_prob: float

    @property
    def mean(self) -> float:
        """Mean of the log-probs of the tokens, terminator included."""
        return self.log_prob / (len(self.path) + 1)


@dataclass(order=True, slots=True)
class _OpenItem:
    """A set of unfinished names: all below `path`, except the subtrees of the `excluded` tokens.

    Items are ordered so that a heap returns the highest bound first, ties by path.

    Attributes:
        bound_in_all: Upper bound of the scores of the item's names; -inf if it contains names of
            the pool alone.
        bound_in_pool: Upper bound of the scores of its names of the pool; -inf if there are none.
        pool_node: Node of the pool's trie at `path`; None if no name of the pool continues it.
    """

    negative_bound: float = field(init=False)
    path: tuple[int, ...]
    node: int = field(compare=False)
    pool_node: int | None = field(compare=False)
    log_prob: float = field(compare=False)
    bound_in_all: float = field(compare=False)
    bound_in_pool: float = field(compare=False)
    mass: float = field(compare=False)
    excluded: frozenset[int] = field(compare=False)
    excluded_mass: float = field(compare=False)

    def __post_init__(self) -> None:
        self.negative_bound = -max(self.bound_in_all, self.bound_in_pool)

    @property
    def bound(self) -> float:
        """Upper bound of the score of every name in the item."""
        return -self.negative_bound


class Frontier:
    """The open items of one mention, waiting or with a rollout in flight.

    A frontier may have a *pool*: names that have a further score, with bounds of its own. Where only
    this score can matter, a rollout is restricted to the pool. All names below its start then stay
    behind in an item that counts without the pool.

    Args:
        names: All names.
        terminator: Token that ends a name.
        limits: Limits of the search.
        pool: Names that have a further score, all of them in `names`; None: there are none.
        are_candidates: Whether rollouts must be restricted to `names`; false if the engine's trie
            is the same.

    Attributes:
        num_rollouts: Number of rollouts requested.
    """

    def __init__(
        self,
        names: NameSet,
        terminator: int,
        limits: SearchSettings,
        pool: NameSet | None = None,
        *,
        are_candidates: bool = False,
    ) -> None:
        self._names = names
        self._trie = names.trie
        self._terminator = terminator
        self._limits = limits
        self._pool = pool
        self._candidates = names.trie if are_candidates else None
        self._waiting = [self._item((), 0, None if pool is None else 0, 0.0, in_all=True)]
        self._in_flight: dict[RolloutRequest, _OpenItem] = {}
        self._mass_of_pool = 0.0  # of names that rollouts restricted to the pool have finished
        self.num_rollouts = 0
        self._num_tokens = 0

    @property
    def highest_bound(self) -> float:
        """Upper bound of the score of every unfinished name; -inf if there is none."""
        return max([self._next_bound, *(item.bound for item in self._in_flight.values())])

    @property
    def mass(self) -> float:
        """Upper bound of the total probability of all unfinished names, at most 1."""
        items = itertools.chain(self._waiting, self._in_flight.values())
        return min(1.0, max(0.0, sum(item.mass for item in items) - self._mass_of_pool))

    def is_done(self, score_to_beat: float) -> bool:
        """Return whether no unfinished name can score higher, or the budget is spent."""
        return self.highest_bound <= score_to_beat or (self._is_spent and not self._in_flight)

    def next_requests(self, score_to_beat: float) -> list[RolloutRequest]:
        """Return the next requests: items with a bound above `score_to_beat`, the highest first."""
        requests = []
        num_answered = self.num_rollouts - len(self._in_flight)
        while (
            len(self._in_flight) < min(self._limits.width, max(1, num_answered))
            and not self._is_spent
            and self._next_bound > score_to_beat
        ):
            item, candidates = heapq.heappop(self._waiting), self._candidates
            if self._pool is not None and item.bound_in_all <= score_to_beat:
                candidates = self._pool.trie
                heapq.heappush(self._waiting, replace(item, pool_node=None, bound_in_pool=-math.inf))
                item = replace(item, bound_in_all=-math.inf, mass=0.0)
            request = RolloutRequest(item.path, item.excluded, candidates)
            self._in_flight[request] = item
            self.num_rollouts += 1
            requests.append(request)
        return requests

    def observe(self, request: RolloutRequest, rollout: Rollout) -> list[FinishedName]:
        """Replace a request's item by its finished names and the open items off its path.

        Returns:
            The finished names, the one at the end of the rollout last.
        """
        item = self._in_flight.pop(request)
        start_log_prob = None if request.excluded else item.log_prob
        finished = []
        self._num_tokens += len(rollout.tokens)
        for tokens, log_probs in zip(rollout.tokens, rollout.log_probs, strict=True):
            self._open_remainder(item, tokens, log_probs)
            taken, *others = [self._child(item, *child) for child in zip(tokens, log_probs, strict=True)]
            for other in others:
                if isinstance(other, FinishedName):
                    finished.append(other)
                else:
                    heapq.heappush(self._waiting, other)
            start_log_prob = taken.log_prob if start_log_prob is None else start_log_prob
            if isinstance(taken, FinishedName):
                finished.append(replace(taken, start_log_prob=start_log_prob))
                if self._pool is not None and request.candidates is self._pool.trie:
                    self._mass_of_pool += math.fsum(math.exp(name.log_prob) for name in finished)
                return finished
            item = taken
        raise AssertionError("a rollout ends with the terminator")

    @property
    def _next_bound(self) -> float:
        return self._waiting[0].bound if self._waiting else -math.inf

    @property
    def _is_spent(self) -> bool:
        max_tokens = self._limits.max_tokens
        return self.num_rollouts >= self._limits.max_rollouts or (
            max_tokens is not None and self._num_tokens >= max_tokens
        )

    def _item(
        self,
        path: tuple[int, ...],
        node: int,
        pool_node: int | None,
        log_prob: float,
        *,
        in_all: bool,
        next_log_prob: float = 0.0,
        next_mass: float = 1.0,
        excluded: frozenset[int] = frozenset(),
        excluded_mass: float = 0.0,
    ) -> _OpenItem:
        """Return an item, given upper bounds of each next token's log-prob and of their total mass."""
        of_names = (log_prob + next_log_prob, len(path))
        return _OpenItem(
            path,
            node,
            pool_node,
            log_prob,
            bound_in_all=self._names.bound(*of_names, node, excluded) if in_all else -math.inf,
            bound_in_pool=-math.inf
            if self._pool is None or pool_node is None
            else self._pool.bound(*of_names, pool_node, excluded),
            mass=math.exp(log_prob) * next_mass if in_all else 0.0,
            excluded=excluded,
            excluded_mass=excluded_mass,
        )

    def _child(self, parent: _OpenItem, token: int, log_prob: float) -> _OpenItem | FinishedName:
        """Return the child's open item, or the finished name if the token is the terminator."""
        total = parent.log_prob + log_prob
        if token == self._terminator and self._trie.is_terminal(parent.node):
            return FinishedName(self._trie.name_index(parent.node), parent.path, total, start_log_prob=total)
        node, pool_node = self._trie.child(parent.node, token), parent.pool_node
        assert node is not None, f"token {token} is not allowed after {parent.path}"
        if self._pool is not None and pool_node is not None:
            pool_node = self._pool.trie.child(pool_node, token)
        return self._item((*parent.path, token), node, pool_node, total, in_all=parent.bound_in_all > -math.inf)

    def _open_remainder(self, item: _OpenItem, tokens: list[int], log_probs: list[float]) -> None:
        """Add the allowed children of `item` that a step did not report, if any, as one item."""
        excluded = item.excluded.union(tokens)
        num_left = self._trie.num_children(item.node) + self._trie.is_terminal(item.node) - len(excluded)
        if num_left == 0:
            return
        excluded_mass = item.excluded_mass + math.fsum(map(math.exp, log_probs))
        not_reported = max(0.0, 1.0 - excluded_mass) + _ROUNDING
        # A child's log-prob is at most the K-th, and at most the log of the mass left. The second
        # bound needs all log-probs to be from one step of the model: those of another step at the
        # same node may differ in the last bits, and the mass left may be as small as these.
        remainder = self._item(
            item.path,
            item.node,
            item.pool_node,
            item.log_prob,
            in_all=item.bound_in_all > -math.inf,
            next_log_prob=log_probs[-1] if item.excluded else min(log_probs[-1], math.log(not_reported)),
            next_mass=min(num_left * math.exp(log_probs[-1]), not_reported),
            excluded=excluded,
            excluded_mass=excluded_mass,
        )
        heapq.heappush(self._waiting, remainder)


def log_sum_exp(values: list[float]) -> float:
    """Return the log of the sum of the exponentials; -inf without values."""
    if not values:
        return -math.inf
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))


def share_of_mass(log_prob: float, log_explored_mass: float, unexplored_mass: float) -> float:
    """Return a name's share of the mass of all names, unexplored mass at its upper bound."""
    log_mass = log_sum_exp([log_explored_mass, math.log(max(unexplored_mass, 1e-300))])
    return math.exp(log_prob - log_mass)

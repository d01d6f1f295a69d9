"""Names that no rollout has finished yet, as open items with bounds; what all searches share.

A frontier has a prefix trie and asks for *rollouts*. It does not depend on what answers them: a
language model, or a table of random numbers in a test. A rollout starts at a trie node, decodes
greedily under the trie to the end of a name, and reports at each step the log-probs of the K best
allowed tokens. Every token not taken becomes an open item with a known log-prob; where a node
allows more than K tokens, the rest becomes one item bounded by the K-th.

So every name of the trie is either finished or in exactly one open item.
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

# Upper bound of the score of every name below a node, from a bound of their log-probs, the depth of
# the node, the node, and its tokens that are left out.
Bound = Callable[[float, int, int, frozenset[int]], float]


@dataclass(frozen=True, slots=True)
class FinishedName:
    """A name whose log-prob is known.

    Attributes:
        name_index: Number of the name in the trie.
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


@dataclass(frozen=True, slots=True, eq=False)
class NameSet:
    """A prefix trie of names, without the terminator, and an upper bound of their scores."""

    trie: PrefixTrie
    bound: Bound


@dataclass(order=True, slots=True)
class _OpenItem:
    """A set of unfinished names: all below `path`, except the subtrees of the `excluded` tokens.

    Items are ordered so that a heap returns the highest bound first, ties by path. A bound of -inf
    says that the item has no name of the set, or none that is unfinished.
    """

    negative_bound: float = field(init=False)
    path: tuple[int, ...]
    node: int = field(compare=False)
    pool_node: int | None = field(compare=False)
    log_prob: float = field(compare=False)
    bound_in_all: float = field(compare=False)
    bound_in_pool: float = field(compare=False)
    mass: float = field(compare=False)
    excluded: frozenset[int] = field(compare=False, default=frozenset())
    excluded_mass: float = field(compare=False, default=0.0)

    def __post_init__(self) -> None:
        self.negative_bound = -self.bound

    @property
    def bound(self) -> float:
        """Upper bound of the score of every name in the item."""
        return max(self.bound_in_all, self.bound_in_pool)


class Frontier:
    """The open items of a trie, waiting or with a rollout in flight.

    A frontier may have a *pool*: some of the names, to which other bounds apply. Where only names
    of the pool can matter, a rollout is restricted to them; all other names below its node then
    stay behind in an item of their own.

    Args:
        names: All names.
        terminator: Token that ends a name.
        pool: Names of the pool; None: there is no pool.
        are_candidates: Whether rollouts must be restricted to `names`; false if the engine does it.
    """

    def __init__(
        self, names: NameSet, terminator: int, pool: NameSet | None = None, *, are_candidates: bool = False
    ) -> None:
        self._names = names
        self._trie = names.trie
        self._terminator = terminator
        self._pool = pool
        self._candidates = names.trie if are_candidates else None
        self._waiting = [self._item((), 0, None if pool is None else 0, 0.0, in_all=True)]
        self._in_flight: dict[RolloutRequest, _OpenItem] = {}
        self._mass_in_pool = 0.0  # of names finished by rollouts in the pool

    @property
    def next_bound(self) -> float:
        """Upper bound of the score of every name in a waiting item; -inf if there is none."""
        return self._waiting[0].bound if self._waiting else -math.inf

    @property
    def highest_bound(self) -> float:
        """Upper bound of the score of every unfinished name; -inf if there is none."""
        return max([self.next_bound, *(item.bound for item in self._in_flight.values())])

    @property
    def mass(self) -> float:
        """Upper bound of the total probability of the unfinished names."""
        items = itertools.chain(self._waiting, self._in_flight.values())
        return min(1.0, max(0.0, sum(item.mass for item in items) - self._mass_in_pool))

    def take(self, score_to_beat: float) -> RolloutRequest:
        """Return the request for the waiting item with the highest bound; it is then in flight."""
        item, candidates = heapq.heappop(self._waiting), self._candidates
        if self._pool is not None and item.bound_in_all <= score_to_beat:
            candidates = self._pool.trie
            heapq.heappush(self._waiting, replace(item, pool_node=None, bound_in_pool=-math.inf))
            item = replace(item, bound_in_all=-math.inf, mass=0.0)
        request = RolloutRequest(item.path, item.excluded, candidates)
        self._in_flight[request] = item
        return request

    def expand(self, request: RolloutRequest, rollout: Rollout) -> list[FinishedName]:
        """Replace a request's item by the open items off the rollout's path.

        Returns:
            The names finished by the rollout, the one at its end last.
        """
        item = self._in_flight.pop(request)
        start_log_prob = None if request.excluded else item.log_prob
        in_all = self._pool is None or request.candidates is not self._pool.trie
        finished = []
        for tokens, log_probs in zip(rollout.tokens, rollout.log_probs, strict=True):
            self._open_remainder(item, tokens, log_probs, in_all)
            taken, *others = [self._child(item, *child, in_all) for child in zip(tokens, log_probs, strict=True)]
            for other in others:
                if isinstance(other, FinishedName):
                    finished.append(other)
                else:
                    heapq.heappush(self._waiting, other)
            start_log_prob = taken.log_prob if start_log_prob is None else start_log_prob
            if isinstance(taken, FinishedName):
                finished.append(replace(taken, start_log_prob=start_log_prob))
                if not in_all:
                    self._mass_in_pool += math.fsum(math.exp(name.log_prob) for name in finished)
                return finished
            item = taken
        raise AssertionError("a rollout ends with the terminator")

    def _item(
        self, path: tuple[int, ...], node: int, pool_node: int | None, log_prob: float, in_all: bool
    ) -> _OpenItem:
        in_pool = self._bound_in_pool(log_prob, len(path), pool_node, frozenset())
        bound = self._names.bound(log_prob, len(path), node, frozenset()) if in_all else -math.inf
        return _OpenItem(path, node, pool_node, log_prob, bound, in_pool, math.exp(log_prob) if in_all else 0.0)

    def _bound_in_pool(self, log_prob: float, depth: int, node: int | None, excluded: frozenset[int]) -> float:
        return -math.inf if self._pool is None or node is None else self._pool.bound(log_prob, depth, node, excluded)

    def _child(self, parent: _OpenItem, token: int, log_prob: float, in_all: bool) -> _OpenItem | FinishedName:
        """Return the child's open item, or the finished name if the token is the terminator."""
        total = parent.log_prob + log_prob
        if token == self._terminator and self._trie.is_terminal(parent.node):
            return FinishedName(self._trie.name_index(parent.node), parent.path, total, start_log_prob=total)
        node = self._trie.child(parent.node, token)
        assert node is not None, f"token {token} is not allowed after {parent.path}"
        has_pool = self._pool is not None and parent.pool_node is not None
        pool_node = self._pool.trie.child(parent.pool_node, token) if has_pool else None
        return self._item((*parent.path, token), node, pool_node, total, in_all)

    def _open_remainder(self, item: _OpenItem, tokens: list[int], log_probs: list[float], in_all: bool) -> None:
        """Add the allowed children of `item` that a step did not report, if any, as one item."""
        excluded = item.excluded.union(tokens)
        excluded_mass = item.excluded_mass + math.fsum(map(math.exp, log_probs))
        num_left = self._trie.num_children(item.node) + self._trie.is_terminal(item.node) - len(excluded)
        if num_left == 0:
            return
        not_reported = max(0.0, 1.0 - excluded_mass) + _ROUNDING
        mass_left = min(num_left * math.exp(log_probs[-1]), not_reported)
        # A child's log-prob is at most the K-th, and at most the log of the mass left. The second
        # bound needs all log-probs to be from one step of the model: those of another step at the
        # same node may differ in the last bits, and the mass left may be as small as these.
        highest = item.log_prob + (log_probs[-1] if item.excluded else min(log_probs[-1], math.log(not_reported)))
        in_pool = self._bound_in_pool(highest, len(item.path), item.pool_node, excluded)
        bound = self._names.bound(highest, len(item.path), item.node, excluded) if in_all else -math.inf
        if in_all or in_pool > -math.inf:
            mass = math.exp(item.log_prob) * mass_left if in_all else 0.0
            heapq.heappush(
                self._waiting,
                replace(
                    item,
                    bound_in_all=bound,
                    bound_in_pool=in_pool,
                    mass=mass,
                    excluded=excluded,
                    excluded_mass=excluded_mass,
                ),
            )


class Budget:
    """Counts the rollouts of one mention and says when another one may start."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings
        self.num_rollouts = 0
        self._num_answered = 0
        self._num_tokens = 0

    @property
    def has_room(self) -> bool:
        """Whether a rollout may start now: budget is left, and not too many are in flight."""
        num_in_flight = self.num_rollouts - self._num_answered
        return num_in_flight < min(self._settings.width, max(1, self._num_answered)) and not self._is_spent

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent and every started rollout is answered."""
        return self._is_spent and self.num_rollouts == self._num_answered

    def start(self) -> None:
        """Count a requested rollout."""
        self.num_rollouts += 1

    def finish(self, rollout: Rollout) -> None:
        """Count an answered rollout and its tokens."""
        self._num_answered += 1
        self._num_tokens += len(rollout.tokens)

    @property
    def _is_spent(self) -> bool:
        max_tokens = self._settings.max_tokens
        return self.num_rollouts >= self._settings.max_rollouts or (
            max_tokens is not None and self._num_tokens >= max_tokens
        )


def log_sum_exp(values: list[float]) -> float:
    """Return the log of the sum of the exponentials; -inf without values."""
    if not values:
        return -math.inf
    highest = max(values)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in values))

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


class Frontier:
    """The open items of one trie, and those whose rollouts are in flight.

    Args:
        trie: Prefix trie of the allowed names, whose tokens don't include the terminator.
        terminator: Token that ends a name.
        bound: Upper bound of the score of the names below a node.
        are_candidates: Whether rollouts must be restricted to `trie`; false if it is the engine's.
    """

    def __init__(self, trie: PrefixTrie, terminator: int, bound: Bound, *, are_candidates: bool = False) -> None:
        self._trie = trie
        self._terminator = terminator
        self._bound = bound
        self._candidates = trie if are_candidates else None
        self._waiting = [self._item((), 0, 0.0)]
        self._in_flight: dict[RolloutRequest, _OpenItem] = {}
        self._highest_left = -math.inf

    @property
    def next_bound(self) -> float:
        """Upper bound of the score of every name in a waiting item; -inf if there is none."""
        return self._waiting[0].bound if self._waiting else -math.inf

    @property
    def highest_bound(self) -> float:
        """Upper bound of the score of every unfinished name; -inf if there is none."""
        return max([self.next_bound, *(item.bound for item in self._in_flight.values())])

    @property
    def highest_log_prob(self) -> float:
        """Upper bound of the log-prob of every sequence not finished here, in the trie or not.

        Such a sequence is below an open node, or it left an expanded node by a token that the step
        did not report: it has at most the probability that the reported tokens left over.
        """
        items = itertools.chain(self._waiting, self._in_flight.values())
        return max([self._highest_left, *(item.log_prob for item in items if not item.excluded)])

    @property
    def mass(self) -> float:
        """Upper bound of the total probability of the unfinished names."""
        return sum(item.mass for item in itertools.chain(self._waiting, self._in_flight.values()))

    def take(self) -> RolloutRequest:
        """Return the request for the waiting item with the highest bound; it is then in flight."""
        item = heapq.heappop(self._waiting)
        request = RolloutRequest(item.path, item.excluded, self._candidates)
        self._in_flight[request] = item
        return request

    def expand(self, request: RolloutRequest, rollout: Rollout) -> list[FinishedName]:
        """Replace a request's item by the open items off the rollout's path.

        Returns:
            The names finished by the rollout, the one at its end last.
        """
        item = self._in_flight.pop(request)
        start_log_prob = None if request.excluded else item.log_prob
        finished = []
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
                return [*finished, replace(taken, start_log_prob=start_log_prob)]
            item = taken
        raise AssertionError("a rollout ends with the terminator")

    def _item(self, path: tuple[int, ...], node: int, log_prob: float) -> _OpenItem:
        bound = self._bound(log_prob, len(path), node, frozenset())
        return _OpenItem(-bound, path, node, log_prob, math.exp(log_prob))

    def _child(self, parent: _OpenItem, token: int, log_prob: float) -> _OpenItem | FinishedName:
        """Return the child's open item, or the finished name if the token is the terminator."""
        total = parent.log_prob + log_prob
        if token == self._terminator and self._trie.is_terminal(parent.node):
            return FinishedName(self._trie.name_index(parent.node), parent.path, total, start_log_prob=total)
        node = self._trie.child(parent.node, token)
        assert node is not None, f"token {token} is not allowed after {parent.path}"
        return self._item((*parent.path, token), node, total)

    def _open_remainder(self, item: _OpenItem, tokens: list[int], log_probs: list[float]) -> None:
        """Add the allowed children of `item` that a step did not report, if any, as one item."""
        excluded = item.excluded.union(tokens)
        excluded_mass = item.excluded_mass + math.fsum(map(math.exp, log_probs))
        not_reported = max(0.0, 1.0 - excluded_mass) + _ROUNDING
        # A child's log-prob is at most the K-th, and at most the log of the mass left. The second
        # bound needs all log-probs to be from one step of the model: those of another step at the
        # same node may differ in the last bits, and the mass left may be as small as these.
        highest = log_probs[-1]
        if not item.excluded:
            highest = min(highest, math.log(not_reported))
            self._highest_left = max(self._highest_left, item.log_prob + math.log(not_reported))
        num_left = self._trie.num_children(item.node) + self._trie.is_terminal(item.node) - len(excluded)
        if num_left == 0:
            return
        mass_left = min(num_left * math.exp(log_probs[-1]), not_reported)
        bound = self._bound(item.log_prob + highest, len(item.path), item.node, excluded)
        remainder = _OpenItem(
            -bound, item.path, item.node, item.log_prob, math.exp(item.log_prob) * mass_left, excluded, excluded_mass
        )
        heapq.heappush(self._waiting, remainder)


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

"""Exact best-first search for the entity with the highest score, from language model and evidence.

The score of an entity is S = weight · log-prob of its best name + bonus. The entities of a mention's
*pool* have a bonus of any sign, all others have none. An open item therefore has two bounds: weight ·
log-prob for the entities outside the pool, and that plus the largest bonus of its pool entities for
those. Once neither bound of any open item exceeds the score of the best entity found, that entity is
the argmax of S over *all* entities.

A rollout from an item is restricted to the names of the pool if its first bound can no longer matter.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.engines.base import Rollout, RolloutRequest
from gemel_engine.decoding.frontier import Frontier, NameSet, log_sum_exp
from gemel_engine.errors import ConfigurationError
from gemel_engine.knowledge_base.trie import PrefixTrie


@dataclass(frozen=True, slots=True)
class PoolEntity:
    """An entity with a bonus.

    Attributes:
        row: Row of the entity in the knowledge base.
        bonus: What evidence adds to its score; finite, of any sign.
        names: Numbers of all its names in the trie of all names; at least one.
    """

    row: int
    bonus: float
    names: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FoundEntity:
    """An entity, its most probable finished name, and its score.

    Attributes:
        row: Row of the entity in the knowledge base.
        name_index: Number of the name in the trie of all names.
        log_prob: Log-prob of the name in nats, terminator included.
        score: Score S of the entity by this name.
    """

    row: int
    name_index: int
    log_prob: float
    score: float


@dataclass(frozen=True, slots=True)
class EntitySearchResult:
    """Entities in descending order of their scores, ties by row, and what is proved about them.

    Attributes:
        entities: The best entities found, at most `num_candidates`.
        num_certified: Number of leading entities that are proved to be the best of all entities.
            Their scores are proved, too; another entity may have a better name not yet found.
        log_explored_mass: Log of the total probability of all finished names.
        unexplored_mass: Upper bound of the total probability of all unfinished names, as far as two
            passes over the same prefix give the same probabilities.
        num_rollouts: Number of rollouts requested.
        highest_bound: Upper bound of the score of every entity by every unfinished name.
    """

    entities: tuple[FoundEntity, ...]
    num_certified: int
    log_explored_mass: float
    unexplored_mass: float
    num_rollouts: int
    highest_bound: float


class EntitySearch:
    """The search for the best entities of one mention.

    Of the settings only the limits count; the objective is the score, and so is the ranking.

    Args:
        trie: Prefix trie of all allowed names, without the terminator.
        entities_of_name: Function that returns the rows of the entities of a name.
        pool: Entities with a bonus; may be empty.
        weight: Weight of the log-prob in the score, above 0.
        terminator: Token that ends a name.
        settings: Limits of the search.
        are_candidates: Whether rollouts must be restricted to `trie`; false if it is the engine's.

    Raises:
        ConfigurationError: The weight or a bonus is not finite, or the weight is not above 0.
    """

    def __init__(
        self,
        trie: PrefixTrie,
        entities_of_name: Callable[[int], Iterable[int]],
        pool: Sequence[PoolEntity],
        weight: float,
        terminator: int,
        settings: SearchSettings,
        *,
        are_candidates: bool = False,
    ) -> None:
        wrong = next((entity for entity in pool if not math.isfinite(entity.bonus)), None)
        if wrong is not None or not 0 < weight < math.inf:
            given = f"the bonus of row {wrong.row} is {wrong.bonus}" if wrong else f"the weight is {weight}"
            raise ConfigurationError(f"no exact search for this score, {given}: give finite ones, the weight above 0")
        self._entities_of_name = entities_of_name
        self._bonuses = {entity.row: entity.bonus for entity in pool}
        self._weight = weight
        self._settings = settings
        all_names = NameSet(trie, lambda log_prob, _depth, _node, _excluded: weight * log_prob)
        of_pool = _pool_names(trie, pool, weight, terminator) if pool else None
        self._frontier = Frontier(all_names, terminator, settings, of_pool, are_candidates=are_candidates)
        self._log_probs: list[float] = []  # of finished names
        self._found: dict[int, FoundEntity] = {}  # by row
        self._score_to_beat = -math.inf

    def next_requests(self) -> list[RolloutRequest]:
        """Return the next requests: items that could change the certified entities, best first."""
        return self._frontier.next_requests(self._score_to_beat)

    def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
        """Add the answer to a request: the entities of its finished names, and open items."""
        for finished in self._frontier.observe(request, rollout):
            self._log_probs.append(finished.log_prob)
            for row in self._entities_of_name(finished.name_index):
                score = self._weight * finished.log_prob + self._bonuses.get(row, 0.0)
                if row not in self._found or score > self._found[row].score:
                    self._found[row] = FoundEntity(row, finished.name_index, finished.log_prob, score)
        best = heapq.nlargest(self._settings.num_to_certify, (found.score for found in self._found.values()))
        self._score_to_beat = best[-1] if len(best) == self._settings.num_to_certify else -math.inf

    @property
    def is_done(self) -> bool:
        """Whether enough entities are certified, nothing is left or the budget is spent."""
        return self._frontier.is_done(self._score_to_beat)

    def result(self) -> EntitySearchResult:
        """Return the best entities so far; at least one after the first `observe`."""
        highest_bound = self._frontier.highest_bound
        entities = heapq.nsmallest(
            self._settings.num_candidates, self._found.values(), key=lambda found: (-found.score, found.row)
        )
        return EntitySearchResult(
            entities=tuple(entities),
            num_certified=sum(found.score >= highest_bound for found in entities),
            log_explored_mass=log_sum_exp(self._log_probs),
            unexplored_mass=self._frontier.mass,
            num_rollouts=self._frontier.num_rollouts,
            highest_bound=highest_bound,
        )


def _pool_names(trie: PrefixTrie, pool: Sequence[PoolEntity], weight: float, terminator: int) -> NameSet:
    """Return the names of the pool's entities, with the largest bonus below a node in the bound."""
    bonus_of_name: dict[int, float] = {}
    for entity in pool:
        for name in entity.names:
            bonus_of_name[name] = max(entity.bonus, bonus_of_name.get(name, -math.inf))
    of_pool, numbers = PrefixTrie.from_sequences([trie.name_tokens(name) for name in bonus_of_name])
    own = [-math.inf] * of_pool.num_nodes  # bonus of the name that ends at a node
    for number, bonus in zip(numbers, bonus_of_name.values(), strict=True):
        own[int(of_pool.terminals[number])] = bonus
    highest = own.copy()  # largest bonus of the names at and below a node
    for node in range(of_pool.num_nodes - 1, 0, -1):
        parent = of_pool.parent(node)
        highest[parent] = max(highest[parent], highest[node])

    def bound(log_prob: float, _depth: int, node: int, excluded: frozenset[int]) -> float:
        if not excluded:
            return weight * log_prob + highest[node]
        tokens, first = of_pool.children(node)
        left = [highest[first + place] for place, token in enumerate(tokens.tolist()) if token not in excluded]
        if terminator not in excluded:
            left.append(own[node])
        return weight * log_prob + max(left, default=-math.inf)

    return NameSet(of_pool, bound)

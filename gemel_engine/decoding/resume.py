"""Rebuilds a search's result from an earlier run's prediction, for a changed knowledge base.

Among the old names, no uncertified one scores higher than the last certified one. This stays true
when names are removed, and so do the bounds of their mass. Added names are searched separately.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gemel_engine.config.components import Objective
from gemel_engine.decoding.search import FoundName, SearchResult
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.types import Prediction


def result_of(prediction: Prediction, knowledge_base: KnowledgeBase, objective: Objective) -> SearchResult:
    """Return the result of the search behind a prediction, as far as the prediction contains it.

    Args:
        prediction: The language model ranked alone, its first name is certified, and each candidate
            is still in the knowledge base under the same name.
        knowledge_base: The current knowledge base, which numbers the names of the result.
        objective: Objective of the search.
    """
    found = knowledge_base.names_of_entities([candidate.entity_id for candidate in prediction.candidates])
    by_index: dict[int, FoundName] = {}  # entities may share a name
    for name_index, candidate in zip(found, prediction.candidates, strict=True):
        assert name_index is not None, f"{candidate.entity_id} is still in the knowledge base"
        assert candidate.log_prob is not None, "the language model ranked alone"
        num_tokens = len(knowledge_base.name_tokens(name_index)) + 1 if objective == "mean" else 1
        by_index.setdefault(name_index, FoundName(name_index, candidate.log_prob, candidate.log_prob / num_tokens))
    names = tuple(by_index.values())
    assert prediction.num_certified, "nothing is known of what an unproved search did not find"
    assert prediction.unexplored_mass is not None, "a prediction without an error"
    num_certified = len(set(found[: prediction.num_certified]))
    return SearchResult(
        names=names,
        num_certified=num_certified,
        log_explored_mass=_log_explored_mass(prediction, names[0].log_prob, prediction.unexplored_mass),
        unexplored_mass=prediction.unexplored_mass,
        num_rollouts=prediction.num_rollouts or 0,
        highest_bound=names[num_certified - 1].score,
    )


def numbered_in(trie: PrefixTrie, result: SearchResult, searched: PrefixTrie) -> SearchResult:
    """Return a result of a search over the trie `searched` with its names numbered as in `trie`.

    `trie` must contain all of these names.
    """
    names = [
        replace(name, name_index=trie.name_index(trie.walk(searched.name_tokens(name.name_index))))
        for name in result.names
    ]
    return replace(result, names=tuple(names))


def margin_of(names: Sequence[FoundName], earlier: Prediction | None) -> float | None:
    """Return the objective of the first name minus that of the second; None if only one was found.

    Args:
        names: Names in the order of the ranking; at least one.
        earlier: The prediction that they continue, which may have listed other entities of its first
            name instead of its second name; None: they continue none.
    """
    margins = [names[0].score - name.score for name in names[1:2]]
    if earlier is not None and earlier.margin is not None and earlier.log_prob == names[0].log_prob:
        margins.append(earlier.margin)
    return min(margins, default=None)


def _log_explored_mass(prediction: Prediction, log_prob: float, unexplored_mass: float) -> float:
    """Return the log of the explored mass behind `prediction.probability`, up to rounding.

    `log_prob` is the best name's.
    """
    assert prediction.probability is not None, "a prediction without an error"
    if not prediction.probability:  # too small for float64; an infinite mass keeps it 0
        return math.inf
    log_mass = log_prob - math.log(prediction.probability)
    unexplored_share = math.exp(min(0.0, math.log(max(unexplored_mass, 1e-300)) - log_mass))
    return log_mass + math.log1p(-unexplored_share) if unexplored_share < 1 else -math.inf


def merge_results(first: SearchResult, second: SearchResult, num_candidates: int) -> SearchResult:
    """Return the result of two searches over all names of both.

    No name may be in both, and both must number their names by the same trie. An unfinished name
    scores at most the higher of the two bounds, so names above it are certified. Masses of disjoint
    sets add up.
    """
    names = sorted([*first.names, *second.names], key=lambda name: -name.score)[:num_candidates]
    highest_bound = max(first.highest_bound, second.highest_bound)
    return SearchResult(
        names=tuple(names),
        num_certified=sum(name.score >= highest_bound for name in names),
        log_explored_mass=float(np.logaddexp(first.log_explored_mass, second.log_explored_mass)),
        unexplored_mass=min(1.0, first.unexplored_mass + second.unexplored_mass),
        num_rollouts=first.num_rollouts + second.num_rollouts,
        highest_bound=highest_bound,
    )

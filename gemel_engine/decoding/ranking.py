"""Rank entities by the score, from what an output row says of the language model's search.

A row has the log-probs of its candidates and the mass of all names, which bounds the log-prob of
every other name. Fitting, and runs with `previous`, therefore rank a row by other weights without
the language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from gemel_engine.decoding.scope import Scope
from gemel_engine.evidence.weights import softmax
from gemel_engine.types import Candidate, Prediction

_ROUNDING = 1e-9  # of the mass of all names, in the bound of the names that a row lacks


@dataclass(frozen=True, slots=True)
class Heard:
    """What the language model found for a mention.

    Attributes:
        log_probs: Log-prob of the best name found of each entity, by row.
        log_limits: Upper bound, beside `log_rest`, of the log-prob of further names of entities, by
            row: of those that have several names or share one with an entity that has; which name
            was found, a row does not say.
        log_mass: Log of an upper bound of the probability of all names.
        log_rest: Upper bound of the log-prob of every name that was not found.
    """

    log_probs: Mapping[int, float]
    log_limits: Mapping[int, float]
    log_mass: float
    log_rest: float

    @classmethod
    def of(cls, prediction: Prediction, scope: Scope) -> Self | None:
        """Read it from a prediction; None if the language model was not asked."""
        if prediction.log_prob is None or prediction.probability is None:
            return None
        row_of = scope.knowledge_base.row_of_entity
        stated = {
            row: candidate.log_prob
            for candidate in prediction.candidates
            if candidate.log_prob is not None and (row := row_of(candidate.entity_id)) is not None
        }
        log_probs, log_limits = dict(stated), {}
        of_names: dict[int, float] = {}  # log-probs of names that were found
        limits: dict[int, float] = {}  # of names that may have been found
        for row, log_prob in stated.items():
            names = scope.numbers(row)
            if len(names) == 1:
                of_names[names[0]] = log_prob
            else:
                log_limits[row] = -math.inf
                limits.update({name: max(log_prob, limits.get(name, log_prob)) for name in names})
        for name, limit in (limits | of_names).items():
            for other in scope.entities(name):
                if other in stated:
                    continue
                if name in of_names and len(scope.knowledge_base.names_of_row(other)) == 1:
                    log_probs[other] = limit
                else:
                    log_limits[other] = max(limit, log_limits.get(other, limit))
        # A smaller share is rounded too much; all names have a probability of 1 at most.
        is_precise = prediction.probability > 1e-300
        log_mass = prediction.log_prob - math.log(prediction.probability) if is_precise else 0.0
        # Entities of one name have equal log-probs; two names that happen to have count once, too.
        share = 1 - sum(math.exp(log_prob - log_mass) for log_prob in set(stated.values()))
        return cls(log_probs, log_limits, log_mass, log_mass + math.log(max(share, 0.0) + _ROUNDING))

    def without(self, row: int | None) -> Self:
        """Return it for a knowledge base without an entity."""
        return replace(self, log_probs={found: value for found, value in self.log_probs.items() if found != row})

    def bounds(self, bonuses: Mapping[int, float], weight: float) -> dict[int | None, float]:
        """Return an upper bound of the score by names that were not found.

        Returns:
            A bound of each entity of which not all names were found, by its row where it has a bonus
            or a limit, under None for all others.
        """
        rows = bonuses.keys() - self.log_probs.keys() | self.log_limits.keys()
        limits = {row: max(self.log_rest, self.log_limits.get(row, self.log_rest)) for row in rows}
        found: dict[int | None, float] = {row: weight * limit + bonuses.get(row, 0.0) for row, limit in limits.items()}
        return {None: weight * self.log_rest, **found}


@dataclass(frozen=True, slots=True)
class Ranking:
    """Entities in the order of their scores.

    Attributes:
        candidates: Row, log-prob and score of each entity, the best first. Entities whose log-prob
            is not known follow the others, with None and what evidence adds to their scores.
        certainty: Share of the first entity in the softmax of the scores, in which an unknown
            log-prob is at its bound, but no score above the first.
        num_certified: Number of leading entities that are proved to be the best of all.
        margin: Score of the first entity minus that of the second; None without two scores.
    """

    candidates: tuple[tuple[int, float | None, float], ...]
    certainty: float
    num_certified: int
    margin: float | None


def ranking_of(bonuses: Mapping[int, float], heard: Heard | None, weight: float) -> Ranking:
    """Rank entities; there must be at least one.

    Args:
        bonuses: Bonus of each entity of the pool by its row.
        heard: What the language model found; None: evidence ranks alone.
        weight: Weight of the log-prob.
    """
    log_probs = {} if heard is None else heard.log_probs
    known = sorted(
        ((row, log_prob, weight * log_prob + bonuses.get(row, 0.0)) for row, log_prob in log_probs.items()), key=_place
    )
    others = sorted(((row, None, bonus) for row, bonus in bonuses.items() if row not in log_probs), key=_place)
    ranked = (*known, *others)
    scores = [score for *_, score in known or others]
    num_certified, silent = 0, []
    if heard is not None and known:
        bounds = heard.bounds(bonuses, weight)
        num_certified = sum(score >= max(bounds.values()) for score in scores)
        silent = [min(bounds[row], scores[0]) for row, *_ in others]
    shares = softmax(np.array(scores + silent))
    margin = scores[0] - scores[1] if len(scores) > 1 else None
    return Ranking(ranked, float(shares[0]), num_certified, margin)


def ranked_again(
    prediction: Prediction, scope: Scope, bonuses: Mapping[int, float], heard: Heard | None, weight: float, size: int
) -> Prediction:
    """Return a prediction with the order, scores and certificates of a new ranking.

    Args:
        prediction: Prediction of the mention.
        scope: The names that the mention may be linked to.
        bonuses: Bonus of each entity of the pool by its row.
        heard: What the language model found; None: evidence decides alone.
        weight: Weight of the log-prob.
        size: Maximum number of candidates.
    """
    ranking = ranking_of(bonuses, heard, weight)
    candidates = []
    for row, log_prob, score in ranking.candidates[:size]:
        entity = scope.knowledge_base.entity(row)
        of_both = None if log_prob is None else score
        candidates.append(Candidate(entity.entity_id, entity.name, log_prob, bonuses.get(row, 0.0), of_both))
    first = candidates[0]
    again = replace(
        prediction,
        entity_id=first.entity_id,
        entity_name=first.entity_name,
        log_prob=first.log_prob,
        score=first.score,
        decided_by="evidence",
        probability=None,
        confidence=ranking.certainty,
        nil_probability=None,
        is_nil=None,
        margin=ranking.margin,
        certified=ranking.num_certified > 0,
        num_certified=min(ranking.num_certified, size),
        candidates=tuple(candidates),
    )
    if heard is not None and first.log_prob is not None:
        share = math.exp(first.log_prob - heard.log_mass)
        return replace(again, decided_by="score", probability=share)
    return replace(
        again,
        unexplored_mass=None,
        demonstration_ids=(),
        demonstration_entity_ids=(),
        num_demonstrations_dropped=0,
        num_characters_dropped=0,
        num_rollouts=0,
    )


def _place(item: tuple[int, float | None, float]) -> tuple[float, int]:
    return -item[2], item[0]

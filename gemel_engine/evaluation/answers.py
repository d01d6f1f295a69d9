"""Answers to labelled mentions, from which confidence and NIL are learnt.

A row that evidence took part in is ranked again, by weights that were fitted without its surface
form. It answers twice where the language model was asked: by the score, and by evidence alone.

A mention without an entity in the knowledge base is rare among labels. Its answers are made from
other mentions: their entity is held out of the candidate pool and of what the language model found,
as if the knowledge base lacked it. The search is not repeated without the entity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine.decoding.ranking import Heard, ranked_again
from gemel_engine.decoding.scope import Scope
from gemel_engine.evaluation.fit_score import LabelledPools, fit_score, left_out_weights
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.types import Prediction, row_to_prediction


@dataclass(frozen=True, slots=True)
class Answers:
    """N answers to labelled mentions.

    Attributes:
        predictions: The answers, with the evidence for them.
        forms: Surface form of each.
        gold: Entity of each mention; None if the knowledge base lacks it.
        are_final: Whether each is the answer that the run would give, (N,): by the language model
            where it was asked.
    """

    predictions: list[Prediction]
    forms: list[str]
    gold: list[str | None]
    are_final: NDArray[np.bool_]

    @property
    def are_right(self) -> NDArray[np.bool_]:
        """Whether each answer is right, (N,)."""
        pairs = zip(self.predictions, self.gold, strict=True)
        return np.array([gold is not None and answer.entity_id == gold for answer, gold in pairs], bool)

    @property
    def are_nil(self) -> NDArray[np.bool_]:
        """Whether each mention has no entity, (N,)."""
        return np.array([gold is None for gold in self.gold], bool)


def answers_of_model(rows: pa.Table, forms: Sequence[str], gold: Sequence[str | None]) -> Answers:
    """Return the answers of a run in which the language model ranks alone.

    Args:
        rows: N rows of `PREDICTION_SCHEMA` without an error.
        forms: Surface form of each.
        gold: Entity of each mention; None if the knowledge base lacks it.
    """
    predictions = [row_to_prediction(row) for row in rows.to_pylist()]
    return Answers(predictions, list(forms), list(gold), np.ones(len(predictions), bool))


class RankedAnswers:
    """Answers by the score to the mentions of a run, with weights fitted to them.

    Args:
        rows: N rows of `PREDICTION_SCHEMA` without an error.
        forms: Surface form of each.
        gold: Entity of each mention; None if the knowledge base lacks it.
        knowledge_base: Knowledge base of the run.

    Attributes:
        weights: The fitted weights.

    Raises:
        InputError: Too few mentions have their entity in their pool.
    """

    def __init__(
        self,
        rows: pa.Table,
        forms: Sequence[str],
        gold: Sequence[str | None],
        knowledge_base: KnowledgeBase,
    ) -> None:
        pools = LabelledPools.of(rows, forms, gold, knowledge_base)
        left_out = left_out_weights(pools)
        self.weights = fit_score(pools, fitted=left_out)
        self._predictions = [row_to_prediction(row) for row in rows.to_pylist()]
        with_pool = [form for prediction, form in zip(self._predictions, forms, strict=True) if prediction.pool]
        fold_of_form = dict(zip(with_pool, pools.folds.tolist(), strict=True))
        self._forms, self._gold = list(forms), list(gold)
        self._weights = [left_out[fold_of_form[form]] if form in fold_of_form else self.weights for form in forms]
        self._scope = Scope(knowledge_base, knowledge_base.trie)

    def answers(self, held_out: frozenset[str] = frozenset()) -> Answers:
        """Return the answers; the entities of mentions of the forms `held_out` are left out."""
        predictions, forms, entities, are_final = [], [], [], []
        for prediction, form, gold, weights in zip(
            self._predictions, self._forms, self._gold, self._weights, strict=True
        ):
            without = gold if form in held_out and prediction.pool else None
            found = list(self._ranked(prediction, form, weights, without))
            predictions += found
            forms += [form] * len(found)
            entities += [None if without is not None else gold] * len(found)
            are_final += [place == len(found) - 1 for place in range(len(found))]
        return Answers(predictions, forms, entities, np.array(are_final, bool))

    def _ranked(
        self, prediction: Prediction, form: str, weights: ScoreWeights, without: str | None
    ) -> Iterator[Prediction]:
        """Yield the answer by evidence, then that by the score; that of the language model where there is no pool."""
        if not prediction.pool:
            yield prediction
            return
        knowledge_base = self._scope.knowledge_base
        pool = tuple(item for item in prediction.pool if item.entity_id != without)
        known = {
            row: item.reasons for item in pool if (row := knowledge_base.row_of_entity(item.entity_id)) is not None
        }
        bonuses = bonuses_of(form, list(known), list(known.values()), weights, knowledge_base)
        heard = Heard.of(prediction, self._scope)
        if heard is not None and without is not None:
            heard = heard.without(knowledge_base.row_of_entity(without))
        prediction = replace(prediction, pool=pool)
        for found in ([None] if bonuses else []) + ([heard] if heard is not None and heard.log_probs else []):
            yield ranked_again(prediction, self._scope, bonuses, found, weights.language_model, 2)

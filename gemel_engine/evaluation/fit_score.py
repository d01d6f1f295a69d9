"""Fit the weights of the score to the candidate pools of mentions with gold labels.

A conditional logit gives each feature its weight: the probability of a candidate is the softmax of
the weighted features over the pool of its mention. Weights are not negative, since every feature
counts for its candidate. The weight of the language model is fitted after that, on the candidates
whose log-prob the run knows. Mentions of one surface form are in one fold, so that risks are measured
on forms that fitting did not see.

Shapes: M mentions, N candidates of all mentions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import minimize

from gemel_engine.errors import InputError
from gemel_engine.evidence.features import FEATURES, features_of
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.store import KnowledgeBase

Numbers = NDArray[np.float64]
Places = NDArray[np.intp]

NUM_FOLDS = 5
_PENALTY = 1.0  # of squared standardised weights, for all mentions together
_LEAST = 20  # least number of mentions
_LEAST_WEIGHT = 0.01  # of the language model
_LEAST_DECIDED = 30  # least number of mentions for which a risk is measured
_NUM_RISKS = 40


@dataclass(frozen=True, slots=True)
class LabelledPools:
    """The candidates of mentions with gold labels.

    Attributes:
        features: Features of all candidates, (N, F).
        log_probs: Log-prob of each candidate; NaN where the language model was not asked, (N,).
        starts: Place of each mention's first candidate, and the end, (M + 1,).
        gold: Place of each mention's entity among all candidates; -1 if its pool lacks it, (M,).
        forms: Number of each mention's surface form, (M,).
    """

    features: Numbers
    log_probs: Numbers
    starts: Places
    gold: Places
    forms: Places

    @classmethod
    def of(
        cls,
        predictions: pa.Table,
        forms: Sequence[str],
        gold: Sequence[str | None],
        knowledge_base: KnowledgeBase,
    ) -> Self:
        """Describe the pools of predictions; rows without a pool are left out.

        Args:
            predictions: M rows of `PREDICTION_SCHEMA`.
            forms: Surface form of each mention.
            gold: Entity of each mention; None if it has none.
            knowledge_base: Knowledge base of the run.

        Raises:
            InputError: Too few rows have a pool.
        """
        features, log_probs, places, kept_forms, starts = [], [], [], [], [0]
        rows = predictions.select(["pool", "candidates"]).to_pylist()
        for row, form, entity_id in zip(rows, forms, gold, strict=True):
            pool = row["pool"] or []
            if not pool:
                continue
            ids = [item["entity_id"] for item in pool]
            reasons = [dict(item["reasons"]) for item in pool]
            features.append(features_of(form, [_name(knowledge_base, item) for item in ids], reasons))
            known = {item["entity_id"]: item["log_prob"] for item in row["candidates"] or []}
            log_probs.append([np.nan if known.get(item) is None else known[item] for item in ids])
            places.append(starts[-1] + ids.index(entity_id) if entity_id in ids else -1)
            kept_forms.append(form)
            starts.append(starts[-1] + len(ids))
        num_found, num_forms = sum(place >= 0 for place in places), len(set(kept_forms))
        if num_found < _LEAST or num_forms < NUM_FOLDS:
            raise InputError(
                f"{num_found} labelled mentions of {num_forms} surface forms have their entity among their candidates: "
                f"fitting needs at least {_LEAST} of {NUM_FOLDS}; link more of them with a knowledge base that has an "
                "evidence index"
            )
        return cls(
            np.concatenate(features),
            np.concatenate([np.array(values, np.float64) for values in log_probs]),
            np.array(starts, np.intp),
            np.array(places, np.intp),
            np.unique(kept_forms, return_inverse=True)[1],
        )

    @property
    def folds(self) -> Places:
        """Fold of each mention, (M,); mentions of a surface form are in one fold."""
        order = np.random.default_rng(0).permutation(self.forms.max() + 1)
        folds: Places = order[self.forms] % NUM_FOLDS
        return folds

    def select(self, mentions: Places) -> Self:
        """Return the pools of some mentions, in ascending order."""
        candidates = np.concatenate([np.arange(self.starts[m], self.starts[m + 1]) for m in mentions])
        sizes = np.diff(self.starts)[mentions]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        gold = np.where(self.gold[mentions] < 0, -1, self.gold[mentions] - self.starts[mentions] + starts[:-1])
        return type(self)(self.features[candidates], self.log_probs[candidates], starts, gold, self.forms[mentions])


def fit_score(
    pools: LabelledPools,
    *,
    fitted_on: Mapping[str, Any] | None = None,
    fitted: Sequence[ScoreWeights] | None = None,
) -> ScoreWeights:
    """Fit the weights of the score.

    Args:
        pools: Candidates of labelled mentions.
        fitted_on: What to note about the data.
        fitted: Result of `left_out_weights`, on which risks are measured; None: it is computed.
    """
    weights = _weights(pools)
    certainty, is_right = _left_out(pools, fitted or left_out_weights(pools))
    return replace(
        weights,
        risks=_risks(certainty, is_right),
        fitted_on={
            "num_mentions": len(pools.gold),
            "num_mentions_with_log_probs": int(_is_asked(pools).sum()),
            "pool_recall": float((pools.gold >= 0).mean()),
            "accuracy_of_evidence_alone": float(is_right.mean()),
            **(fitted_on or {}),
        },
    )


def left_out_weights(pools: LabelledPools) -> list[ScoreWeights]:
    """Return the weights of each fold, fitted without the surface forms of the fold."""
    whole, found = _weights(pools), []
    for fold in range(NUM_FOLDS):
        others = np.flatnonzero(pools.folds != fold)
        can_fit = bool((pools.gold[others] >= 0).any())
        found.append(_weights(pools.select(others)) if can_fit else whole)
    return found


def _weights(pools: LabelledPools) -> ScoreWeights:
    weights = conditional_logit(pools.features, pools.starts, pools.gold)
    scale, language_model = _with_language_model(pools, pools.features @ weights)
    features = dict(zip(FEATURES, (scale * weights).tolist(), strict=True))
    return ScoreWeights(features=features, language_model=language_model, risks=(), fitted_on={})


def _name(knowledge_base: KnowledgeBase, entity_id: str) -> str:
    row = knowledge_base.row_of_entity(entity_id)
    if row is None:
        raise InputError(f"the knowledge base lacks {entity_id!r} of the run's pools: use the one that the run had")
    return knowledge_base.entity(row).name


def _is_asked(pools: LabelledPools) -> NDArray[np.bool_]:
    """Return whether a mention's entity and another candidate have a log-prob, (M,)."""
    num_known = np.add.reduceat(~np.isnan(pools.log_probs), pools.starts[:-1])
    has_gold = pools.gold >= 0
    has_gold[has_gold] = ~np.isnan(pools.log_probs[pools.gold[has_gold]])
    return has_gold & (num_known > 1)


def _with_language_model(pools: LabelledPools, bonuses: Numbers) -> tuple[float, float]:
    """Return the factor of the bonuses and the weight of the log-prob; 1 and the least if unknown.

    Mentions that the language model was not asked for take part by their bonuses alone: it may be
    asked for the hard ones only, by which bonuses would count too little.
    """
    is_asked = _is_asked(pools)
    if is_asked.sum() < _LEAST:
        return 1.0, _LEAST_WEIGHT
    of_asked = np.repeat(is_asked, np.diff(pools.starts))
    kept = ~(of_asked & np.isnan(pools.log_probs))
    num_before = np.concatenate([[0], np.cumsum(kept)])  # kept ones before each candidate
    columns = np.column_stack([bonuses, np.where(of_asked, pools.log_probs, 0.0)])[kept]
    gold = np.where(pools.gold < 0, -1, num_before[pools.gold])
    scale, weight = conditional_logit(columns, num_before[pools.starts], gold, penalty=0.0)
    return (float(scale), max(float(weight), _LEAST_WEIGHT)) if scale > 0 else (1.0, _LEAST_WEIGHT)


def conditional_logit(features: Numbers, starts: Places, gold: Places, penalty: float = _PENALTY) -> Numbers:
    """Return the weights (F,), none negative, that make gold candidates most likely.

    Mentions whose pool lacks their entity are left out.
    """
    sizes = np.diff(starts)
    is_used = gold >= 0
    rows = np.repeat(is_used, sizes)
    used, sizes = features[rows], sizes[is_used]
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    target = gold[is_used] - starts[:-1][is_used] + first
    scale = used.std(axis=0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    used = used / scale

    def loss(weights: Numbers) -> tuple[float, Numbers]:
        scores = used @ weights
        highest = np.maximum.reduceat(scores, first)
        mass = np.exp(scores - np.repeat(highest, sizes))
        total = np.add.reduceat(mass, first)
        mean = (scores[target] - highest - np.log(total)).sum()
        gradient = used[target].sum(axis=0) - (mass / np.repeat(total, sizes)) @ used
        return -mean + penalty / 2 * float(weights @ weights), -gradient + penalty * weights

    bounds = [(0.0, None)] * features.shape[1]
    fitted = minimize(loss, np.full(features.shape[1], 0.1), jac=True, method="L-BFGS-B", bounds=bounds)
    weights: Numbers = fitted.x / scale
    return weights


def _left_out(pools: LabelledPools, fitted: Sequence[ScoreWeights]) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return the probability of each mention's best candidate, and whether it is right, (M,) each.

    The weights are those that were fitted without the mention's surface form.
    """
    certainty, is_right = np.zeros(len(pools.gold)), np.zeros(len(pools.gold), bool)
    weights = [np.array([one.features[name] for name in FEATURES]) for one in fitted]
    for mention, fold in enumerate(pools.folds):
        span = slice(pools.starts[mention], pools.starts[mention + 1])
        scores = pools.features[span] @ weights[fold]
        best = int(scores.argmax())
        certainty[mention] = 1 / np.exp(scores - scores[best]).sum()
        is_right[mention] = pools.starts[mention] + best == pools.gold[mention]
    return certainty, is_right


def _risks(certainty: Numbers, is_right: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """Return pairs of a probability and the share of wrong answers at or above it, ascending."""
    order = np.argsort(-certainty, kind="stable")
    shares = np.cumsum(~is_right[order]) / np.arange(1, len(order) + 1)
    places = np.unique(np.linspace(min(_LEAST_DECIDED, len(order)) - 1, len(order) - 1, _NUM_RISKS).astype(int))
    ends = np.searchsorted(-certainty[order], -certainty[order[places]], side="right") - 1  # all of a tie
    return tuple(sorted({(float(certainty[order[end]]), float(shares[end])) for end in ends}))

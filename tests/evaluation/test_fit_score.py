"""Fitting the weights of the score to labelled predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.special import log_softmax

from gemel_engine.errors import InputError
from gemel_engine.evaluation.fit_score import LabelledPools, conditional_logit, fit_score
from gemel_engine.types import Candidate, PoolEntity, Prediction, predictions_to_table

NAMES = {f"Q{n}": f"name {n}" for n in range(6)}


class Names:
    """Entities by id, as much of a knowledge base as fitting needs."""

    def row_of_entity(self, entity_id: str) -> int | None:
        return list(NAMES).index(entity_id) if entity_id in NAMES else None

    def entity(self, row: int) -> SimpleNamespace:
        return SimpleNamespace(name=list(NAMES.values())[row])


def labelled(num_mentions: int, seed: int = 0) -> tuple[list[Prediction], list[str], list[str | None]]:
    """Mentions whose entity has the most training mentions in four of five cases, and is the model's in the others."""
    rng = np.random.default_rng(seed)
    predictions, forms, gold = [], [], []
    for number in range(num_mentions):
        counts = rng.permutation([9.0, 1.0, 0.0])
        ids = rng.permutation(list(NAMES))[:3].tolist()
        best = int(counts.argmax()) if number % 5 else int(counts.argmin())
        pool = tuple(
            PoolEntity(entity, 1.0, {"form": count, "popularity": 5.0} if count else {"popularity": 5.0})
            for entity, count in zip(ids, counts.tolist(), strict=True)
        )
        candidates = tuple(
            Candidate(entity, NAMES[entity], -1.0 if place == best else -6.0) for place, entity in enumerate(ids)
        )
        predictions.append(Prediction(str(number), candidates=candidates, pool=pool))
        forms.append(f"form {number % 40}")
        gold.append(ids[best])
    return predictions, forms, gold


def pools_of(predictions: list[Prediction], forms: list[str], gold: Sequence[str | None]) -> LabelledPools:
    return LabelledPools.of(predictions_to_table(predictions), forms, gold, Names())  # type: ignore[arg-type]


def test_weights_follow_what_decides() -> None:
    predictions, forms, gold = labelled(300)
    weights = fit_score(pools_of(predictions, forms, gold))
    assert weights.features["form_prior"] > 0.1
    assert weights.features["popularity"] == pytest.approx(0.0, abs=1e-6)  # the same for all
    assert weights.language_model > 0.2
    assert weights.fitted_on["accuracy_of_evidence_alone"] == pytest.approx(0.8, abs=0.01)
    assert weights.fitted_on["num_mentions_with_log_probs"] == 300
    assert weights.risks[0][1] == pytest.approx(0.2, abs=0.01)  # of all mentions
    again = fit_score(pools_of(predictions, forms, gold))
    assert again == weights


def test_without_log_probs_the_language_model_keeps_a_small_weight() -> None:
    predictions, forms, gold = labelled(60)
    silent = [Prediction(item.mention_id, pool=item.pool) for item in predictions]
    weights = fit_score(pools_of(silent, forms, gold))
    assert weights.language_model == 0.01
    assert weights.fitted_on["num_mentions_with_log_probs"] == 0


def test_bonuses_keep_their_weight_where_only_hard_mentions_have_log_probs() -> None:
    predictions, forms, gold = labelled(600)
    silent = [Prediction(item.mention_id, pool=item.pool) for item in predictions]
    # Those in which evidence is right half of the time, so that among them it means nothing.
    hard = {number for number in range(600) if number % 5 in (0, 1) and number % 2}
    asked = [
        item if number in hard else quiet for number, (item, quiet) in enumerate(zip(predictions, silent, strict=True))
    ]
    evidence_alone = fit_score(pools_of(silent, forms, gold))
    with_model = fit_score(pools_of(asked, forms, gold))
    assert with_model.fitted_on["num_mentions_with_log_probs"] == len(hard)
    assert with_model.language_model > 0.2
    assert with_model.features["form_prior"] > 0.7 * evidence_alone.features["form_prior"]


def test_an_entity_outside_its_pool_counts_as_wrong_and_teaches_nothing() -> None:
    predictions, forms, gold = labelled(60)
    lost: Sequence[str | None] = [None if number % 3 == 0 else item for number, item in enumerate(gold)]
    pools = pools_of(predictions, forms, lost)
    assert (pools.gold == -1).sum() == 20
    assert fit_score(pools).fitted_on["pool_recall"] == pytest.approx(2 / 3)
    some = pools.select(np.array([1, 3, 4]))
    assert (some.gold >= 0).tolist() == [True, False, True]
    np.testing.assert_array_equal(some.features[some.gold[0]], pools.features[pools.gold[1]])


def test_too_few_mentions_are_refused() -> None:
    predictions, forms, gold = labelled(10)
    with pytest.raises(
        InputError,
        match="10 labelled mentions of 10 surface forms have their entity",
    ):
        fit_score(pools_of(predictions, forms, gold))
    many, _, ids = labelled(60)
    with pytest.raises(InputError, match="60 labelled mentions of 1 surface forms"):
        pools_of(many, ["x"] * 60, ids)
    empty = [Prediction(str(number)) for number in range(30)]
    with pytest.raises(InputError, match="0 labelled mentions of 0"):
        pools_of(empty, ["x"] * 30, [None] * 30)


def test_the_conditional_logit_finds_the_weights_of_a_simulation(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = np.array([1.5, 0.5])
    features = rng.normal(size=(4000, 3, 2))
    scores = log_softmax(features @ truth, axis=1)
    chosen = np.array([rng.choice(3, p=np.exp(row)) for row in scores])
    starts = np.arange(0, 12001, 3)
    found = conditional_logit(features.reshape(-1, 2), starts, starts[:-1] + chosen, penalty=0.0)
    np.testing.assert_allclose(found, truth, atol=0.1)

"""Why one entity has a higher score than another, in words."""

from __future__ import annotations

import pytest

from gemel_engine.evidence.comparison import arguments
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.pool import WEIGHTS as WEIGHTS_OF_SOURCES
from gemel_engine.evidence.weights import ScoreWeights

pytestmark = pytest.mark.unit

WEIGHTS = ScoreWeights(
    features={"form_prior": 0.5, "likeness": 2.0, "similar_text": 4.0}, language_model=0.3, risks=(), fitted_on={}
)


def test_each_difference_is_said_with_what_it_adds() -> None:
    reasons = [{"form": 12.0, "text_name": 0.3}, {"text_name": 0.5}]
    pool = {"Q1": ("Paris", reasons[0]), "Q2": ("Lyon", reasons[1])}
    found = arguments("Paris", pool, ["Q1", "Q2"], [-2.3, -1.0], WEIGHTS)
    assert {item.words for item in found} == {
        "of the training mentions of this form 12 mean the first, 0 the second",
        "the name of the first is more like the form",
        "the name of the second means more nearly what the text says",
        "the language model prefers the second by 1.3 nats",
    }
    bonuses = WEIGHTS.bonuses("Paris", ["Paris", "Lyon"], reasons)
    assert sum(item.difference for item in found) == pytest.approx(bonuses[0] - bonuses[1] + 0.3 * (-2.3 + 1.0))
    sizes = [abs(item.difference) for item in found]
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_not_known_is_not_said() -> None:
    found = arguments("Paris", {"Q1": ("Paris", {"form": 1.0})}, ["Q1", "Q2"], [-2.3, None], WEIGHTS)
    assert any("1 mean the first, 0 the second" in item.words for item in found)
    assert not any("language model" in item.words for item in found)


def test_every_feature_has_words() -> None:
    everything = ScoreWeights(features=dict.fromkeys(FEATURES, 1.0), language_model=1.0, risks=(), fitted_on={})
    known = dict.fromkeys(WEIGHTS_OF_SOURCES.keys() - {"frequency"}, 1.0)
    pool = {"Q1": ("Paris", known), "Q3": ("Lyon", {"frequency": 1.0})}
    found = arguments("Paris", pool, ["Q1", "Q2"], [None, None], everything)
    assert len(found) == len(FEATURES)
    assert all(item.difference > 0 and "the first" in item.words for item in found)

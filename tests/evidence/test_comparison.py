"""Why one entity has a higher score than another, in words."""

from __future__ import annotations

import numpy as np
import pytest

from gemel_engine.evidence.comparison import arguments
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.weights import ScoreWeights

pytestmark = pytest.mark.unit

WEIGHTS = ScoreWeights(
    features={"form_prior": 0.5, "likeness": 2.0, "similar_text": 4.0}, language_model=0.3, risks=(), fitted_on={}
)


def test_each_difference_is_said_with_what_it_adds() -> None:
    reasons = [{"form": 12.0, "text_name": 0.3}, {"text_name": 0.5}]
    found = arguments("Paris", ["Paris", "Lyon"], reasons, [-2.3, -1.0], WEIGHTS)
    assert [item.words for item in found] == [
        "of the training mentions of this form 12 mean the first, 0 the second",
        "the name of the first is more like the form",
        "the second means more nearly what the text says",
        "the language model prefers the second by 1.3 nats",
    ]
    bonuses = WEIGHTS.bonuses("Paris", ["Paris", "Lyon"], reasons)
    assert sum(item.difference for item in found) == pytest.approx(bonuses[0] - bonuses[1] + 0.3 * (-2.3 + 1.0))


def test_what_is_not_known_is_not_said() -> None:
    found = [item.words for item in arguments("Paris", ["Paris", "Paris"], [{"form": 1.0}, {}], [-2.3, None], WEIGHTS)]
    assert any("1 mean the first, 0 the second" in words for words in found)
    assert not any("language model" in words for words in found)


def test_every_feature_has_words() -> None:
    everything = ScoreWeights(features=dict.fromkeys(FEATURES, 1.0), language_model=1.0, risks=(), fitted_on={})
    sources = ("form", "alias", "base_name", "initials", "similar_name", "text_name", "popularity", "picture")
    found = arguments("Paris", ["Paris", "Lyon"], [dict.fromkeys(sources, 1.0), {}], [None, None], everything)
    assert len(found) == len(FEATURES)
    assert np.all([item.difference > 0 for item in found])
    assert all("the first" in item.words for item in found)

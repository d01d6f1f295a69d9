"""The reasons of the candidate pool in words."""

from __future__ import annotations

import pytest

from gemel_engine.evidence.pool import WEIGHTS
from gemel_engine.evidence.reasons import in_words

pytestmark = pytest.mark.unit


def test_each_source_has_words_of_its_own() -> None:
    phrases = in_words(dict.fromkeys(WEIGHTS, 1.0))
    assert len(set(phrases)) == len(WEIGHTS)
    assert not [phrase for source, phrase in zip(WEIGHTS, phrases, strict=True) if phrase == f"{source} 1.00"]


def test_reasons_have_their_numbers_and_their_order() -> None:
    reasons = {"form": 3.0, "name": 0.5, "alias": 1.0, "similar_name": 0.834, "picture": 0.7, "popularity": 1234.0}
    assert in_words(reasons) == [
        "training mentions of this form: 3",
        "equal name but for the last s",
        "equal alias",
        "similar name 0.83",
        "similar picture 0.70",
        "popularity 1234",
    ]
    assert in_words({"picture": -0.0001}) == ["similar picture 0.00"]
    assert in_words({"a later source": 0.5}) == ["a later source 0.50"]

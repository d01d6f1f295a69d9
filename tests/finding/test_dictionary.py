"""Mentions by a dictionary of forms."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tables import make_tokenizer

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.config.finding import FindConfig
from gemel_engine.errors import ArtifactError
from gemel_engine.finding.dictionary import DictionaryFinder, TrainingText, lower_case_words
from gemel_engine.finding.finders import build_dictionary
from gemel_engine.knowledge_base.build import build_knowledge_base

pytestmark = pytest.mark.unit


def make_finder(
    directory: Path, forms: Sequence[str], training: Sequence[TrainingText] = (), **settings: Any
) -> DictionaryFinder:
    words = lower_case_words(["a may the rice it of", *(item.text for item in training)])
    return DictionaryFinder.build(
        directory, forms, words, training, **{"min_prior": 0.5, "ignores_case": True} | settings
    )


def found(finder: DictionaryFinder, text: str) -> list[str]:
    ((*spans,),) = finder.find([text])
    return [text[span.start : span.stop] for span in spans]


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("New York Times and New Yorkers", ["New York Times"]),
        ("In New York.", ["New York"]),
        ("York Times Square", ["York", "Times Square"]),
        ("Yorkshire, Zoé's house", ["Zoé"]),
        ("O’Neill met O'Neill", ["O’Neill", "O'Neill"]),
        ("Paris 2008 in rice fields of Rice", ["Paris", "Rice"]),
        ("May I? May it be, said Theresa May.", ["May"]),
        ("NEW YORK, new york", ["NEW YORK"]),
        ("A plan of the X", []),
        ("東京タワーと東京", ["東京タワー", "東京"]),
        ("", []),
    ],
)
def test_the_longest_form_of_whole_words_is_found_from_the_left(text: str, mentions: list[str], tmp_path: Path) -> None:
    forms = ["New York", "New York Times", "York", "Times Square", "O'Neill", "Zoé", "Paris", "2008", "Rice"]
    finder = make_finder(tmp_path, [*forms, "May", "The", "A", "X", "東京", "東京タワー", "京", " ", "x" * 300])
    assert found(finder, text) == mentions


def test_a_build_holds_no_list_of_all_forms(tmp_path: Path) -> None:
    forms = [f"form {number}" for number in range(20_000)]
    tracemalloc.start()
    try:
        assert len(make_finder(tmp_path, forms)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 50 * len(forms)
    finally:
        tracemalloc.stop()


def test_case_is_by_setting(tmp_path: Path) -> None:
    finder = make_finder(tmp_path, ["NATO"], ignores_case=False)
    assert found(finder, "NATO, Nato") == ["NATO"]


def test_training_teaches_which_forms_are_mentions(tmp_path: Path) -> None:
    texts = [
        TrainingText("A flag in Paris, a flag in Rome.", frozenset({"flag", "Paris", "Rome"})),
        TrainingText("The Bay of Rome: a photo.", frozenset({"Rome"})),
        TrainingText("The Bay and a photo of a reactor.", frozenset({"reactor"})),
    ]
    finder = make_finder(tmp_path, ["Bay", "Photo", "Oslo", "Bay of Rome"], texts)
    assert found(finder, "A flag on the Bay of Oslo, a photo.") == ["flag", "Oslo"]
    assert len(finder) == len({"bay", "photo", "oslo", "bay of rome", "flag", "paris", "rome", "reactor"})


def test_an_occurrence_in_a_longer_mention_does_not_count_against_a_form(tmp_path: Path) -> None:
    texts = [TrainingText("New York City", frozenset({"New York City"}))] * 5
    assert found(make_finder(tmp_path, ["New York"], texts), "In New York") == ["New York"]


def test_a_dictionary_is_made_of_no_damaged_knowledge_base(tmp_path: Path) -> None:
    entities = pa.table({"entity_id": ["Q1"], "name": ["Bear"], "description": ["an animal"]})
    build_knowledge_base(entities, make_tokenizer(), tmp_path / "kb", KnowledgeBaseSettings())
    path = tmp_path / "kb/entities.arrow"
    path.write_bytes(path.read_bytes().replace(b"an animal", b"a mineral"))
    with pytest.raises(ArtifactError, match="damaged"):
        build_dictionary(FindConfig(input="none", output="none", knowledge_base=str(tmp_path / "kb")), tmp_path)


@given(st.lists(st.text("ab 東.", min_size=1, max_size=4), max_size=6), st.text("abAB 東.", max_size=20))
def test_mentions_are_whole_forms_and_do_not_overlap(
    tmp_path_factory: pytest.TempPathFactory, forms: list[str], text: str
) -> None:
    finder = make_finder(tmp_path_factory.mktemp("forms"), forms, min_prior=0.0)
    ((*spans,),) = finder.find([text])
    assert all(text[span.start : span.stop].lower() in {form.strip() for form in forms} for span in spans)
    assert all(first.stop <= second.start for first, second in pairwise(spans))

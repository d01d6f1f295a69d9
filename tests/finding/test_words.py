"""Where words begin and end, and spellings that keep their offsets."""

from __future__ import annotations

import pytest

from gemel_engine.finding.words import begins_sentence, folded, word_boundaries

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("text", ["Straße İstanbul", "O’Neill – Zoé", "ΟΔΟΣ\u00a0ΟΔΟΣ", "東京 ﬁ"])
@pytest.mark.parametrize("ignores_case", [False, True])
def test_folding_keeps_the_length(text: str, ignores_case: bool) -> None:
    assert len(folded(text, ignores_case=ignores_case)) == len(text)


def test_folding_makes_spellings_equal() -> None:
    assert folded("O’Neill\nX‑Ray", ignores_case=False) == "O'Neill X-Ray"
    assert folded("ΟΔΟΣ", ignores_case=True) == folded("οδος", ignores_case=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a bc.", "|a| |bc|.|"),
        ("東京は", "|東|京|は|"),
        ("東京Tower2", "|東|京|Tower2|"),
        ("กินข้าว", "|กิ|น|ข้|า|ว|"),
        ("हिन्दी है", "|हिन्दी| |है|"),
        ("", "|"),
    ],
)
def test_words_end_in_any_script(text: str, words: str) -> None:
    parts = zip(word_boundaries(text), [*text, ""], strict=True)
    assert "".join(f"{'|' if is_boundary else ''}{character}" for is_boundary, character in parts) == words


def test_sentences_begin_after_their_end_and_at_the_beginning() -> None:
    text = 'It is. "May is late", said May.'
    assert [begins_sentence(text, start) for start in (0, 3, 8, 27)] == [True, False, True, False]

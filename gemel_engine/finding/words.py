"""Words of a text: where they begin and end in any script, and spellings that keep their offsets."""

from __future__ import annotations

import re
import unicodedata
from enum import IntEnum, auto
from functools import lru_cache

_TYPOGRAPHY = str.maketrans("’‘ʼ´`–‐‑\u00a0\u202f\n\r\tς", "'''''---     σ")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_SENTENCE_ENDS = frozenset(".!?…:;\n。！？")


class _Kind(IntEnum):
    """Kind of a character: part of a spaced word, of a script without spaces, a mark, or another."""

    OTHER = auto()
    WORD = auto()
    UNSPACED = auto()
    MARK = auto()


def folded(text: str, *, ignores_case: bool) -> str:
    """Return a text of the same length, with plain apostrophes, hyphens and spaces.

    Args:
        text: The text.
        ignores_case: Whether to return it in lower case, but for letters that become longer then.
    """
    if ignores_case:
        lower = text.lower()
        text = lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return text.translate(_TYPOGRAPHY)


def word_boundaries(text: str) -> list[bool]:
    """Return whether a word may begin or end before each character, and at the end of the text.

    In scripts without spaces between words, such as Chinese, Japanese and Thai, this is everywhere
    but before a combining mark.
    """
    found, before = [], _Kind.OTHER
    for character in text:
        kind = _kind(character)
        found.append(kind is not _Kind.MARK and not (kind is before is _Kind.WORD))
        if kind is not _Kind.MARK:  # which belongs to what is before it
            before = kind
    return [*found, True]


def begins_sentence(text: str, start: int) -> bool:
    """Return whether nothing but the end of a sentence, and no letter or digit, is before an offset."""
    for character in reversed(text[:start]):
        if character.isalnum():
            return False
        if character in _SENTENCE_ENDS:
            return True
    return True


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> _Kind:
    if unicodedata.category(character).startswith("M"):
        return _Kind.MARK
    if _UNSPACED.match(character):
        return _Kind.UNSPACED
    return _Kind.WORD if character.isalnum() or character == "_" else _Kind.OTHER

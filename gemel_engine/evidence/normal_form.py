"""Normalise the spelling of names and surface forms for comparison."""

from __future__ import annotations

import re
import unicodedata

from gemel_engine.display import without_unseen

_INITIAL = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b)")
_APOSTROPHES = re.compile("['’ʼ`´]")
_ASCII_WORD = re.compile(r"[^\W_]+")
_QUALIFIER = re.compile(r"\s*\([^()]*\)\s*$|,\s.*$", re.DOTALL)
_FIRST_INDIC = "\u0900"  # from here on marks are vowels and voices of consonants, below points and accents
_ACCENT = 200  # combining class of the first kind of marks that stand around a letter, not in it


def normal_form(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces, without accents.

    Characters without width are removed, those that join others too. Marks that are vowels or tell
    consonants apart, as in Indic and Japanese scripts, stay. Punctuation becomes a space;
    apostrophes and dots between initials are removed: "O'Neill" becomes "oneill", "F.C." becomes
    "fc". A text without letters and digits, such as "€", stays as it is.
    """
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", without_unseen(text, also_joining=True))
        text = unicodedata.normalize("NFC", "".join(filter(_is_no_accent, decomposed)))
    joined = _APOSTROPHES.sub("", _INITIAL.sub(r"\1", text.casefold()))
    words = _ASCII_WORD.findall(joined) if joined.isascii() else _words(joined)
    return " ".join(words) or joined.strip()


def _is_no_accent(character: str) -> bool:
    order = unicodedata.combining(character)
    return not order or (order < _ACCENT and character >= _FIRST_INDIC)


def _words(text: str) -> list[str]:
    """Return the words of a text: letters and digits, with the marks behind them."""
    kept = [" "]
    for character in text:
        is_mark = kept[-1] != " " and unicodedata.category(character).startswith("M")
        kept.append(character if is_mark or character.isalnum() else " ")
    return "".join(kept).split()


def without_qualifier(name: str) -> str:
    """Return a name without its qualifier: a last part in brackets, or all from a comma on."""
    return _QUALIFIER.sub("", name) or name

"""Names and surface forms in one spelling, so that they can be compared."""

from __future__ import annotations

import re
import unicodedata

_INITIAL = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b)")
_APOSTROPHES = re.compile("['’ʼ`´]")
_WORD = re.compile(r"[^\W_]+")
_QUALIFIER = re.compile(r"\s*\([^()]*\)\s*$|,\s.*$", re.DOTALL)


def normal_form(text: str) -> str:
    """Return the words of a text in lower case, without accents and punctuation, one space between them.

    Apostrophes and the dots between initials join what they separate: "O'Neill" is "oneill", "F.C." is "fc".
    """
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", text)
        text = "".join(character for character in decomposed if not unicodedata.combining(character))
    joined = _APOSTROPHES.sub("", _INITIAL.sub(r"\1", text.casefold()))
    return " ".join(_WORD.findall(joined))


def without_qualifier(name: str) -> str:
    """Return a name without what only tells it from its namesakes: a last part in brackets, or behind a comma."""
    return _QUALIFIER.sub("", name) or name

"""Normalise the spelling of names and surface forms for comparison."""

from __future__ import annotations

import re
import unicodedata

from gemel_engine.display import without_unseen

_INITIAL = re.compile(r"\b([^\W\d_])\.(?=[^\W\d_]\b)")
_APOSTROPHES = re.compile("['’ʼ`´]")
_WORD = re.compile(r"[^\W_]+")
_QUALIFIER = re.compile(r"\s*\([^()]*\)\s*$|,\s.*$", re.DOTALL)


def normal_form(text: str) -> str:
    """Return the words of a text in lower case, separated by spaces, without accents.

    Characters without width are removed, those that join others too.
    Punctuation becomes a space; apostrophes and dots between initials are removed: "O'Neill"
    becomes "oneill", "F.C." becomes "fc".
    """
    if not text.isascii():
        decomposed = unicodedata.normalize("NFKD", without_unseen(text, also_joining=True))
        text = "".join(character for character in decomposed if not unicodedata.combining(character))
    joined = _APOSTROPHES.sub("", _INITIAL.sub(r"\1", text.casefold()))
    return " ".join(_WORD.findall(joined))


def without_qualifier(name: str) -> str:
    """Return a name without its qualifier: a last part in brackets, or all from a comma on."""
    return _QUALIFIER.sub("", name) or name

"""Cuts the surroundings of a surface form out of a long text."""

from __future__ import annotations

import re
import unicodedata

_LONGEST_WORD = 40  # in a text without white space for so many characters, words are not looked for
_SPACE = re.compile(r"\s")


def place_of(text: str, surface_form: str, start: int | None) -> tuple[int, int]:
    """Return first place and end of a surface form: at `start`, or else where it first occurs.

    Both are 0 if the text does not contain it.
    """
    if start is None or not text.startswith(surface_form, start):
        start = text.find(surface_form)
    return (0, 0) if start < 0 else (start, start + len(surface_form))


def first_near(place: int, num_items: int, num_kept: int) -> int:
    """Return the first of the `num_kept` items nearest to a place; 0 if there are no more than that."""
    return max(0, min(place - num_kept // 2, num_items - num_kept))


def window(text: str, start: int, end: int, num_characters: int) -> str:
    """Return `text[start:end]` with as much text around it as fits into `num_characters`.

    Both sides get the same number of characters, unless one side has fewer. The text is cut at white
    space where there is some nearby, and never within a character and its accents.
    """
    room = max(0, num_characters - (end - start))
    before = min(start, max(room // 2, room - (len(text) - end)))
    first, last = start - before, min(len(text), end + room - before)
    left, right = text[first:start], text[end:last]
    if first and not text[first - 1].isspace():
        found = _SPACE.search(left, 0, _LONGEST_WORD)
        left = left[found.end() if found else 0 :]
        while left and unicodedata.combining(left[0]):
            left = left[1:]
    if last < len(text) and not text[last].isspace():
        spaces = list(_SPACE.finditer(right, max(0, len(right) - _LONGEST_WORD)))
        right = right[: spaces[-1].start() if spaces else len(right)]
        while right and not spaces and unicodedata.combining(text[end + len(right)]):
            right = right[:-1]
    return left.lstrip() + text[start:end] + right.rstrip()

"""Text for people, in a browser or a terminal: safe display of untrusted text, shares, excerpts."""

from __future__ import annotations

import logging
import math
import re
import textwrap
import traceback
from collections.abc import Mapping, Sequence

from gemel_engine.errors import redacted

ELLIPSIS = "…"
_REPLACEMENT = 0xFFFD
# Unicode's Default_Ignorable_Code_Point, line and paragraph separators, and annotations: invisible
# characters that may reorder, hide or contain other text.
_UNSEEN = (
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), *range(0x200B, 0x2010)),
    *(*range(0x2028, 0x202F), *range(0x2060, 0x2070), 0x3164, *range(0xFE00, 0xFE0E), 0xFEFF, 0xFFA0),
    *(*range(0xFFF0, 0xFFFC), *range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000)),
)
_SIGNS: dict[int, int | str] = (
    {code: 0x2400 + code for code in range(32)}  # Unicode's pictures of control characters
    | {127: 0x2421}
    | dict.fromkeys([*range(128, 160), *range(0xD800, 0xE000)], _REPLACEMENT)
    | {code: f"‹U+{code:04X}›" for code in _UNSEEN}
)
_SIGNS_IN_LINES = {code: sign for code, sign in _SIGNS.items() if chr(code) not in "\n\t"}
# A variation selector makes the symbol before it text or emoji. Elsewhere it is invisible and gets
# replaced, too.
_LOOSE_SELECTOR = re.compile("(?<![#*0-9©®‼-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]")


def visible(text: str, *, lines: bool = False) -> str:
    """Replace characters that are invisible, or that affect a terminal or the text around them.

    These are control characters, lone surrogates, direction marks and zero-width characters, each
    replaced by a visible sign. All messages and all displayed text of a corpus or an artifact pass
    through this function.

    Args:
        text: Untrusted text.
        lines: Whether to keep newlines and tabs. Use it only where a reader cannot take a line of
            the text for a line of the program.
    """
    text = text.translate(_SIGNS_IN_LINES if lines else _SIGNS)
    return _LOOSE_SELECTOR.sub(lambda selector: f"‹U+{ord(selector[0]):04X}›", text)


# Invisible characters that change nothing about the characters beside them.
_IDLE = "\u00ad\u034f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb"
# Joiners, selectors, fillers and tags: they change the character before them, but only in scripts from
# Hebrew on, and in emoji.
_JOINING = (
    "\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200c\u200d\u3164\ufe00-\ufe0f\uffa0"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
UNSEEN = f"[{_IDLE}{_JOINING}]"  # a regular expression of what `without_unseen` looks at
_ANY_IDLE, _ANY_JOINING = re.compile(f"[{_IDLE}]+"), re.compile(f"[{_JOINING}]+")
_LOOSE_JOINING = re.compile(f"(?<![\u0590-\U0010ffff#*0-9©®])[{_JOINING}]+")


def without_unseen(text: str, *, also_joining: bool = False) -> str:
    """Remove characters without width, by which two equal-looking texts differ.

    Those that shape the character before them (joiners, selectors of emoji) are kept there.

    Args:
        text: Text.
        also_joining: Whether to remove these, too, for a comparison.
    """
    if text.isascii():
        return text
    return (_ANY_JOINING if also_joining else _LOOSE_JOINING).sub("", _ANY_IDLE.sub("", text))


def visible_traceback(error: BaseException) -> str:
    """Format an error with its traceback, without secrets, and so that no line looks like a log line."""
    lines = redacted("".join(traceback.format_exception(error)))
    return textwrap.indent(visible(lines, lines=True).rstrip(), "  ")


def make_visible(record: logging.LogRecord) -> bool:
    """Rewrite a log record with `visible`, as one line plus traceback; a filter for a handler or logger."""
    record.msg, record.args = visible(record.getMessage()), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = visible_traceback(record.exc_info[1])
    return True


def cut(text: str, length: int) -> str:
    """Return a text shortened to at most `length` characters, with an ellipsis if it was longer."""
    return text if len(text) <= length else text[: length - 1] + ELLIPSIS


def on_one_line(text: str, length: int) -> str:
    """Return a text with single spaces between its words, shortened as `cut` does."""
    return cut(" ".join(text[: 4 * length].split()), length)


def excerpt(text: str, surface_form: str, start: int | None, context: int) -> tuple[str, str, str]:
    """Return the text before a surface form, the surface form, and the text after it.

    If the surface form is not in the text, return the beginning of the text and two empty strings.

    Args:
        text: Whole text.
        surface_form: Surface form.
        start: Character offset of the surface form; if it is None or wrong, the first occurrence is
            used.
        context: Maximum number of characters of each part, at least 1.
    """
    if start is None or start < 0 or not text.startswith(surface_form, start):
        start = text.find(surface_form)
    if start < 0 or not surface_form:
        return cut(text, 2 * context), "", ""
    before, after = text[:start], text[start + len(surface_form) :]
    if len(before) > context:
        before = ELLIPSIS + before[1 - context :] if context > 1 else ELLIPSIS
    return before, cut(surface_form, context), cut(after, context)


def percent(share: float | None, nothing: str = "-") -> str:
    """Format a share as a percentage with one decimal; return `nothing` for None."""
    return nothing if share is None else f"{100 * share:.1f}%"


def counts(numbers: Mapping[str, int]) -> str:
    """Format numbers by what they count, as in `3 image_fetch, 1 poison`."""
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items())


def shares(probability: float | None, log_probs: Sequence[float | None]) -> list[float]:
    """Return a lower bound of each name's share of the probability of all names.

    Args:
        probability: Share of the first name; None means 0.
        log_probs: Log-probabilities of the names in nats; None if the model was not asked.
    """
    if not probability or log_probs[0] is None:
        return [0.0] * len(log_probs)
    log_mass = log_probs[0] - math.log(probability)
    return [0.0 if log_prob is None else math.exp(min(0.0, log_prob - log_mass)) for log_prob in log_probs]

"""What is shown to a person, in a browser or a terminal: untrusted text without surprises, shares of probability."""

from __future__ import annotations

import logging
import math
import re
import textwrap
import traceback
from collections.abc import Sequence

ELLIPSIS = "…"
_REPLACEMENT = 0xFFFD
# Unicode's Default_Ignorable_Code_Point, separators of lines and paragraphs, and annotations: what shows nothing
# itself, but may turn, hide or carry other text.
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
# Whether a symbol is drawn as text or as emoji is for the character behind it to say; elsewhere that is unseen, too.
_LOOSE_SELECTOR = re.compile("(?<![#*0-9©®‼-\u3299\U0001f000-\U0001faff])[\ufe0e\ufe0f]")


def visible(text: str, *, lines: bool = False) -> str:
    """Put a sign in place of every character that is unseen, or that acts on a terminal or on the text around it.

    They are control characters, lone surrogates, marks of direction, and characters without width. Every message and
    whatever else is shown of a corpus or an artifact passes this function.

    Args:
        text: Untrusted text.
        lines: Leave newlines and tabs: where a line that is forged by the text is taken for the text's own.
    """
    text = text.translate(_SIGNS_IN_LINES if lines else _SIGNS)
    return _LOOSE_SELECTOR.sub(lambda selector: f"‹U+{ord(selector[0]):04X}›", text)


def visible_traceback(error: BaseException) -> str:
    """Format an error with its traceback, indented, so that no line of its message is taken for a line of the log."""
    return textwrap.indent(visible("".join(traceback.format_exception(error)), lines=True).rstrip(), "  ")


def make_visible(record: logging.LogRecord) -> bool:
    """Rewrite a log record so that all of it is seen, on one line but for its traceback: a filter for a handler."""
    record.msg, record.args = visible(record.getMessage()), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = visible_traceback(record.exc_info[1])
    return True


def cut(text: str, length: int) -> str:
    """The beginning of a text, of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + ELLIPSIS


def excerpt(text: str, surface_form: str, start: int | None, context: int) -> tuple[str, str, str]:
    """What stands before a surface form, the surface form itself, and what follows; each cut to `context` characters.

    Args:
        text: The whole text.
        surface_form: Where it is not in the text, the text's beginning comes back alone.
        start: Its character offset; if it is not there, its first occurrence counts.
        context: At least 1.
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
    """A share with one decimal; `nothing` where there is none."""
    return nothing if share is None else f"{100 * share:.1f}%"


def shares(probability: float | None, log_probs: Sequence[float]) -> list[float]:
    """Share of each name in the probability of all names, as a lower bound.

    Args:
        probability: That of the first; None stands for 0.
        log_probs: Of the names, in nats.
    """
    if not probability:
        return [0.0] * len(log_probs)
    log_mass = log_probs[0] - math.log(probability)
    return [math.exp(min(0.0, log_prob - log_mass)) for log_prob in log_probs]

"""What is shown to a person, in a browser or a terminal: untrusted text without surprises, shares of probability."""

from __future__ import annotations

import math
from collections.abc import Sequence

ELLIPSIS = "…"
_REPLACEMENT = 0xFFFD
_SIGNS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # Unicode's pictures of control characters
    | {127: 0x2421}
    | dict.fromkeys([*range(128, 160), *range(0xD800, 0xE000)], _REPLACEMENT)
)


def visible(text: str) -> str:
    """Put a sign in place of every control character and lone surrogate; only newlines and tabs stay."""
    return text.translate(_SIGNS)


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

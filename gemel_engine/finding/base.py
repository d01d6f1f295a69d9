"""What finders of mentions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Span(NamedTuple):
    """Place of a mention in a text, as character offsets.

    Attributes:
        start: First character.
        stop: Character after the last.
    """

    start: int
    stop: int


class MentionFinder(Protocol):
    """Finds mentions in texts."""

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the mentions of each text, in their order, none of which overlap."""
        ...

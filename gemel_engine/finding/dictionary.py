"""Finds mentions by a dictionary of known forms: names, aliases and forms of training mentions.

    forms.marisa    the forms, as a memory-mapped trie (marisa-trie)
    accepted.npy    for each form and kind of occurrence, whether such matches are mentions
    ordinary.npy    for each form, whether it is a word that is also written in lower case

A form matches whole words. Of the matches at a place the longest is taken, and the search goes on
after it: no two mentions overlap, and the first of two overlapping matches wins.

Not every match is a mention. Its prior is the share of such occurrences of the form in the training
texts that are mentions, as if one further occurrence had the share of all forms of that
kind. There are three kinds of occurrence (`Occurrence`): a name without training is expected to be
a mention if it is written as a name, and no mention otherwise.

Shapes: F forms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from pathlib import Path
from typing import Self

import marisa_trie
import numpy as np
from numpy.typing import NDArray

from gemel_engine.finding.base import Span
from gemel_engine.finding.words import begins_sentence, folded, word_boundaries

FORMAT_VERSION = 1
_MAX_CHARACTERS = 200  # of a form
_WEIGHT = 1.0
_WORD = re.compile(r"[^\W\d_]+")

Counts = Counter[tuple[int, "Occurrence"]]


class Occurrence(IntEnum):
    """How a form is written in a text.

    NAME: with a capital letter, or in a script without capitals.
    FIRST: an ordinary word, with the capital letter that begins a sentence.
    LOWER: without a capital letter, or a single character.
    """

    NAME = 0
    FIRST = 1
    LOWER = 2


# Expected share of mentions of each kind of occurrence without training texts.
_UNTRAINED = {Occurrence.NAME: 1.0, Occurrence.FIRST: 0.0, Occurrence.LOWER: 0.0}


@dataclass(frozen=True, slots=True)
class TrainingText:
    """A text whose mentions are known.

    Attributes:
        text: The text.
        mentions: Surface forms of its mentions.
    """

    text: str
    mentions: frozenset[str]


class DictionaryFinder:
    """Finds mentions by a dictionary of forms; the module's docstring has its rules."""

    def __init__(
        self, forms: marisa_trie.Trie, accepted: NDArray[np.bool_], ordinary: NDArray[np.bool_], *, ignores_case: bool
    ) -> None:
        self._forms, self._accepted, self._ordinary = forms, accepted, ordinary
        self._ignores_case = ignores_case

    @classmethod
    def build(
        cls,
        directory: Path,
        forms: Iterable[str],
        ordinary_words: Iterable[str],
        training: Sequence[TrainingText] = (),
        *,
        min_prior: float,
        ignores_case: bool,
    ) -> Self:
        """Write a dictionary and open it.

        Args:
            directory: Output directory.
            forms: Names and aliases; the forms of training mentions are added.
            ordinary_words: Words that are written in lower case.
            training: Texts whose mentions are known.
            min_prior: Smallest prior of an occurrence that is a mention.
            ignores_case: Whether a form is found in any case.
        """
        known = (form for text in training for form in text.mentions)
        keys = (folded(form.strip(), ignores_case=ignores_case) for form in chain(forms, known))
        trie = marisa_trie.Trie(key for key in keys if 0 < len(key) <= _MAX_CHARACTERS)
        ordinary = np.zeros(len(trie), bool)
        words = {word.casefold() for word in ordinary_words}
        for key, number in trie.iteritems():
            ordinary[number] = key.casefold() in words
        everything = np.ones((len(trie), len(Occurrence)), bool)
        unfiltered = cls(trie, everything, ordinary, ignores_case=ignores_case)
        accepted = unfiltered._accepted_kinds(training, min_prior)
        trie.save(str(directory / "forms.marisa"))
        np.save(directory / "accepted.npy", accepted)
        np.save(directory / "ordinary.npy", ordinary)
        return cls.open(directory, ignores_case=ignores_case)

    @classmethod
    def open(cls, directory: Path, *, ignores_case: bool) -> Self:
        """Map what `build` wrote, with the same `ignores_case`."""
        forms = marisa_trie.Trie().mmap(str(directory / "forms.marisa"))
        accepted = np.load(directory / "accepted.npy", mmap_mode="r", allow_pickle=False)
        ordinary = np.load(directory / "ordinary.npy", mmap_mode="r", allow_pickle=False)
        return cls(forms, accepted, ordinary, ignores_case=ignores_case)

    def __len__(self) -> int:
        return len(self._forms)

    def find(self, texts: Sequence[str]) -> list[list[Span]]:
        """Return the mentions of each text."""
        return [list(self._mentions(text)) for text in texts]

    def _mentions(self, text: str) -> Iterator[Span]:
        end = 0
        for start, matches in self._matches(text):
            if start < end:
                continue
            for stop, number in reversed(matches):
                if self._accepted[number, self._kind_of(text, start, stop, number)]:
                    yield Span(start, stop)
                    end = stop
                    break

    def _matches(self, text: str) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Yield each place with matches: its offset, and end and number of each, by length."""
        searched, may_begin = folded(text, ignores_case=self._ignores_case), word_boundaries(text)
        for start, character in enumerate(searched):
            if may_begin[start] and character != " ":
                found = self._forms.iter_prefixes_with_ids(searched[start : start + _MAX_CHARACTERS])
                matches = [(start + len(form), number) for form, number in found if may_begin[start + len(form)]]
                if matches:
                    yield start, matches

    def _kind_of(self, text: str, start: int, stop: int, number: int) -> Occurrence:
        written = text[start:stop]
        lower = written.lower()
        if stop - start == 1 or (written == lower and (lower != written.upper() or not any(map(str.isalpha, written)))):
            return Occurrence.LOWER
        is_first = self._ordinary[number] and written[1:] == lower[1:] and begins_sentence(text, start)
        return Occurrence.FIRST if is_first else Occurrence.NAME

    def _accepted_kinds(self, training: Sequence[TrainingText], min_prior: float) -> NDArray[np.bool_]:
        """Return whether the prior of each kind of occurrence of each form is high enough (F, 3)."""
        seen, linked = self._count(training)
        shares = dict(_UNTRAINED)
        for kind in Occurrence:
            if num_seen := sum(count for (_, other), count in seen.items() if other is kind):
                shares[kind] = sum(count for (_, other), count in linked.items() if other is kind) / num_seen
        accepted = np.tile([shares[kind] >= min_prior for kind in Occurrence], (len(self), 1))
        for (number, kind), count in seen.items():
            prior = (linked[number, kind] + _WEIGHT * shares[kind]) / (count + _WEIGHT)
            accepted[number, kind] = prior >= min_prior
        return accepted

    def _count(self, training: Sequence[TrainingText]) -> tuple[Counts, Counts]:
        """Count the occurrences of each form, and those that are mentions; none within a longer mention."""
        seen: Counts = Counter()
        linked: Counts = Counter()
        for item in training:
            matches = [(start, stop, number) for start, found in self._matches(item.text) for stop, number in found]
            mentions = {(start, stop) for start, stop, _ in matches if item.text[start:stop] in item.mentions}
            for start, stop, number in matches:
                is_mention = (start, stop) in mentions
                if not is_mention and any(first <= start and stop <= last for first, last in mentions):
                    continue
                form = number, self._kind_of(item.text, start, stop, number)
                seen[form] += 1
                linked[form] += is_mention
        return seen, linked


def lower_case_words(texts: Iterable[str]) -> set[str]:
    """Return the words that a text writes in lower case."""
    return {word for text in texts for word in _WORD.findall(text) if word == word.lower() != word.upper()}

"""Packs training prompts into one sequence that contains their common beginnings once.

Mentions with equal surface forms share most of their demonstrations, and a demonstration's keys and
values depend only on the tokens before it. So the prompts of a batch form a tree of segments: each
token sees the tokens before it in its own segment and in the segments above, at the position that
it has in its own prompt. Losses and gradients are those of the separate prompts.

Shapes: T tokens, N segments, M pictures, P prefix length, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gemel_engine.decoding.prompt import VISUAL_PLACEHOLDER

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a prompt, after the visual prefix of their picture.

    Attributes:
        token_ids: The tokens.
        picture: Number of the picture; None without one.
    """

    token_ids: tuple[int, ...]
    picture: int | None = None

    def num_positions(self, prefix_length: int) -> int:
        """Return the length in a prompt, the visual prefix included."""
        return len(self.token_ids) + (0 if self.picture is None else prefix_length)


class SegmentKey(NamedTuple):
    """A demonstration or a card in a prompt.

    Attributes:
        row: Row of the demonstration index, or of the knowledge base for a card.
        is_card: Whether it is a card.
        surface_form: Surface form that a card is made for; empty for a demonstration.
    """

    row: int
    is_card: bool = False
    surface_form: str = ""


class LabelledPrompt(NamedTuple):
    """A question after its demonstrations, with the answer to learn.

    Attributes:
        demonstrations: Keys of demonstrations and cards, in the order of the prompt.
        question: The mention's own segment.
        target: Tokens of the entity's name, and the terminator.
    """

    demonstrations: tuple[SegmentKey, ...]
    question: Segment
    target: tuple[int, ...]


class Stretch(NamedTuple):
    """Segments of a packed sequence that follow each other down the tree without a branch.

    Attributes:
        length: Number of tokens of all these segments.
        sees: Numbers of the stretches above, from the top, and last its own. Its tokens see all
            tokens of the others, and of their own those before them.
    """

    length: int
    sees: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedPrompts:
    """A tree of segments as one sequence.

    Attributes:
        token_ids: (T,), `VISUAL_PLACEHOLDER` at positions of a visual prefix.
        position_ids: (T,), each token's position in its own prompt.
        segment_ids: (T,), the number of each token's segment, ascending.
        is_above: (N, N), whether the tokens of segment i see those of segment j: itself, or one
            above it.
        pictures: (M,), numbers of the pictures, in the order of their positions.
        picture_positions: (M, P), positions of their visual prefixes.
        label_positions: (L,), positions of tokens whose successor is to be learnt.
        labels: (L,), ids of the successors.
    """

    token_ids: Indices
    position_ids: Indices
    segment_ids: Indices
    is_above: NDArray[np.bool_]
    pictures: Indices
    picture_positions: Indices
    label_positions: Indices
    labels: Indices

    def mask(self) -> NDArray[np.bool_]:
        """Return (T, T), whether the token of a row sees that of a column."""
        return np.tril(self.is_above[self.segment_ids][:, self.segment_ids])

    def stretches(self) -> list[Stretch]:
        """Return the stretches of the sequence, in its order."""
        lengths = np.bincount(self.segment_ids, minlength=len(self.is_above)).tolist()
        parents = [int(above[:number].nonzero()[0].max(initial=-1)) for number, above in enumerate(self.is_above)]
        num_children = Counter(parents)
        stretches: list[Stretch] = []
        stretch_of: list[int] = []
        for number, (parent, length) in enumerate(zip(parents, lengths, strict=True)):
            if number and parent == number - 1 and num_children[parent] == 1:
                stretches[-1] = stretches[-1]._replace(length=stretches[-1].length + length)
            else:
                above = () if parent < 0 else stretches[stretch_of[parent]].sees
                stretches.append(Stretch(length, (*above, len(stretches))))
            stretch_of.append(len(stretches) - 1)
        return stretches


def split_into_packs(
    prompts: Iterable[LabelledPrompt],
    demonstration: Callable[[SegmentKey], Segment],
    prefix_length: int,
    max_tokens: int,
) -> Iterator[list[LabelledPrompt]]:
    """Split prompts into packs of at most `max_tokens`; a longer prompt is a pack of its own.

    Args:
        prompts: Prompts, best in an order in which neighbours share demonstrations.
        demonstration: Function that returns the segment of a demonstration or card.
        prefix_length: P, the number of positions of a visual prefix.
        max_tokens: Largest T of a pack.
    """
    pack: list[LabelledPrompt] = []
    paths: set[tuple[SegmentKey, ...]] = set()
    num_tokens = 0
    for prompt in prompts:
        new = [path for path in _paths(prompt) if path not in paths]
        own = prompt.question.num_positions(prefix_length) + len(prompt.target) - 1
        added = own + sum(demonstration(path[-1]).num_positions(prefix_length) for path in new)
        if pack and num_tokens + added > max_tokens:
            yield pack
            pack, paths, num_tokens = [], set(), 0
            new = list(_paths(prompt))
            added = own + sum(demonstration(path[-1]).num_positions(prefix_length) for path in new)
        pack.append(prompt)
        paths.update(new)
        num_tokens += added
    if pack:
        yield pack


def pack_prompts(
    prompts: Sequence[LabelledPrompt],
    demonstration: Callable[[SegmentKey], Segment],
    prefix_length: int,
    beginning: tuple[int, ...] = (),
) -> PackedPrompts:
    """Pack prompts into one sequence.

    Args:
        prompts: Prompts, at least one.
        demonstration: Function that returns the segment of a demonstration or card.
        prefix_length: P, the number of positions of a visual prefix.
        beginning: Tokens at the start of every prompt.
    """
    layout = _Layout(prefix_length)
    root = layout.add(Segment(beginning), parent=None) if beginning else None
    numbers: dict[tuple[SegmentKey, ...], int | None] = {(): root}
    for prompt in prompts:
        for path in _paths(prompt):
            if path not in numbers:
                numbers[path] = layout.add(demonstration(path[-1]), numbers[path[:-1]])
        layout.add(prompt.question, numbers[prompt.demonstrations], prompt.target)
    return layout.finish()


class _Layout:
    """Builds the packed sequence from segments, each added below an earlier one."""

    def __init__(self, prefix_length: int) -> None:
        self._prefix_length = prefix_length
        self._token_ids: list[int] = []
        self._position_ids: list[int] = []
        self._segment_ids: list[int] = []
        self._ends: list[int] = []  # position after the last token of each segment, in its prompts
        self._above: list[list[int]] = []
        self._pictures: list[int] = []
        self._picture_starts: list[int] = []
        self._label_positions: list[int] = []
        self._labels: list[int] = []

    def add(self, segment: Segment, parent: int | None, target: tuple[int, ...] = ()) -> int:
        """Add a segment below `parent`, followed by its answer; return its number."""
        number = len(self._ends)
        if segment.picture is not None:
            self._pictures.append(segment.picture)
            self._picture_starts.append(len(self._token_ids))
            self._token_ids += [VISUAL_PLACEHOLDER] * self._prefix_length
        self._token_ids += segment.token_ids
        if target:
            first = len(self._token_ids) - 1
            self._label_positions += range(first, first + len(target))
            self._labels += target
            self._token_ids += target[:-1]  # nothing is predicted after the terminator
        start = 0 if parent is None else self._ends[parent]
        length = len(self._token_ids) - len(self._segment_ids)
        self._position_ids += range(start, start + length)
        self._segment_ids += [number] * length
        self._ends.append(start + length)
        self._above.append([number] if parent is None else [*self._above[parent], number])
        return number

    def finish(self) -> PackedPrompts:
        """Return the packed sequence."""
        is_above = np.zeros((len(self._above), len(self._above)), bool)
        for number, above in enumerate(self._above):
            is_above[number, above] = True
        starts = np.array(self._picture_starts, np.int64)
        return PackedPrompts(
            token_ids=np.array(self._token_ids, np.int64),
            position_ids=np.array(self._position_ids, np.int64),
            segment_ids=np.array(self._segment_ids, np.int64),
            is_above=is_above,
            pictures=np.array(self._pictures, np.int64),
            picture_positions=starts[:, None] + np.arange(self._prefix_length),
            label_positions=np.array(self._label_positions, np.int64),
            labels=np.array(self._labels, np.int64),
        )


def _paths(prompt: LabelledPrompt) -> Iterator[tuple[SegmentKey, ...]]:
    """Return the path in the tree to each of a prompt's demonstrations."""
    rows = prompt.demonstrations
    return (rows[: depth + 1] for depth in range(len(rows)))

"""How prompts are laid out as one sequence; that it keeps losses and gradients is shown for every family of models."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.prompts import DEMONSTRATIONS, PROMPTS, P, labelled

from gemel_engine.training.packing import PackedPrompts, Segment, pack_prompts, split_into_packs


def test_a_common_beginning_stands_once() -> None:
    packed = pack_prompts(PROMPTS, DEMONSTRATIONS.__getitem__, P)
    # The demonstrations 0, 1, 2, 3 and, at the start of another prompt, 2 again; each question with its target but the
    # last token. Demonstrations 1 and 3 and four questions have pictures.
    assert len(packed.token_ids) == 5 * 4 + 2 * P + (3 + 2) + (2 + 1) + (1 + 3) + 2 + (2 + 1) + 4 * P
    assert packed.pictures.tolist() == [1, 6, 3, 7, 8, 6]
    assert packed.labels.tolist() == [token for prompt in PROMPTS for token in prompt.target]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.integers(1, 5), st.integers(1, 3)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 80),
)
def test_packs_hold_every_prompt_once_and_keep_their_limit(
    shapes: list[tuple[tuple[int, ...], int, int]], max_tokens: int
) -> None:
    prompts = [labelled(rows, Segment((7,) * length), (9,) * answer) for rows, length, answer in shapes]
    packs = list(split_into_packs(prompts, DEMONSTRATIONS.__getitem__, P, max_tokens))
    assert [prompt for pack in packs for prompt in pack] == prompts
    for pack in packs:
        packed = pack_prompts(pack, DEMONSTRATIONS.__getitem__, P)
        assert len(packed.token_ids) <= max_tokens or len(pack) == 1
        assert all(stretch.length for stretch in packed.stretches())
        assert (seen_by_stretches(packed) == packed.mask()).all()


def seen_by_stretches(packed: PackedPrompts) -> NDArray[np.bool_]:
    """The mask of a pack, as its stretches tell it."""
    stretches = packed.stretches()
    ends = np.cumsum([stretch.length for stretch in stretches])
    seen = np.zeros((ends[-1], ends[-1]), bool)
    for end, stretch in zip(ends, stretches, strict=True):
        for number in stretch.sees:
            seen[end - stretch.length : end, ends[number] - stretches[number].length : ends[number]] = True
    return np.tril(seen)


def test_a_stretch_goes_on_to_the_next_branch() -> None:
    stretches = pack_prompts(PROMPTS[:3], DEMONSTRATIONS.__getitem__, P).stretches()
    assert [stretch.sees for stretch in stretches] == [(0,), (0, 1), (0, 1, 2), (0, 1, 3), (0, 4)]

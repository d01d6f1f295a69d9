"""Which demonstrations a prompt has room for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gemel_engine.prompt import Block, PromptBuilder, PromptSettings

LIMIT, RESERVE = 100, 30


def blocks(lengths: list[int]) -> list[Block]:
    return [Block((0,) * length, None) for length in lengths]


@given(
    shared=st.lists(st.integers(1, 30), max_size=8),
    own=st.lists(st.integers(1, 30), max_size=4),
    question=st.integers(1, RESERVE),
)
def test_what_stays_of_the_shared_demonstrations_depends_on_them_alone(
    tokenizer: PreTrainedTokenizerFast, shared: list[int], own: list[int], question: int
) -> None:
    builder = PromptBuilder(tokenizer, PromptSettings(max_prompt_tokens=LIMIT, query_reserve=RESERVE))
    places = builder.fitting(blocks(shared + own), len(shared), *blocks([question]))
    lengths = [(shared + own)[place] for place in places]
    kept = [place for place in places if place < len(shared)]
    assert kept == builder.fitting(blocks(shared), None, *blocks([1]))
    assert sum(lengths) + question <= LIMIT
    assert kept == list(range(len(shared) - len(kept), len(shared)))  # the first ones went
    assert places[len(kept) :] == list(range(len(shared + own) - len(places) + len(kept), len(shared + own)))
    first_dropped = len(shared) - len(kept) - 1
    assert first_dropped < 0 or sum(shared[first_dropped:]) > LIMIT - RESERVE

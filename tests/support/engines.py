"""Prompts and searches for any engine."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import PromptSettings, SearchSettings, Terminator
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.prompt import Prompt, PromptBuilder
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch, SearchResult
from gemel_engine.knowledge_base.trie import PrefixTrie
from support.names import ENTITY_NAMES

WIDTH, PREFIX_LENGTH, NUM_CHILDREN = 64, 4, 4

EXHAUSTIVE = SearchSettings(
    ranking="objective", num_candidates=5, num_to_certify=5, num_children=NUM_CHILDREN, max_rollouts=500
)


def make_prompts(tokenizer: PreTrainedTokenizerFast, terminator: Terminator = "newline") -> list[Prompt]:
    """Twelve prompts with shared demonstrations: half of the questions have a picture, some the same text."""
    builder = PromptBuilder(tokenizer, PromptSettings(terminator=terminator))
    generator = torch.Generator().manual_seed(0)

    def picture() -> torch.Tensor:
        return torch.randn(PREFIX_LENGTH, WIDTH, generator=generator) * 0.3

    demonstrations = [
        builder.demonstration(f"A {name} was seen here.", name, name, picture() if number % 2 else None)
        for number, name in enumerate(ENTITY_NAMES[:4])
    ]
    return [
        builder.build(
            demonstrations,
            builder.question(f"They drew a {ENTITY_NAMES[n % 6]}.", "it", picture() if n % 2 else None),
        )
        for n in range(12)
    ]


def link(
    engine: RolloutEngine,
    prompts: list[Prompt],
    trie: PrefixTrie,
    terminator: int,
    max_in_flight: int,
    settings: SearchSettings = EXHAUSTIVE,
) -> list[SearchResult]:
    searches = [(i, prompt, NameSearch(trie, terminator, settings)) for i, prompt in enumerate(prompts)]
    results = dict(run_searches(engine, searches, max_in_flight))
    return [results[i] for i in range(len(prompts))]

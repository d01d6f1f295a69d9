"""Prompts and searches for any engine."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import PromptSettings, SearchSettings, Terminator
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.entity_search import EntitySearch, EntitySearchResult, PoolEntity
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.decoding.prompt import Prompt, PromptBuilder
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch, SearchResult
from gemel_engine.knowledge_base.trie import PrefixTrie
from support.names import ENTITY_NAMES

WIDTH, PREFIX_LENGTH, NUM_CHILDREN = 64, 4, 4
WEIGHT = 0.7  # of the log-prob in the score of an entity

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


def search_entities(
    engine: RolloutEngine,
    prompts: list[Prompt],
    pools: list[list[PoolEntity]],
    trie: PrefixTrie,
    terminator: int,
    settings: SearchSettings,
) -> list[EntitySearchResult]:
    """Search for entities, each of which has one name of the same number."""
    searches = [
        (i, prompt, EntitySearch(trie, lambda name: [name], pool, WEIGHT, terminator, settings))
        for i, (prompt, pool) in enumerate(zip(prompts, pools, strict=True))
    ]
    results = dict(run_searches(engine, searches, max_in_flight=4))
    return [results[i] for i in range(len(prompts))]


def random_pools(num_pools: int, num_names: int) -> list[list[PoolEntity]]:
    """Eight entities with bonuses of both signs for each pool."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            PoolEntity(row, bonus, (row,))
            for row, bonus in zip(
                torch.randperm(num_names, generator=generator)[:8].tolist(),
                (torch.randn(8, generator=generator) * 4).tolist(),
                strict=True,
            )
        ]
        for _ in range(num_pools)
    ]


def name_log_prob(model: FrozenLanguageModel, prompt: Prompt, trie: PrefixTrie, name: int, terminator: int) -> float:
    """The log-prob of a name in one pass over prompt and name."""
    tokens = torch.tensor([*trie.name_tokens(name), terminator])
    embeddings = torch.cat([model.embed_prompt(prompt), model.embed_tokens(tokens)])
    logits = model.module(inputs_embeds=embeddings[None]).logits[0, -len(tokens) - 1 : -1]
    log_prob: float = logits.float().log_softmax(dim=-1).gather(1, tokens[:, None]).sum().item()
    return log_prob

"""What is compared with each other: our decoding, its floor, and beam search by transformers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.corpora import SEED, in_order, mentions_of, read_rows, wikidiverse
from gemel_engine.config.components import LanguageModelSettings, Ranking, ScoreSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.decoding.language_model import FrozenLanguageModel
from gemel_engine.linker import Linker
from gemel_engine.types import Mention, Prediction

WORK = Path("build/decode")
NUM_BEAMS = 5
NUM_DEMONSTRATIONS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """What a system took for some mentions, and the entity that it found for each."""

    seconds: float
    entity_ids: list[str | None]
    num_computed: int = 0  # tokens of prompts, those found in a cache not counted


def by_model_alone(data: Path) -> LinkConfig:
    """Return a configuration by which the language model alone links WikiDiverse, with nothing of the evidence."""
    config = wikidiverse(data)
    retrieval = replace(
        config.retrieval, num_demonstrations=NUM_DEMONSTRATIONS, num_candidates=0, num_cards=0, num_own_cards=0
    )
    return replace(config, retrieval=retrieval, score=ScoreSettings(kind="language_model"))


class Systems:
    """Everything that links the same mentions with the same prompts.

    Args:
        data: Directory of WikiDiverse.
        knowledge_base: Directory of the names; None: those of WikiDiverse.
        kv_cache_gib: Size of the engine's cache.
        ranking: How the language model ranks alone: as beam search, which it is compared with; it costs nothing.
        with_evidence: Whether evidence has its cards in the prompts and ranks, too, by the settings of the package.
    """

    def __init__(
        self,
        data: Path,
        knowledge_base: str | None = None,
        kv_cache_gib: int = 2,
        ranking: Ranking = "mean",
        *,
        with_evidence: bool = False,
    ) -> None:
        config = wikidiverse(data) if with_evidence else by_model_alone(data)
        linker = Linker(
            replace(
                config,
                knowledge_base=knowledge_base or config.knowledge_base,
                language_model=replace(config.language_model, kv_cache_gib=kv_cache_gib),
                search=replace(config.search, ranking=ranking),
            )
        )
        self.config, self.retriever, self.generator = linker.config, linker.retriever, linker.generator
        self.artifacts = self.generator.artifacts
        self._engine: Any = self.generator.engine
        self.dev = read_rows(data / "dev.parquet")
        self.gold = {row["mention_id"]: row["entity_id"] for row in self.dev}

    def sample(self, num_mentions: int, seed: int = SEED) -> list[Mention]:
        """Return mentions of dev in the job's order."""
        return mentions_of(in_order(random.Random(seed).sample(self.dev, num_mentions)))

    def prompts(self, mentions: Sequence[Mention]) -> list[tuple[int, ...]]:
        """Return the tokens that every system reads."""
        retrieved = self.retriever.retrieve(mentions, [None] * len(mentions))
        built = [
            self.generator.prompt(mention, None, found)[0] for mention, found in zip(mentions, retrieved, strict=True)
        ]
        return [prompt.token_ids for prompt in built]

    def accuracy(self, mentions: Sequence[Mention], names: Sequence[str | None]) -> float:
        """Return the share of right entities."""
        return float(np.mean([self.gold[m.mention_id] == name for m, name in zip(mentions, names, strict=True)]))

    def ours(self, mentions: Sequence[Mention]) -> tuple[Cost, list[Prediction]]:
        """Link; retrieval is not counted, as for the others; prompts are."""
        retrieved = self.retriever.retrieve(mentions, [None] * len(mentions))
        self._reset()
        started = time.perf_counter()
        predictions = self.generator.generate(mentions, [None] * len(mentions), retrieved)
        seconds = time.perf_counter() - started
        statistics = self._engine.cache_statistics
        tokens = statistics.num_prompt_tokens - statistics.num_cached_tokens
        return Cost(seconds, [prediction.entity_id for prediction in predictions], tokens), predictions

    def floor(self, prompts: Sequence[tuple[int, ...]]) -> Cost:
        """Have the same engine read every prompt once and answer one free token."""
        self._reset()
        engine, tokens = self._engine.llm_engine, 0
        parameters = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        started = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.add_request(f"floor-{number}", TokensPrompt(prompt_token_ids=list(prompt)), parameters)
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
        return Cost(time.perf_counter() - started, [], tokens)

    def _reset(self) -> None:
        assert self._engine.llm_engine.reset_prefix_cache(), "the cache of an idle engine can be emptied"
        self._engine.cache_statistics.num_prompt_tokens = self._engine.cache_statistics.num_cached_tokens = 0


class Beams:
    """Beam search by transformers over the same names, each followed by the terminator."""

    def __init__(self, model: LanguageModelSettings, generator: EntityNameGenerator) -> None:
        self._model = FrozenLanguageModel(model.name, model.dtype)
        self._terminator = generator.terminator
        self._knowledge_base = generator.artifacts.knowledge_base
        self._root: dict[int, Any] = {}
        self._name_of: dict[tuple[int, ...], int] = {}
        for name in range(self._knowledge_base.trie.num_names):
            tokens = self._knowledge_base.name_tokens(name)
            node = self._root
            for token in (*tokens, self._terminator):
                node = node.setdefault(token, {})
            self._name_of[tuple(tokens)] = name

    def paper_loop(self, prompts: Sequence[tuple[int, ...]]) -> Cost:
        """As the paper's code: one mention after another, a dictionary trie; the prompt is read once for each beam."""
        started, names = time.perf_counter(), []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            names += self._generate(len(prompt), input_ids=ids, attention_mask=torch.ones_like(ids))
        return Cost(time.perf_counter() - started, names)

    def best(self, prompts: Sequence[tuple[int, ...]], batch_size: int = 8) -> Cost:
        """Batches of similar length; the prompt is read once and its keys and values are copied for the beams."""
        started = time.perf_counter()
        names: list[str | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            for row, name in zip(rows, self._batch([prompts[row] for row in rows]), strict=True):
                names[row] = name
        return Cost(time.perf_counter() - started, names)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[tuple[int, ...]]) -> list[str | None]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[self._terminator] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        self._model.module(
            ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(NUM_BEAMS)
        return self._generate(longest, input_ids=ids, attention_mask=mask, past_key_values=cache)

    @torch.inference_mode()
    def _generate(self, length: int, **inputs: Any) -> list[str | None]:
        """The names behind a batch; what is generated stands behind `length` tokens of the input."""

        def allowed(_: int, tokens: torch.Tensor) -> list[int]:
            node = self._root
            for token in tokens[length:].tolist():
                if token not in node:
                    return [self._terminator]  # a beam that has ended
                node = node[token]
            return list(node) or [self._terminator]

        found = self._model.module.generate(
            **inputs,
            num_beams=NUM_BEAMS,
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=self._terminator,
            pad_token_id=self._terminator,
            prefix_allowed_tokens_fn=allowed,
        )
        return [self._entity(row[length:].tolist()) for row in found]

    def _entity(self, tokens: list[int]) -> str | None:
        name = self._name_of.get(tuple(tokens[: tokens.index(self._terminator)]))
        if name is None:
            return None
        return self._knowledge_base.entity(self._knowledge_base.entities_of_name(name)[0]).entity_id


def timed(function: Callable[[], object], num_runs: int) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(num_runs):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return median(seconds)

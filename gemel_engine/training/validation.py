"""Measures dev accuracy during training by constrained decoding."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import distributed

from gemel_engine.config.settings import TrainConfig
from gemel_engine.decoding.engines.reference import TransformersEngine
from gemel_engine.decoding.generator import Artifacts, EntityNameGenerator
from gemel_engine.decoding.prompt import PromptBuilder
from gemel_engine.training.attention import PackedLanguageModel
from gemel_engine.training.prompts import TrainingExample
from gemel_engine.vision.mapper import FeatureMapper


class Validation:
    """Decodes a sample of dev with the loaded language model; workers share the sample."""

    def __init__(
        self,
        config: TrainConfig,
        artifacts: Artifacts,
        model: PackedLanguageModel,
        examples: list[TrainingExample],
        rank: int,
        world_size: int,
    ) -> None:
        generator = random.Random(config.optimisation.seed)
        sample = generator.sample(examples, min(config.validation.num_mentions, len(examples)))
        sample.sort(key=lambda example: (example.mention.mention, example.mention.mention_id))
        self._size = len(sample)
        self._sample = sample[rank * len(sample) // world_size : (rank + 1) * len(sample) // world_size]
        self._world_size = world_size
        self._artifacts = artifacts
        self._config = config
        terminator = PromptBuilder(artifacts.tokenizer, config.prompt).terminator
        self._engine = TransformersEngine(model, artifacts.knowledge_base.trie, terminator, config.search.num_children)
        self._device = model.device

    def accuracy(self, mapper: FeatureMapper) -> float:
        """Return the share of the sample whose entity's name is generated."""
        artifacts = replace(self._artifacts, feature_mapper=mapper)
        config = self._config
        generator = EntityNameGenerator(
            artifacts,
            self._engine,
            config.prompt,
            config.search,
        )
        predictions = generator.generate(
            [example.mention for example in self._sample],
            [example.features for example in self._sample],
            [example.retrieved for example in self._sample],
        )
        names = self._artifacts.knowledge_base.names_of_entities
        gold = names([example.entity_id for example in self._sample])
        found = names([prediction.entity_id or "" for prediction in predictions])
        num_right = torch.tensor(sum(a == b for a, b in zip(gold, found, strict=True)), device=self._device)
        if self._world_size > 1:
            distributed.all_reduce(num_right)
        return num_right.item() / self._size

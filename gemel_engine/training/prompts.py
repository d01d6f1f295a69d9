"""Prepared training mentions, and their prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gemel_engine.config.components import PromptSettings
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.decoding.prompt import Block, PromptBuilder
from gemel_engine.evidence.cards import Card, EntityCards
from gemel_engine.evidence.retrieved import PromptItem, Retrieved, row_to_retrieved
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.training.packing import LabelledPrompt, Segment, SegmentKey
from gemel_engine.types import Features, Mention

_CACHED_DEMONSTRATIONS = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class TrainingExample:
    """A mention with its entity, ready for prompts.

    Attributes:
        features: Image features (C,); None without a picture.
        retrieved: Demonstrations and cards; no demonstration of the mention's own group.
    """

    mention: Mention
    entity_id: str
    features: Features | None
    retrieved: Retrieved


def read_examples(tables: Iterable[pa.Table]) -> list[TrainingExample]:
    """Return prepared mentions without an `error`, ordered by id; repeated rows count once."""
    examples = {}
    for table in tables:
        for row in table.to_pylist():
            features = row.get("image_features")
            if row["error"] is None:
                examples[row["mention_id"]] = TrainingExample(
                    Mention(row["mention_id"], row["text"], row["mention"], mention_start=row.get("mention_start")),
                    row["entity_id"],
                    None if features is None else np.array(features, np.float32),
                    replace(row_to_retrieved(row.get("retrieved")), candidates=()),  # which take memory
                )
    return [examples[mention_id] for mention_id in sorted(examples)]


class TrainingPrompts:
    """Labelled prompts of examples, and the features of all pictures in them.

    Pictures are numbered: those of the examples first, then those of the demonstration index, then
    those of the entities.

    Args:
        examples: Examples whose entities are in the knowledge base.
        artifacts: Names, demonstrations, evidence and tokenizer.
        settings: Layout of prompts.
        prefix_length: P, the number of positions of a visual prefix.
    """

    def __init__(
        self,
        examples: Sequence[TrainingExample],
        artifacts: Artifacts,
        settings: PromptSettings,
        prefix_length: int,
    ) -> None:
        self.examples = examples
        self.prefix_length = prefix_length
        self.builder = PromptBuilder(artifacts.tokenizer, settings)
        self._index = artifacts.index
        self._names = artifacts.knowledge_base.names_of_entities([example.entity_id for example in examples])
        self._name_tokens = artifacts.knowledge_base.name_tokens
        self._with_pictures = settings.demonstration_pictures
        self._entity_pictures = None if artifacts.evidence is None else artifacts.evidence.pictures
        self._cards = EntityCards(artifacts.knowledge_base, self._entity_pictures, settings.card_text)
        self._stand_in = torch.empty(prefix_length, 0)  # as long as the visual prefix of a step
        self._demonstration = lru_cache(_CACHED_DEMONSTRATIONS)(self._make_demonstration)

    def __getitem__(self, number: int) -> LabelledPrompt:
        """Return the prompt of an example, shortened as in linking."""
        example = self.examples[number]
        picture = None if example.features is None else number
        mention = example.mention
        question = self.builder.question(mention.text, mention.mention, self._prefix(picture), mention.mention_start)
        keys = self._keys(example)
        blocks = [self._block(self.demonstration(key)) for key in keys]
        places = self.builder.fitting(blocks, len(example.retrieved.shared), question)
        kept = tuple(keys[place] for place in places)
        return LabelledPrompt(kept, Segment(question.token_ids, picture), self.target(number))

    def beginning(self, number: int) -> tuple[str, tuple[PromptItem, ...]]:
        """Return surface form and shared items; prompts equal in both begin alike."""
        example = self.examples[number]
        return example.mention.mention, example.retrieved.shared

    def target(self, number: int) -> tuple[int, ...]:
        """Return the tokens of the name of an example's entity, and the terminator."""
        return (*self.name_tokens(number), self.builder.terminator)

    def name_tokens(self, number: int) -> list[int]:
        """Return the tokens of the name of an example's entity, as in the prefix trie."""
        name = self._names[number]
        assert name is not None, "examples of unknown entities are left out when they are read"
        return self._name_tokens(name)

    def demonstration(self, key: SegmentKey) -> Segment:
        """Return the segment of a demonstration or card."""
        return self._demonstration(key)

    def _make_demonstration(self, key: SegmentKey) -> Segment:
        row, is_card, surface_form = key
        first = len(self.examples)
        if is_card:
            item: Demonstration | Card = self._cards.card(row, surface_form)
            first += 0 if self._index is None else len(self._index)
        else:
            assert self._index is not None, "demonstrations without an index"
            item = self._index[row]
        picture = first + row if self._with_pictures and item.features is not None else None
        block = self.builder.demonstration(item.text, item.mention, item.name, self._prefix(picture))
        return Segment(block.token_ids, picture)

    def features(self, pictures: Sequence[int]) -> Tensor:
        """Return the image features of numbered pictures, (M, C)."""
        return torch.from_numpy(np.stack([self._features(picture) for picture in pictures]))

    def _features(self, picture: int) -> Features:
        if picture < len(self.examples):
            features = self.examples[picture].features
            assert features is not None, "only what has features has a picture's number"
            return features
        picture -= len(self.examples)
        if self._index is not None and picture < len(self._index):
            features = self._index[picture].features
        else:
            assert self._entity_pictures is not None, "a card's picture without pictures"
            features = self._entity_pictures.features_of(picture - (0 if self._index is None else len(self._index)))
        assert features is not None, "only what has features has a picture's number"
        return features

    def _keys(self, example: TrainingExample) -> list[SegmentKey]:
        form = example.mention.mention
        return [SegmentKey(*item, form if item.is_card else "") for item in example.retrieved.items]

    def _prefix(self, picture: int | None) -> Tensor | None:
        return None if picture is None else self._stand_in

    def _block(self, segment: Segment) -> Block:
        return Block(segment.token_ids, self._prefix(segment.picture))

"""Turns mentions, image features and retrieved demonstrations into predictions.

It builds prompts, runs the searches over the engine and looks up entities. It does not depend on
Ray or on the encoders.

B mentions, C vision width, P prefix length, D language-model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import PromptSettings, SearchSettings
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.prompt import Block, Prompt, PromptBuilder
from gemel_engine.decoding.scheduler import Usage, run_searches
from gemel_engine.decoding.search import NameSearch
from gemel_engine.decoding.tasks import MentionTask, NameTask, ScoreTask
from gemel_engine.errors import InvalidMentionError, MentionError
from gemel_engine.evidence.cards import Card, EntityCards
from gemel_engine.evidence.index import EvidenceIndex
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import CARD_PREFIX, Features, Mention, Prediction, check_features
from gemel_engine.vision.mapper import FeatureMapper

_CACHED_BLOCKS = 1 << 16
_CACHED_PREFIXES = 1 << 14
_LARGEST_EMBEDDING = 1e4  # token embeddings are around 1; much larger ones make log-probs NaN


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What a run reads in addition to its mentions.

    Attributes:
        tokenizer: The language model's tokenizer.
        knowledge_base: Entities, their names and the prefix trie.
        index: Demonstration index; None without demonstrations.
        feature_mapper: Mapper of image features to visual prefixes; None without pictures.
        evidence: Evidence index of the knowledge base; None without one.
    """

    tokenizer: PreTrainedTokenizerFast
    knowledge_base: KnowledgeBase
    index: DemonstrationIndex | None
    feature_mapper: FeatureMapper | None
    evidence: EvidenceIndex | None = None

    @property
    def vision_width(self) -> int | None:
        """Vision width, C, of mapper, entities and demonstrations; None if none of them has pictures."""
        if self.feature_mapper is not None:
            return self.feature_mapper.metadata.vision_width
        if self.evidence is not None and self.evidence.pictures is not None:
            return self.evidence.pictures.width
        return None if self.index is None else self.index.metadata.vision_width

    @property
    def mention_encoder_fingerprint(self) -> str | None:
        """Fingerprint of the mention encoder that demonstrations or evidence need; None: none."""
        if self.index is not None:
            return self.index.metadata.mention_encoder_fingerprint
        return None if self.evidence is None else self.evidence.manifest.mention_encoder_fingerprint


class EntityNameGenerator:
    """Links mentions whose features and demonstrations are already computed.

    Args:
        artifacts: Knowledge base, demonstrations and feature mapper.
        engine: Engine that answers the rollouts.
        prompt: Layout of prompts.
        search: Limits of the search.
        max_in_flight: Maximum number of mentions searched at once.
        calibration: Calibration that sets the confidence of predictions; None sets none.
        added_names: Names added to the knowledge base since the earlier predictions; None if there
            are none.
        weights: Weights of the score; None: the language model ranks alone.
        risk: Share of wrong answers accepted where evidence decides alone; 0: it never does.

    Attributes:
        weights: Weights of the score; None: the language model ranks alone.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        engine: RolloutEngine,
        prompt: PromptSettings,
        search: SearchSettings,
        max_in_flight: int = 1,
        calibration: Calibration | None = None,
        added_names: PrefixTrie | None = None,
        weights: ScoreWeights | None = None,
        risk: float = 0.0,
    ) -> None:
        self.artifacts = artifacts
        self.engine = engine
        self._builder = PromptBuilder(artifacts.tokenizer, prompt)
        self.search_settings = search
        self._with_pictures = prompt.demonstration_pictures
        self._max_in_flight = max_in_flight
        self._calibration = calibration
        self.added_names = added_names
        self.weights = weights
        self._threshold = None if weights is None or not risk else weights.threshold(risk)
        pictures = None if artifacts.evidence is None or not self._with_pictures else artifacts.evidence.pictures
        self._cards = EntityCards(artifacts.knowledge_base, pictures, prompt.card_text)
        self.terminator = self._builder.terminator
        self._block = lru_cache(_CACHED_BLOCKS)(self._make_block)
        self._prefix = lru_cache(_CACHED_PREFIXES)(self._make_prefix)  # blocks of one card share it

    def generate(
        self,
        mentions: Sequence[Mention],
        features: Sequence[Features | None],
        retrieved: Sequence[Retrieved],
        earlier: Sequence[Prediction | None] | None = None,
        usage: Usage | None = None,
    ) -> list[Prediction]:
        """Link B mentions; a mention that cannot be linked becomes a prediction with an `error`.

        Args:
            mentions: Mentions to link.
            features: Image features (C,) of each mention, None without a picture.
            retrieved: Demonstrations, cards and candidates of each mention.
            earlier: For each mention None, or its prediction from before names were added, one that
                `can_continue` accepts. Its candidates must still be in the knowledge base under the
                same names. Where the language model ranks alone, at least `num_to_certify` of them
                must be certified; then only the added names are searched, for names that score
                higher, and a mention with its own candidates keeps its prediction; all of them must
                have been in the knowledge base before. Where the score ranks, no name may have been
                added; the candidates are ranked again.
            usage: How well the engine was used is added to it.

        Returns:
            One prediction for each mention, in order.
        """
        earlier = earlier or [None] * len(mentions)
        inputs = zip(mentions, features, retrieved, earlier, strict=True)
        tasks = [self._task(*of_mention) for of_mention in inputs]
        # Prompts and searches are made when the engine has room for them.
        searches = ((task, *prepared) for task in tasks if (prepared := task.prepare()) is not None)
        finished: Iterator[tuple[MentionTask[Any], Any]] = run_searches(
            self.engine, searches, self._max_in_flight, usage
        )
        for task, result in finished:
            task.finish(result)
        predictions = [task.prediction for task in tasks]
        if self._calibration is None:
            return predictions
        return self._calibration.apply(predictions, [mention.mention for mention in mentions])

    def _task(
        self, mention: Mention, features: Features | None, retrieved: Retrieved, earlier: Prediction | None
    ) -> NameTask | ScoreTask:
        if self.weights is None or not retrieved.candidates:
            return NameTask(self, mention, features, retrieved, earlier)
        return ScoreTask(self, mention, features, retrieved, self.weights, self._threshold, earlier)

    def check_picture(self, features: Features | None) -> None:
        """Validate the image features (C,) of a mention, also where the prompt shows no pictures.

        Raises:
            InvalidMentionError: They can't be compared with the pictures of the run, nor be mapped.
        """
        width = self.artifacts.vision_width
        if features is not None and width is not None:
            check_features(features, width)

    def prompt(
        self, mention: Mention, features: Features | None, retrieved: Retrieved
    ) -> tuple[Prompt, tuple[PromptItem, ...]]:
        """Return the prompt for a mention, and the demonstrations and cards that fit into it.

        Raises:
            PromptTooLongError: The surface form is too long.
            InvalidMentionError: The image features can't be used with the pictures or the feature
                mapper of the run.
        """
        self.check_picture(features)
        prefix = self._visual_prefix(features)
        question = self._builder.question(mention.text, mention.mention, prefix, mention.mention_start)
        items = retrieved.items
        blocks = [self._block(item, mention.mention if item.is_card else "") for item in items]
        places = self._builder.fitting(blocks, len(retrieved.shared), question)
        prompt = self._builder.build([blocks[place] for place in places], question)
        return prompt, tuple(items[place] for place in places)

    def can_continue(
        self, mention: Mention, features: Features | None, retrieved: Retrieved, earlier: Prediction
    ) -> bool:
        """Return whether a prediction can be made from an earlier one, whose prompt must be the same.

        By the score, what the earlier one says of log-probs must prove the new ranking.
        """
        try:
            _, used = self.prompt(mention, features, retrieved)
        except MentionError:
            return False  # the mention gets this error when it is linked
        if self.ids(used)[0] != earlier.demonstration_ids:
            return False
        task = self._task(mention, features, retrieved, earlier)
        return isinstance(task, ScoreTask) == (earlier.decided_by == "score") and task.can_continue()

    def ids(self, items: Sequence[PromptItem]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the ids of demonstrations and cards as in predictions, and those of their entities."""
        ids, entity_ids = [], []
        for item in items:
            if item.is_card:
                entity_id = self.artifacts.knowledge_base.entity_id(item.row)
                ids.append(f"{CARD_PREFIX}{entity_id}")
            else:
                assert self.artifacts.index is not None, "demonstrations without an index"
                (demonstration_id,), (entity_id,) = (
                    self.artifacts.index.mention_ids([item.row]),
                    self.artifacts.index.entity_ids([item.row]),
                )
                ids.append(demonstration_id)
            entity_ids.append(entity_id)
        return tuple(ids), tuple(entity_ids)

    def search_of(self, trie: PrefixTrie, rivals: Sequence[float] = ()) -> NameSearch:
        """Return a search of the names of a trie; `rivals` are scores of names found elsewhere."""
        are_candidates = trie is not self.artifacts.knowledge_base.trie
        return NameSearch(trie, self.terminator, self.search_settings, rivals, are_candidates=are_candidates)

    def example(self, item: PromptItem, surface_form: str) -> Demonstration | Card:
        """Return a demonstration, or the card of an entity for mentions of a surface form."""
        if item.is_card:
            return self._cards.card(item.row, surface_form)
        assert self.artifacts.index is not None, "demonstrations without an index"
        return self.artifacts.index[item.row]

    def _make_block(self, item: PromptItem, surface_form: str) -> Block:
        found = self.example(item, surface_form)
        prefix = self._prefix(item) if self._with_pictures else None
        return self._builder.demonstration(found.text, found.mention, found.name, prefix)

    def _make_prefix(self, item: PromptItem) -> Tensor | None:
        """Return the visual prefix of a demonstration or card; None for an entity's unusable picture."""
        features = self.example(item, "").features
        try:
            return self._visual_prefix(features)
        except InvalidMentionError:
            if not item.is_card:
                raise
            return None  # a card is of help without its picture, too

    @torch.inference_mode()
    def _visual_prefix(self, features: Features | None) -> Tensor | None:
        """Return the visual prefix (P, D) of one picture.

        It is always computed alone, so that its bits are the same in every batch.
        """
        mapper = self.artifacts.feature_mapper
        if features is None or mapper is None:
            return None
        check_features(features, mapper.metadata.vision_width)
        prefix: Tensor = mapper(torch.from_numpy(np.array(features))[None])[0]
        largest = prefix.abs().max().item()
        if not largest <= _LARGEST_EMBEDDING:  # also true for NaN
            raise InvalidMentionError(
                f"image_features become embeddings of up to {largest:g}, which a language model can't compute with: "
                "give those of the image encoder that the feature mapper was trained for"
            )
        return prefix

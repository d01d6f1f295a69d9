"""From mentions, image features and retrieved demonstrations to predictions: prompts, engine, search, entities.

Knows neither Ray nor the encoders that stand before it.

B mentions, C vision width, P prefix length, D language-model width.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gemel_engine.config import LinkConfig
from gemel_engine.errors import ArtifactError, InvalidMentionError, MentionError
from gemel_engine.feature_mapper import FeatureMapper
from gemel_engine.knowledge_base import KnowledgeBase, tokenizer_fingerprint
from gemel_engine.model import (
    FrozenLanguageModel,
    language_model_fingerprint,
    language_model_width,
    load_tokenizer,
)
from gemel_engine.prefix_trie import PrefixTrie
from gemel_engine.prompt import Block, Prompt, PromptBuilder
from gemel_engine.retrieval import DemonstrationIndex
from gemel_engine.search import FoundName, NameSearch, RolloutEngine, SearchResult, run_searches
from gemel_engine.storage import download_directory
from gemel_engine.transformers_engine import TransformersEngine
from gemel_engine.types import Candidate, Mention, Prediction

ARTIFACT_CACHE = Path(tempfile.gettempdir()) / "gemel-artifacts"
_CACHED_BLOCKS = 1 << 16

Features = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The artifacts of a run, opened and found to belong together."""

    tokenizer: PreTrainedTokenizerFast
    knowledge_base: KnowledgeBase
    trie_directory: Path
    index: DemonstrationIndex | None
    feature_mapper: FeatureMapper | None


def open_artifacts(config: LinkConfig, *, verify: bool = False) -> Artifacts:
    """Open what a configuration names; a directory in S3 is copied to this node once.

    Args:
        config: The run.
        verify: Also compare all checksums.

    Raises:
        ArtifactError: One is missing or damaged, or they were made for different models.
        ConfigurationError: The language model's tokenizer can't write the prompts.
    """
    tokenizer = load_tokenizer(config.language_model.name)
    PromptBuilder(tokenizer, config.prompt)  # says what is wrong with the template or the terminator
    directory = download_directory(config.knowledge_base, ARTIFACT_CACHE)
    knowledge_base = KnowledgeBase.open(directory, verify=verify)
    index = mapper = None
    if config.demonstrations is not None:
        index = DemonstrationIndex.open(download_directory(config.demonstrations, ARTIFACT_CACHE), verify=verify)
    if config.vision.feature_mapper is not None:
        mapper = FeatureMapper.load(download_directory(config.vision.feature_mapper, ARTIFACT_CACHE))
    if knowledge_base.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ArtifactError(
            f"the knowledge base {config.knowledge_base} was built with another tokenizer than that of "
            f"{config.language_model.name}: build it again with --tokenizer {config.language_model.name}"
        )
    if mapper is not None:
        _check_mapper(config, mapper, index)
    return Artifacts(tokenizer, knowledge_base, directory / "trie", index, mapper)


def _check_mapper(config: LinkConfig, mapper: FeatureMapper, index: DemonstrationIndex | None) -> None:
    name, metadata = f"the feature mapper {config.vision.feature_mapper}", mapper.metadata
    width = language_model_width(config.language_model.name)
    if metadata.language_model_width != width:
        raise ArtifactError(
            f"{name} makes embeddings of width {metadata.language_model_width}, but {config.language_model.name} takes "
            f"{width}: use the mapper trained for this language model"
        )
    if metadata.language_model_fingerprint not in (None, language_model_fingerprint(config.language_model.name)):
        raise ArtifactError(
            f"{name} was made for another language model than {config.language_model.name}: use the one trained for it"
        )
    if index is None or index.metadata.vision_width is None:
        return
    fingerprints = {index.metadata.image_encoder_fingerprint, metadata.image_encoder_fingerprint} - {None}
    if index.metadata.vision_width != metadata.vision_width or len(fingerprints) > 1:
        raise ArtifactError(
            f"{name} and the demonstrations {config.demonstrations} come from different image encoders: build the "
            "index with the encoder that the mapper was trained for"
        )


class EntityNameGenerator:
    """Links mentions whose features and demonstrations are at hand.

    Args:
        config: The run.
        artifacts: Its artifacts; opened here if not given.

    Attributes:
        artifacts: The opened artifacts.
        engine: Answers the rollouts.
    """

    def __init__(self, config: LinkConfig, artifacts: Artifacts | None = None) -> None:
        self.artifacts = artifacts or open_artifacts(config)
        self._config = config
        self._builder = PromptBuilder(self.artifacts.tokenizer, config.prompt)
        self.engine = self._start_engine()
        self._max_in_flight = config.language_model.max_num_seqs if config.language_model.engine == "vllm" else 1
        self._demonstration_block = lru_cache(_CACHED_BLOCKS)(self._make_demonstration_block)

    def generate(
        self,
        mentions: Sequence[Mention],
        features: Sequence[Features | None],
        demonstrations: Sequence[Sequence[int]],
    ) -> list[Prediction]:
        """Link B mentions; one that cannot be linked becomes a prediction with an `error`.

        Args:
            mentions: What to link.
            features: Image features (C,) of each mention, None without a picture.
            demonstrations: Row numbers in the demonstration index for each mention, the most similar last.

        Returns:
            A prediction for each mention, in order.
        """
        tasks = _Tasks(self, mentions, features, demonstrations)
        for position, result in run_searches(self.engine, tasks.searches(), self._max_in_flight):
            tasks.finish(position, result)
        return tasks.predictions()

    def prompt(
        self, mention: Mention, features: Features | None, demonstrations: Sequence[int]
    ) -> tuple[Prompt, list[int]]:
        """What the language model reads for a mention, and the rows of the demonstrations that found room in it.

        Raises:
            PromptTooLongError: The mention's own text is too long.
        """
        question = self._builder.question(mention.text, mention.mention, self._visual_prefix(features))
        blocks = [self._demonstration_block(row) for row in demonstrations]
        num_dropped = self._builder.num_dropped(blocks)
        return self._builder.build(blocks[num_dropped:], question), list(demonstrations[num_dropped:])

    def search(self, mention: Mention) -> tuple[NameSearch, PrefixTrie | None, NDArray[np.intp] | None]:
        """The search for a mention; with candidates also their trie, and the name index of each of its names.

        Raises:
            InvalidMentionError: A candidate is not in the knowledge base.
        """
        trie, names = None, None
        if mention.candidate_ids is not None:
            trie, names = self._candidate_trie(mention.candidate_ids)
        search = NameSearch(trie or self.artifacts.knowledge_base.trie, self._builder.terminator, self._config.search)
        return search, trie, names

    def candidates(self, names: Sequence[FoundName], mention: Mention) -> tuple[Candidate, ...]:
        """The entities of names, within the mention's own candidates if it has any."""
        knowledge_base = self.artifacts.knowledge_base
        allowed = None if mention.candidate_ids is None else set(mention.candidate_ids)
        entities = (
            (knowledge_base.entity(row), name.log_prob)
            for name in names
            for row in knowledge_base.entities_of_name(name.name_index)
        )
        return tuple(
            Candidate(entity.entity_id, entity.name, log_prob)
            for entity, log_prob in entities
            if allowed is None or entity.entity_id in allowed
        )

    def mention_ids(self, rows: Sequence[int]) -> tuple[str, ...]:
        """The `mention_id`s of demonstrations."""
        index = self.artifacts.index
        return () if index is None else tuple(index[row].mention_id for row in rows)

    def _start_engine(self) -> RolloutEngine:
        settings, num_children = self._config.language_model, self._config.search.num_children
        if settings.engine == "transformers":
            model = FrozenLanguageModel(settings.name, settings.dtype)
            trie = self.artifacts.knowledge_base.trie
            return TransformersEngine(model, trie, self._builder.terminator, num_children)
        from gemel_engine.vllm_engine import VllmEngine  # takes seconds to import, and only engines need it

        return VllmEngine(
            settings,
            self.artifacts.trie_directory,
            self._builder.terminator,
            num_children,
            self._config.prompt.max_prompt_tokens,
        )

    def _make_demonstration_block(self, row: int) -> Block:
        assert self.artifacts.index is not None, "demonstrations without an index"
        demonstration = self.artifacts.index[row]
        prefix = self._visual_prefix(demonstration.features)
        return self._builder.demonstration(demonstration.text, demonstration.mention, demonstration.name, prefix)

    @torch.inference_mode()
    def _visual_prefix(self, features: Features | None) -> Tensor | None:
        """The visual prefix (P, D) of one picture; always computed alone, so that it has the same bits everywhere."""
        if features is None or self.artifacts.feature_mapper is None:
            return None
        prefix: Tensor = self.artifacts.feature_mapper(torch.from_numpy(np.array(features))[None])[0]
        return prefix

    def _candidate_trie(self, entity_ids: Sequence[str]) -> tuple[PrefixTrie, NDArray[np.intp]]:
        knowledge_base = self.artifacts.knowledge_base
        known = dict(zip(entity_ids, knowledge_base.names_of_entities(entity_ids), strict=True))
        unknown = [entity_id for entity_id, name in known.items() if name is None]
        if unknown or not known:
            raise InvalidMentionError(
                f"candidate_ids {unknown[:3]} are not in the knowledge base: remove them"
                if unknown
                else "candidate_ids is empty: list at least one entity, or leave it null to search the knowledge base"
            )
        names = np.array(sorted({name for name in known.values() if name is not None}))
        trie, number = PrefixTrie.from_sequences([knowledge_base.name_tokens(int(name)) for name in names])
        name_index = np.empty_like(names)
        name_index[number] = names
        return trie, name_index


class _Tasks:
    """The mentions of one call: what is asked for each, and what came of it."""

    def __init__(
        self,
        generator: EntityNameGenerator,
        mentions: Sequence[Mention],
        features: Sequence[Features | None],
        demonstrations: Sequence[Sequence[int]],
    ) -> None:
        self._generator = generator
        self._inputs = list(zip(mentions, features, demonstrations, strict=True))
        self._used_rows: dict[int, list[int]] = {}
        self._name_index: dict[int, NDArray[np.intp] | None] = {}
        self._predictions: dict[int, Prediction] = {}

    def searches(self) -> Iterator[tuple[int, Prompt, NameSearch, PrefixTrie | None]]:
        """Prompts and searches, made as the engine has room for them."""
        for position, (mention, features, rows) in enumerate(self._inputs):
            try:
                prompt, self._used_rows[position] = self._generator.prompt(mention, features, rows)
                search, trie, self._name_index[position] = self._generator.search(mention)
            except MentionError as error:
                self._predictions[position] = Prediction(mention.mention_id, error=str(error))
                continue
            yield position, prompt, search, trie

    def finish(self, position: int, result: SearchResult) -> None:
        """Note the outcome of a search."""
        mention, _, rows = self._inputs[position]
        name_index = self._name_index[position]
        names = result.names
        if name_index is not None:
            names = tuple(FoundName(int(name_index[n.name_index]), n.log_prob, n.score) for n in names)
        candidates = self._generator.candidates(names, mention)
        used = self._used_rows[position]
        self._predictions[position] = Prediction(
            mention_id=mention.mention_id,
            entity_id=candidates[0].entity_id,
            entity_name=candidates[0].entity_name,
            log_prob=names[0].log_prob,
            probability=_probability(names[0], result),
            unexplored_mass=result.unexplored_mass,
            margin=names[0].score - names[1].score if len(names) > 1 else None,
            certified=result.num_certified > 0,
            num_certified=result.num_certified,
            candidates=candidates,
            demonstration_ids=self._generator.mention_ids(used),
            num_demonstrations_dropped=len(rows) - len(used),
            num_rollouts=result.num_rollouts,
        )

    def predictions(self) -> list[Prediction]:
        """One for each mention, in order."""
        return [self._predictions[position] for position in range(len(self._inputs))]


def _probability(best: FoundName, result: SearchResult) -> float:
    """The best name's share of all names' mass; what was not explored is taken at its upper bound."""
    log_mass = float(np.logaddexp(result.log_explored_mass, math.log(max(result.unexplored_mass, 1e-300))))
    return math.exp(best.log_prob - log_mass)

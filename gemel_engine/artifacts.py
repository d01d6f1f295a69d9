"""The artifacts of a run, opened and found to belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from gemel_engine.calibration import Calibration
from gemel_engine.config import JobConfig, LinkConfig, config_json
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.feature_mapper import FeatureMapper
from gemel_engine.knowledge_base import KnowledgeBase, tokenizer_fingerprint
from gemel_engine.knowledge_base_update import local_knowledge_base
from gemel_engine.model import (
    check_language_model,
    language_model_fingerprint,
    language_model_width,
    load_tokenizer,
    max_positions,
    vocabulary_size,
)
from gemel_engine.prompt import PromptBuilder, check_embedded
from gemel_engine.retrieval import DemonstrationIndex
from gemel_engine.storage import download_directory

_NAMES_CHECKED = 1000


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What a run reads beside its mentions.

    Attributes:
        trie_directory: The knowledge base's prefix trie, for engines that open it in a process of their own.
        index: None without demonstrations.
        feature_mapper: None without pictures.
    """

    tokenizer: PreTrainedTokenizerFast
    knowledge_base: KnowledgeBase
    trie_directory: Path
    index: DemonstrationIndex | None
    feature_mapper: FeatureMapper | None


def open_artifacts(config: JobConfig, *, verify: bool = False) -> Artifacts:
    """Open what a configuration names; a directory in S3 is copied to this node once, an update merged once.

    Args:
        config: The run.
        verify: Also compare all checksums, and see that the language model's weights are finite.

    Raises:
        ArtifactError: One is missing or damaged, or they were made for different models.
        ConfigurationError: The language model's tokenizer can't write the prompts, or it can't read as long ones.
    """
    check_language_model(config.language_model.name, verify=verify)
    tokenizer = load_tokenizer(config.language_model.name)
    builder = PromptBuilder(tokenizer, config.prompt)  # says what is wrong with the template or the terminator
    num_embeddings = vocabulary_size(config.language_model.name)
    check_embedded(
        tokenizer, num_embeddings, config.language_model.name, added=(*builder.beginning, builder.terminator)
    )
    directory = local_knowledge_base(config.knowledge_base)
    knowledge_base = KnowledgeBase.open(directory, verify=verify)
    index = mapper = None
    if config.demonstrations is not None:
        index = DemonstrationIndex.open(download_directory(config.demonstrations), verify=verify)
    if config.vision.feature_mapper is not None:
        mapper = FeatureMapper.load(download_directory(config.vision.feature_mapper))
    if knowledge_base.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ArtifactError(
            f"the knowledge base {config.knowledge_base} was built with another tokenizer than that of "
            f"{config.language_model.name}: build it again with --tokenizer {config.language_model.name}"
        )
    if knowledge_base.trie.tokens.max() >= num_embeddings:
        raise ArtifactError(f"the trie of {config.knowledge_base} holds tokens that no tokenizer made; build it again")
    _check_names(config, knowledge_base, tokenizer)
    if (knowledge_base.trie.tokens[1:] == builder.terminator).any():
        raise ConfigurationError(
            f"prompt.terminator is {config.prompt.terminator!r}, whose token {builder.terminator} is in names of the "
            f"knowledge base {config.knowledge_base}, so that it can't tell where they end: use 'eos'"
        )
    _check_length(config, knowledge_base)
    if mapper is not None:
        _check_mapper(config, mapper, index)
    return Artifacts(tokenizer, knowledge_base, directory / "trie", index, mapper)


def open_calibration(config: LinkConfig) -> Calibration | None:
    """Open the calibration of a run, if it has one.

    Raises:
        ArtifactError: It is missing or damaged.
        ConfigurationError: It was fitted on a run with other settings.
    """
    if config.calibration is None:
        return None
    calibration = Calibration.open(download_directory(config.calibration))
    calibration.check_scoring(json.loads(config_json(config)))
    return calibration


def _check_names(config: JobConfig, knowledge_base: KnowledgeBase, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise where a name's tokens do not decode to it, as those of every name did when it was built; asks a sample.

    Knowledge bases of earlier releases do not say which trie is theirs.
    """
    for row in np.linspace(0, knowledge_base.num_entities - 1, _NAMES_CHECKED).astype(int):
        name = knowledge_base.entity(row).name
        tokens = knowledge_base.name_tokens(knowledge_base.name_of_row(row))
        if (decoded := tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)) != name:
            raise ArtifactError(
                f"the trie of the knowledge base {config.knowledge_base} has {decoded!r} where its entities have "
                f"{name!r}: they are of two knowledge bases; build it again"
            )


def _check_length(config: JobConfig, knowledge_base: KnowledgeBase) -> None:
    num_tokens, limit = knowledge_base.trie.longest(0) + 1, max_positions(config.language_model.name)
    if limit is not None and config.prompt.max_prompt_tokens + num_tokens > limit:
        raise ConfigurationError(
            f"prompt.max_prompt_tokens is {config.prompt.max_prompt_tokens}, and the longest name takes {num_tokens} "
            f"tokens more, but {config.language_model.name} reads {limit} at most: set prompt.max_prompt_tokens to "
            f"{limit - num_tokens} or less"
        )


def _check_mapper(config: JobConfig, mapper: FeatureMapper, index: DemonstrationIndex | None) -> None:
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

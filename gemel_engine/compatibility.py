"""Checks that the parts of a run belong together: models, artifacts and encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gemel_engine.config.settings import JobConfig
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.decoding.language_model import (
    language_model_fingerprint,
    language_model_width,
    max_positions,
    needs_bos,
)
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.index import EvidenceIndex
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.vision.mapper import FeatureMapper

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from gemel_engine.vision.encoder import ImageEncoder

_NAMES_CHECKED = 1000


def check_names(config: JobConfig, knowledge_base: KnowledgeBase, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise if a name's tokens don't decode to the name; checks a sample of the entities.

    This detects a trie of another knowledge base, which earlier releases did not record.
    """
    for row in np.unique(np.linspace(0, knowledge_base.num_entities - 1, _NAMES_CHECKED, dtype=int)):
        name = knowledge_base.entity(row).name
        tokens = knowledge_base.name_tokens(knowledge_base.name_of_row(row))
        if (decoded := tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=False)) != name:
            raise ArtifactError(
                f"the trie of the knowledge base {config.knowledge_base} has {decoded!r} where its entities have "
                f"{name!r}: they are of two knowledge bases; build it again"
            )


def check_length(config: JobConfig, knowledge_base: KnowledgeBase) -> None:
    """Raise ConfigurationError if a prompt and a name may be longer than the language model reads."""
    num_tokens, limit = knowledge_base.trie.longest(0) + 1, max_positions(config.language_model.name)
    if limit is not None and config.prompt.max_prompt_tokens + num_tokens > limit:
        raise ConfigurationError(
            f"prompt.max_prompt_tokens is {config.prompt.max_prompt_tokens}, and the longest name takes {num_tokens} "
            f"tokens more, but {config.language_model.name} reads {limit} at most: set prompt.max_prompt_tokens to "
            f"{limit - num_tokens} or less"
        )


def check_bos(config: JobConfig) -> None:
    """Raise ConfigurationError if the language model needs a BOS token that prompts don't begin with."""
    if needs_bos(config.language_model.name) and not config.prompt.begin_with_bos:
        raise ConfigurationError(
            f"prompt.begin_with_bos is not set, but the predictions of {config.language_model.name} are useless "
            "without a BOS token: set it to true"
        )


def check_mapper(config: JobConfig, mapper: FeatureMapper, index: DemonstrationIndex | None) -> None:
    """Raise ArtifactError if the mapper is of another language model or image encoder."""
    name, metadata = f"the feature mapper {config.vision.feature_mapper}", mapper.metadata
    width = language_model_width(config.language_model.name)
    if metadata.language_model_width != width:
        raise ArtifactError(
            f"{name} makes embeddings of width {metadata.language_model_width}, but {config.language_model.name} takes "
            f"{width}: use the mapper trained for this language model"
        )
    ours = language_model_fingerprint(config.language_model.name)
    if len({metadata.language_model_fingerprint, ours} - {None}) > 1:
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


def check_pictures(
    config: JobConfig, evidence: EvidenceIndex | None, mapper: FeatureMapper | None, index: DemonstrationIndex | None
) -> None:
    """Raise if the pictures of entities and those of mentions come from different image encoders."""
    if evidence is None or evidence.pictures is None:
        return
    ours = evidence.pictures.width, evidence.manifest.image_encoder_fingerprint
    for artifact in (mapper, index):
        if artifact is None or artifact.metadata.vision_width is None:
            continue
        width, fingerprint = artifact.metadata.vision_width, artifact.metadata.image_encoder_fingerprint
        if width != ours[0] or (ours[1] is not None and fingerprint not in (None, ours[1])):
            raise ArtifactError(
                f"the pictures of the knowledge base {config.knowledge_base} have {ours[0]} features, those of the "
                f"mapper or the demonstrations {width}, or they come from different image encoders: build the "
                "knowledge base again with --image-encoder, the one that the mapper was trained for"
            )


def check_encoders(config: JobConfig, artifacts: Artifacts) -> ImageEncoder | None:
    """Load the encoders once, to validate that the artifacts were made with them.

    Returns:
        The image encoder; None if none is configured.

    Raises:
        ArtifactError: An encoder can't be loaded, or an artifact was made with a different one.
        ConfigurationError: No mention encoder is configured for a knowledge base with embeddings.
    """
    index, mapper, image_encoder = artifacts.index, artifacts.feature_mapper, None
    if config.vision.image_encoder is not None:
        from gemel_engine.vision.encoder import ImageEncoder  # imports open_clip, which takes seconds

        image_encoder = ImageEncoder(config.vision.image_encoder, config.vision.pretrained)
        ours = image_encoder.width, image_encoder.fingerprint
        remedy = f"made with another image encoder than {config.vision.image_encoder}: use"
        if mapper is not None and not _fits(
            ours, mapper.metadata.vision_width, mapper.metadata.image_encoder_fingerprint
        ):
            raise ArtifactError(
                f"the feature mapper {config.vision.feature_mapper} was {remedy} the one trained for it"
            )
        if index is not None and not _fits(ours, index.metadata.vision_width, index.metadata.image_encoder_fingerprint):
            raise ArtifactError(f"the demonstrations {config.demonstrations} were {remedy} an index built with it")
        evidence = artifacts.evidence
        if evidence is not None and not _fits(
            ours,
            None if evidence.pictures is None else evidence.pictures.width,
            evidence.manifest.image_encoder_fingerprint,
        ):
            raise ArtifactError(f"the pictures of {config.knowledge_base} were {remedy} a knowledge base built with it")
    _check_mention_encoder(config, artifacts)
    return image_encoder


def _check_mention_encoder(config: JobConfig, artifacts: Artifacts) -> None:
    name, index, evidence = config.retrieval.mention_encoder, artifacts.index, artifacts.evidence
    of_index = None if index is None else index.metadata.mention_encoder_fingerprint
    of_evidence = None if evidence is None else evidence.manifest.mention_encoder_fingerprint
    if of_index is None and of_evidence is None:
        return
    if name is None:  # a configuration with demonstrations has one
        raise ConfigurationError(
            f"retrieval.mention_encoder is not set, but the knowledge base {config.knowledge_base} has embeddings: "
            "name the encoder that it was built with (--mention-encoder), or set retrieval.num_candidates to 0"
        )
    from gemel_engine.retrieval.encoder import MentionEncoder

    fingerprint = MentionEncoder(name).fingerprint
    if of_index not in (None, fingerprint):
        raise ArtifactError(
            f"the demonstrations {config.demonstrations} were encoded by another mention encoder than {name}: build "
            "the index again with it"
        )
    if of_evidence not in (None, fingerprint):
        raise ArtifactError(
            f"the evidence index of {config.knowledge_base} was encoded by another mention encoder than {name}: build "
            "the knowledge base again with it"
        )


def _fits(encoder: tuple[int, str], width: int | None, fingerprint: str | None) -> bool:
    """Whether an artifact's width and fingerprint, where recorded, equal those of an encoder."""
    return width in (None, encoder[0]) and fingerprint in (None, encoder[1])

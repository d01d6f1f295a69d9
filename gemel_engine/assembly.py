"""Opens the artifacts of a run, validates that they belong together, and starts the generator."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gemel_engine.compatibility import check_bos, check_length, check_mapper, check_names, check_pictures
from gemel_engine.config.components import VisionSettings
from gemel_engine.config.loading import config_json
from gemel_engine.config.settings import JobConfig, LinkConfig
from gemel_engine.contents import manifest_addresses
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.decoding.engines.base import RolloutEngine
from gemel_engine.decoding.engines.reference import TransformersEngine
from gemel_engine.decoding.generator import Artifacts, EntityNameGenerator
from gemel_engine.decoding.language_model import (
    FrozenLanguageModel,
    check_language_model,
    vocabulary_size,
)
from gemel_engine.decoding.prompt import PromptBuilder
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.index import open_evidence
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.extras import extra
from gemel_engine.fingerprints import Contents, check_content, json_sha256, read_manifest_at
from gemel_engine.knowledge_base.store import MANIFEST as KNOWLEDGE_BASE_MANIFEST
from gemel_engine.knowledge_base.trie import SavedTrie
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.storage.cache import download_directory
from gemel_engine.tokenizer import check_embedded, load_tokenizer, tokenizer_fingerprint
from gemel_engine.vision.mapper import FeatureMapper

if TYPE_CHECKING:
    from gemel_engine.vision.encoder import PictureEncoder


def open_artifacts(config: JobConfig, *, verify: bool = False) -> Artifacts:
    """Open the artifacts that a configuration names.

    Each node copies a directory from S3 once, and merges a knowledge base update once.

    Args:
        config: Configuration of the run.
        verify: Also validate all checksums, and that the language model's weights are finite.

    Raises:
        ArtifactError: An artifact is missing or damaged, or two were made for different models.
        ConfigurationError: The tokenizer can't encode the prompts, or the language model can't read
            prompts of this length.
    """
    check_language_model(config.language_model.name, verify=verify)
    tokenizer = load_tokenizer(config.language_model.name)
    builder = PromptBuilder(tokenizer, config.prompt)  # raises for a bad template or terminator
    num_embeddings = vocabulary_size(config.language_model.name)
    check_embedded(
        tokenizer, num_embeddings, config.language_model.name, added=(*builder.beginning, builder.terminator)
    )
    knowledge_base = open_knowledge_base(config.knowledge_base, verify=verify)
    evidence = open_evidence(knowledge_base.directory, verify=verify) if config.retrieval.num_candidates else None
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
    check_names(config, knowledge_base, tokenizer)
    if (knowledge_base.trie.tokens[1:] == builder.terminator).any():
        raise ConfigurationError(
            f"prompt.terminator is {config.prompt.terminator!r}, whose token {builder.terminator} is in names of the "
            f"knowledge base {config.knowledge_base}, so that it can't tell where they end: use 'eos'"
        )
    check_bos(config)
    check_length(config, knowledge_base)
    if mapper is not None:
        check_mapper(config, mapper, index)
    check_pictures(config, evidence, mapper, index)
    return Artifacts(tokenizer, knowledge_base, index, mapper, evidence)


def open_calibration(config: LinkConfig, artifacts: Artifacts) -> Calibration | None:
    """Open the calibration of a run; None if the configuration names none.

    Raises:
        ArtifactError: It is missing or damaged, or was fitted with another knowledge base.
        ConfigurationError: It was fitted on a run with other settings, or with the score where this
            one has none.
    """
    if config.calibration is None:
        return None
    calibration = Calibration.open(download_directory(config.calibration))
    calibration.check_scoring(json.loads(config_json(config)))
    uses_score = config.score.kind == "combined" and artifacts.evidence is not None
    if uses_score != (calibration.weights is not None):
        theirs = (
            "without candidate pools, which this run has" if uses_score else "with candidate pools, which this lacks"
        )
        raise ConfigurationError(
            f"the calibration {config.calibration} was fitted on a run {theirs}: fit it again on a run with this "
            "knowledge base, or leave it out"
        )
    _check_knowledge_base(config, calibration)
    return calibration


def _check_knowledge_base(config: LinkConfig, calibration: Calibration) -> None:
    """Raise ArtifactError if a calibration is of another knowledge base than the run's or its base."""
    fitted_with, address = calibration.contents.get("knowledge_base"), config.knowledge_base
    while fitted_with is not None:
        manifest = read_manifest_at(f"{address}/{KNOWLEDGE_BASE_MANIFEST}")
        if json_sha256(manifest) == fitted_with:
            return
        if "base" not in manifest:
            raise ArtifactError(
                f"the calibration {config.calibration} was fitted with another knowledge base than "
                f"{config.knowledge_base}: fit it again on a run with this one, or leave it out"
            )
        address = manifest["base"]["address"]


def open_weights(config: LinkConfig, calibration: Calibration | None) -> ScoreWeights | None:
    """Return the weights of a run's score, its own or the package's; None if the language model ranks alone.

    Raises:
        ConfigurationError: No probability keeps the accepted risk.
    """
    if config.score.kind == "language_model":
        return None
    weights = ScoreWeights.open() if calibration is None else calibration.weights
    risk = config.score.risk
    if weights is not None and risk and weights.threshold(risk) is None:
        raise ConfigurationError(
            f"score.risk is {risk:g}, and the surest answers by evidence alone were wrong more often where the weights "
            f"were fitted: accept a risk of {weights.risks[-1][1]:g} or more, or 0"
            if weights.risks
            else f"score.risk is {risk:g}, but the weights have no measured risks: set it to 0"
        )
    return weights


def open_retriever(config: JobConfig, contents: Contents | None = None) -> Retriever:
    """Open what retrieval reads, and load its mention encoder.

    Args:
        config: Configuration of the run.
        contents: Fingerprints and manifests that the run began with; None: not compared.

    Raises:
        ArtifactError: A model or an artifact is missing or damaged, or differs from `contents`.
    """
    if contents is not None:
        addresses = manifest_addresses(config)
        for part in ("demonstrations", "knowledge_base", "evidence"):
            directory = config.demonstrations if part == "demonstrations" else config.knowledge_base
            found = read_manifest_at(addresses[part]) if part in addresses else None
            check_content(contents, part, directory, found)
    index = None
    if config.demonstrations is not None:
        index = DemonstrationIndex.open(download_directory(config.demonstrations))
    knowledge_base = open_knowledge_base(config.knowledge_base)
    evidence = open_evidence(knowledge_base.directory) if config.retrieval.num_candidates else None
    device = "cuda" if config.resources.retrieval.num_gpus else "cpu"
    retriever = Retriever(config.retrieval, knowledge_base, index, evidence, device)
    if retriever.encoder is not None:
        check_content(contents, "mention_encoder", config.retrieval.mention_encoder, retriever.encoder.fingerprint)
    return retriever


def start_generator(
    config: LinkConfig, artifacts: Artifacts | None = None, added_names: Path | None = None
) -> EntityNameGenerator:
    """Start the engine of a run, and return the generator that uses it.

    Args:
        config: Configuration of the run.
        artifacts: Artifacts of the run; None opens them.
        added_names: Directory of the prefix trie of names added since the earlier predictions.
    """
    artifacts = artifacts or open_artifacts(config)
    calibration = open_calibration(config, artifacts)
    added = None if added_names is None else SavedTrie.open(added_names)
    return EntityNameGenerator(
        artifacts,
        _start_engine(config, artifacts, added),
        config.prompt,
        config.search,
        max_in_flight=config.language_model.max_num_seqs if config.language_model.engine == "vllm" else 1,
        calibration=calibration,
        added_names=None if added is None else added.trie,
        weights=open_weights(config, calibration) if artifacts.evidence is not None else None,
        risk=config.score.risk,
    )


def _start_engine(config: LinkConfig, artifacts: Artifacts, added_names: SavedTrie | None) -> RolloutEngine:
    settings, num_children = config.language_model, config.search.num_children
    terminator = PromptBuilder(artifacts.tokenizer, config.prompt).terminator
    if settings.engine == "transformers":
        model = FrozenLanguageModel(settings.name, settings.dtype)
        return TransformersEngine(model, artifacts.knowledge_base.trie, terminator, num_children)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported
    with extra("cpu", "gpu"):  # vLLM takes seconds to import
        from gemel_engine.decoding.engines.vllm import VllmEngine

    directory, max_prompt_tokens = artifacts.knowledge_base.trie_directory, config.prompt.max_prompt_tokens
    return VllmEngine(settings, directory, terminator, num_children, max_prompt_tokens, added_names)


def load_picture_encoder(settings: VisionSettings) -> PictureEncoder:
    """Load the image encoder of a run, for picture files.

    Raises:
        ArtifactError: The encoder can't be loaded.
        ConfigurationError: No encoder is configured, or its kind is unknown.
    """
    if settings.image_encoder is None:
        raise ConfigurationError("vision.image_encoder is not set: name an open_clip model or directory")
    from gemel_engine.vision.encoder import ImageEncoder, PictureEncoder  # imports open_clip, which takes seconds

    encoder = ImageEncoder(settings.image_encoder, settings.pretrained, device=settings.device)
    return PictureEncoder(encoder, settings.max_image_pixels, settings.batch_size)

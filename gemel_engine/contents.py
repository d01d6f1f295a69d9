"""What a run is made of: the fingerprint or manifest of each model and artifact.

This module imports no model library, so that a rerun needs none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from gemel_engine import storage
from gemel_engine.config.settings import JobConfig, LinkConfig
from gemel_engine.decoding.confidence import MANIFEST as CALIBRATION_MANIFEST
from gemel_engine.evidence.index import DIRECTORY as EVIDENCE_DIRECTORY
from gemel_engine.evidence.index import MANIFEST as EVIDENCE_MANIFEST
from gemel_engine.evidence.update import UPDATE_MANIFEST as EVIDENCE_UPDATE_MANIFEST
from gemel_engine.evidence.weights import MANIFEST as WEIGHTS_MANIFEST
from gemel_engine.evidence.weights import SHIPPED as SHIPPED_WEIGHTS
from gemel_engine.fingerprints import Contents, check_content, checkpoint_fingerprint, read_manifest_at
from gemel_engine.knowledge_base.store import MANIFEST as KNOWLEDGE_BASE_MANIFEST
from gemel_engine.retrieval.index import MANIFEST as INDEX_MANIFEST
from gemel_engine.storage.manifest import MAPPER_MANIFEST

Config = TypeVar("Config", bound=JobConfig)


def run_contents(config: JobConfig, mention_encoder: str | None, image_encoder: str | None) -> Contents:
    """Return the fingerprint or manifest of each model and artifact of a run, by name.

    Args:
        config: Configuration of the run.
        mention_encoder: Fingerprint of the mention encoder; None without demonstrations.
        image_encoder: Fingerprint of the image encoder; None without one.

    Raises:
        ArtifactError: A model or artifact is missing or damaged.
    """
    models = {
        "language_model": checkpoint_fingerprint(config.language_model.name),
        "mention_encoder": mention_encoder,
        "image_encoder": image_encoder,
    }
    return artifact_manifests(config) | {name: found for name, found in models.items() if found is not None}


def artifact_manifests(config: JobConfig) -> dict[str, Any]:
    """Return the manifest of each artifact of a run, checksums included, by name.

    Raises:
        ArtifactError: An artifact is missing or damaged.
    """
    return {name: read_manifest_at(uri) for name, uri in manifest_addresses(config).items()}


def manifest_addresses(config: JobConfig) -> dict[str, str]:
    """Return the address of the manifest of each artifact of a run, by the artifact's name."""
    calibration = config.calibration if isinstance(config, LinkConfig) else None
    addresses: dict[str, str | None] = {
        "knowledge_base": f"{config.knowledge_base}/{KNOWLEDGE_BASE_MANIFEST}",
        "demonstrations": config.demonstrations and f"{config.demonstrations}/{INDEX_MANIFEST}",
        "feature_mapper": config.vision.feature_mapper and f"{config.vision.feature_mapper}/{MAPPER_MANIFEST}",
        "calibration": calibration and f"{calibration}/{CALIBRATION_MANIFEST}",
    }
    if isinstance(config, LinkConfig) and config.score.kind == "combined" and not calibration:
        addresses["weights"] = f"{SHIPPED_WEIGHTS}/{WEIGHTS_MANIFEST}"
    for file in (EVIDENCE_MANIFEST, EVIDENCE_UPDATE_MANIFEST):
        evidence = f"{config.knowledge_base}/{EVIDENCE_DIRECTORY}/{file}"
        if config.retrieval.num_candidates and storage.exists(evidence):
            addresses["evidence"] = evidence
    return {name: uri for name, uri in addresses.items() if uri}


def check_contents(began_with: Contents | None, config: JobConfig) -> None:
    """Raise if the language model or an artifact differs from the one that the run began with.

    Raises:
        ArtifactError: A model or artifact differs, is missing or damaged.
    """
    if began_with is not None:
        addresses = {
            "feature_mapper": config.vision.feature_mapper,
            "evidence": config.knowledge_base,
            "weights": "of the score",
        }
        for name, manifest in artifact_manifests(config).items():
            check_content(began_with, name, addresses.get(name) or getattr(config, name), manifest)
        language_model = config.language_model.name
        check_content(began_with, "language_model", language_model, checkpoint_fingerprint(language_model))


def without_missing_evidence(config: Config, *, has_evidence: bool) -> Config:
    """Return a configuration without candidates if the knowledge base has no evidence index.

    Its stages then need not look for any.
    """
    if has_evidence or not config.retrieval.num_candidates:
        return config
    return replace(config, retrieval=replace(config.retrieval, num_candidates=0))

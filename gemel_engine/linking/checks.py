"""Checks that models and artifacts of a run belong together, and remembers by content which passed.

The checks load models and what loads them, most of the time of a dry run or a rerun. What they find
is kept in the artifact cache, under a hash of all that they depend on: each byte of the files, the
settings, this package and the libraries.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gemel_engine.config.settings import LinkConfig
from gemel_engine.contents import run_contents
from gemel_engine.evidence.update import local_knowledge_base
from gemel_engine.fingerprints import Contents, files_digest
from gemel_engine.pipeline.identity import run_identity
from gemel_engine.storage import ARTIFACT_CACHE, download_directory, made_once

_NOTE = "found.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "open_clip_torch")
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Models and artifacts that belong together.

    Attributes:
        contents: Fingerprint or manifest of each, by name.
        has_evidence: Whether the run uses an evidence index.
        feature_mapper: How the weights of the feature mapper were made; `none` without one.
    """

    contents: Contents
    has_evidence: bool
    feature_mapper: str


def checked(config: LinkConfig) -> Checked:
    """Check the models and artifacts of a run, unless the same have passed before.

    Raises:
        GemelError: Something is unusable, or the artifacts do not fit together.
    """
    if (key := _key(config)) is None:
        found = _found(config)
    else:
        note = made_once(ARTIFACT_CACHE / f"checked-{key}", lambda directory: _write(directory, _found(config)))
        found = json.loads((note / _NOTE).read_bytes())
    contents = run_contents(config, found["mention_encoder"], found["image_encoder"])
    return Checked(contents=contents, has_evidence=found["has_evidence"], feature_mapper=found["feature_mapper"])


def _found(config: LinkConfig) -> dict[str, Any]:
    """Make all checks, and return what they found, as JSON."""
    # These import torch.
    from gemel_engine.assembly import open_artifacts, open_calibration, open_weights
    from gemel_engine.compatibility import check_encoders

    artifacts = open_artifacts(config, verify=config.verify_artifacts)
    image_encoder, mapper = check_encoders(config, artifacts), artifacts.feature_mapper
    calibration = open_calibration(config, artifacts)
    if artifacts.evidence is not None:
        open_weights(config, calibration)
    return {
        "mention_encoder": artifacts.mention_encoder_fingerprint,
        "image_encoder": None if image_encoder is None else image_encoder.fingerprint,
        "has_evidence": artifacts.evidence is not None,
        "feature_mapper": "none" if mapper is None else mapper.metadata.origin,
    }


def _write(directory: Path, found: dict[str, Any]) -> None:
    (directory / _NOTE).write_text(json.dumps(found), encoding="utf-8")


def _key(config: LinkConfig) -> str | None:
    """Return a hash of all that the checks depend on; None if a model is not in a local directory."""
    encoders = [name for name in (config.retrieval.mention_encoder, config.vision.image_encoder) if name]
    if not all(Path(name).is_dir() for name in (config.language_model.name, *encoders)):
        return None
    verify = config.verify_artifacts
    addresses = filter(None, (config.demonstrations, config.vision.feature_mapper, config.calibration))
    artifacts = [local_knowledge_base(config.knowledge_base), *map(download_directory, addresses)]
    settings = run_identity(config, None, {})["settings"]
    del settings["input"]
    parts = {
        "settings": settings,
        "verify": verify,
        "versions": [sys.version, *(f"{name} {version(name)}" for name in _LIBRARIES)],
        "package": files_digest(_PACKAGE),
        "language_model": files_digest(Path(config.language_model.name), whole=verify),
        "encoders": [files_digest(Path(name)) for name in encoders],
        "artifacts": [files_digest(directory, whole=verify) for directory in artifacts],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

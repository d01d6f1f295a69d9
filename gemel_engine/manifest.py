"""What all artifact directories have in common: a JSON manifest, written last, and checksums of the other files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemel_engine.errors import ArtifactError


def read_manifest(path: Path, format_version: int) -> dict[str, Any]:
    """Read the JSON object that describes an artifact directory.

    Raises:
        ArtifactError: It is missing, not a JSON object, or of another format version.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; name a finished artifact directory, or build it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}); build the artifact again") from error
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != format_version:
        raise ArtifactError(f"{path} has format version {found!r}, this release reads {format_version}; build it again")
    return dict(manifest)


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the JSON object that describes an artifact directory: the last file, so that it marks a finished one."""
    path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What all artifact directories have in common: a JSON manifest, written last, and checksums of all files.

A manifest carries a checksum of itself, and the checksums of the other files, so that a changed byte is found wherever
it is. While a directory is written it is claimed: a second writer is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.storage.files import write_bytes
from gemel_engine.storage.local import open_regular

_VERSION = "format_version"
_CHECKSUM = "manifest_sha256"
_MAX_BYTES = 16 << 20
_CLAIM = ".being-written"

Contents = TypeVar("Contents")


def read_manifest(path: Path, format_version: int, *, without_checksum: int | None = None) -> dict[str, Any]:
    """Read the JSON object that describes an artifact directory.

    Args:
        path: The file.
        format_version: The format version that this release writes.
        without_checksum: An earlier format version that is read, too, whose manifests carry no checksum of their own.

    Returns:
        The object, without its format version and checksum.

    Raises:
        ArtifactError: It is missing, not a JSON object, changed since it was written, or of another format version.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        manifest = json.loads(data)
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; name a finished artifact directory, or build it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}); build the artifact again") from error
    found = manifest.pop(_VERSION, None) if isinstance(manifest, dict) else None
    if found is None or found not in (format_version, without_checksum):
        raise ArtifactError(f"{path} has format version {found!r}, this release reads {format_version}; build it again")
    checksum = manifest.pop(_CHECKSUM, None)
    if found == format_version and checksum != _digest(manifest):
        raise ArtifactError(
            f"{path} has been changed since it was written: its checksum is another; put the file back, or build the "
            "artifact again"
        )
    return dict(manifest)


def parse_manifest(contents: Mapping[str, Any], kind: type[Contents], path: Path) -> Contents:
    """Validate what `read_manifest` returned as a dataclass with types; nothing is converted.

    Raises:
        ArtifactError: A key is missing or unknown, or a value is of another type or out of range.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(contents), strict=True)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors(include_url=False)
        )
        raise ArtifactError(f"{path} has unusable values ({faults}); build the artifact again") from error


def write_manifest(path: Path, format_version: int, contents: Mapping[str, Any]) -> None:
    """Write the JSON object that describes an artifact directory: the last file, so that it marks a finished one."""
    manifest = {_VERSION: format_version, **contents, _CHECKSUM: _digest(contents)}
    write_bytes(str(path), (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def claimed(directory: Path, *, must_be_empty: bool = True) -> Iterator[None]:
    """Claim an artifact's directory, which is made where it is missing, for as long as it is written.

    Raises:
        ConfigurationError: The directory is a file, holds something although it must be empty, or another process has
            claimed it.
    """
    claim, is_new = directory / _CLAIM, not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with claim.open("x", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except NotADirectoryError as error:
        raise ConfigurationError(f"{directory} is not an empty directory; remove it or name a new one") from error
    except FileExistsError as error:
        if not claim.exists():
            raise ConfigurationError(f"{directory} is not an empty directory; remove it or name a new one") from error
        raise ConfigurationError(
            f"{directory} is being written by another command, {_owner(claim)}: wait for it, or name a new directory; "
            f"if that command was killed, remove {claim}"
        ) from error
    try:
        if must_be_empty and any(path != claim for path in directory.iterdir()):
            raise ConfigurationError(f"{directory} is not an empty directory; remove it or name a new one")
        yield
    finally:
        claim.unlink(missing_ok=True)
        if is_new and directory.is_dir() and not any(directory.iterdir()):  # nothing came of it
            with suppress(OSError):  # another command has claimed it since
                directory.rmdir()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a regular file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _owner(claim: Path) -> str:
    try:
        return claim.read_text(encoding="utf-8", errors="replace")[:100]
    except OSError:  # it has just ended
        return "which has just ended"

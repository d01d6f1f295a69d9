"""Manifests of artifact directories: JSON files, written last, with checksums of all files.

A manifest contains a checksum of itself and those of the other files, so that any changed byte is
detected. A directory is claimed while it is written: a second writer is rejected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.storage.files import write_bytes
from gemel_engine.storage.local import open_regular

MAPPER_MANIFEST = "mapper.json"  # here, since the module of feature mappers imports torch

_VERSION = "format_version"
_CHECKSUM = "manifest_sha256"
_MAX_BYTES = 16 << 20
_CLAIM = ".being-written"
_held: set[str] = set()  # real paths of the claims of this process

Contents = TypeVar("Contents")


def read_manifest(path: Path, format_version: int, *, without_checksum: int | None = None) -> dict[str, Any]:
    """Read a manifest.

    Args:
        path: Path of the manifest.
        format_version: Format version that this release writes.
        without_checksum: Earlier format version that is also accepted, whose manifests contain no
            checksum of themselves.

    Returns:
        The JSON object without its format version and checksum.

    Raises:
        ArtifactError: The file is missing, not a JSON object, changed since it was written, or of
            another format version.
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
    """Validate the result of `read_manifest` as a dataclass; values are not converted.

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
    """Write the manifest of an artifact directory; written last, it marks a finished directory."""
    manifest = {_VERSION: format_version, **contents, _CHECKSUM: _digest(contents)}
    write_bytes(str(path), (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def claimed(directory: Path, *, must_be_empty: bool = True) -> Iterator[None]:
    """Claim a directory while an artifact is written to it; a missing directory is created.

    The claim of a killed process of this machine is void, also if this process has its number, as in
    a container that was started again.

    Raises:
        ConfigurationError: The path is a file, the directory is not empty although it must be, or
            another process has claimed it.
    """
    claim, is_new = directory / _CLAIM, not directory.exists()
    _remove_if_left_behind(claim)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with claim.open("x", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
        _held.add(os.path.realpath(claim))
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
        _held.discard(os.path.realpath(claim))
        claim.unlink(missing_ok=True)
        if is_new and directory.is_dir() and not any(directory.iterdir()):  # nothing was written
            with suppress(OSError):  # another command has claimed it
                directory.rmdir()


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _remove_if_left_behind(claim: Path) -> None:
    """Remove the claim of a process of this machine that has ended."""
    found = re.fullmatch(r"process (\d+) on (.*)", _owner(claim), re.DOTALL)
    if found is None or found[2] != socket.gethostname() or _is_at_work(int(found[1]), claim):
        return
    taken = claim.with_name(f"{_CLAIM}-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another command has removed it
        claim.rename(taken)
        if _owner(taken) != found[0]:  # the new claim of another command
            taken.rename(claim)
        taken.unlink(missing_ok=True)


def _is_at_work(number: int, claim: Path) -> bool:
    """Return whether the process of this number exists and may have made a claim."""
    if number == os.getpid():
        return os.path.realpath(claim) in _held
    try:
        os.kill(number, 0)  # sends nothing
    except (OSError, OverflowError) as error:  # no process has a number too large
        return isinstance(error, PermissionError)  # of another user's
    return True


def _owner(claim: Path) -> str:
    try:
        return claim.read_text(encoding="utf-8", errors="replace")[:100]
    except OSError:  # the owner has just ended
        return "which has just ended"

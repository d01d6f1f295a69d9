"""The artifact cache of a user on this machine: copies of artifacts from S3, and merged updates."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from gemel_engine.config.addresses import local_path
from gemel_engine.errors import ArtifactError, ConfigurationError, shown
from gemel_engine.storage import s3
from gemel_engine.storage.files import InputFile, normalised_uri, relative_path, walk_files
from gemel_engine.storage.local import NO_ROOM, explain_full_disk

ARTIFACT_CACHE = Path(tempfile.gettempdir()) / f"gemel-artifacts-{os.geteuid()}"


def download_directory(uri: str, cache_dir: str | os.PathLike[str] = ARTIFACT_CACHE) -> Path:
    """Return a local directory with the files of an artifact directory.

    A directory in S3 is copied once into `cache_dir`, under a name derived from its address and the
    versions of its files; if several processes request it at the same time, one copies it and the
    others wait. A copy that was changed later, for example by a cleaner of temporary files, is made
    again. A local directory is returned unchanged.

    Raises:
        ArtifactError: The directory does not exist, or a file's name could lead out of it.
        ConfigurationError: Other users can write to `cache_dir`, or this user cannot.
    """
    root = normalised_uri(uri)
    if not root.startswith("s3://"):
        if not os.path.isdir(root):
            raise ArtifactError(f"no artifact directory at {shown(uri)}: check the path, or build the artifact first")
        return Path(root)
    files = sorted(walk_files(root), key=lambda file: file.uri)
    if not files:
        raise ArtifactError(f"no artifact directory at {shown(uri)}: check the address, or upload the artifact first")
    digest = hashlib.sha256(repr([(file.uri, file.version) for file in files]).encode()).hexdigest()[:16]
    target = Path(cache_dir) / f"{root.rpartition('/')[2]}-{digest}"

    def download(directory: Path) -> None:
        with ThreadPoolExecutor() as pool:
            for copy in [pool.submit(_download_file, file, relative_path(file, root), directory) for file in files]:
                copy.result()

    return made_once(target, download)


def publish_directory(directory: Path, uri: str, last: str) -> None:
    """Move the contents of a local directory to an address.

    Args:
        directory: Directory; on the same file system, if the address is local.
        uri: Address of a directory, local or `s3://`.
        last: Name of the file that is moved last, whose presence marks a complete directory.
    """
    target = local_path(uri)
    if target is not None:
        for path in sorted(directory.iterdir(), key=lambda path: (path.name == last, path.name)):
            path.rename(target / path.name)
        return
    root = normalised_uri(uri)
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    with ThreadPoolExecutor() as pool:
        for copy in [
            pool.submit(s3.copy_from_local, directory / name, f"{root}/{name}") for name in names if name != last
        ]:
            copy.result()
    s3.copy_from_local(directory / last, f"{root}/{last}")


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """Return the directory `target`; `make` fills it if it is missing or was changed.

    Other processes that request it wait. The lock of a killed process is released, and the next
    process starts again.

    Raises:
        ConfigurationError: Other users can write to its parent directory, or this user cannot.
    """
    temporary, record = target.with_name(f".{target.name}"), target.with_name(f".{target.name}.json")
    with explain_full_disk(target):
        _make_private(target.parent)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if target.is_dir() and _recorded(record) == _content(target):
                return target
            record.unlink(missing_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                make(temporary)
                temporary.rename(target)
                record.write_text(json.dumps(_content(target)), encoding="utf-8")
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _make_private(directory: Path) -> None:
    """Create a directory that only this user can write to, or check an existing one.

    Raises:
        ConfigurationError: The directory cannot be created or used, or others can write to it.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()  # does not follow a link
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        fault = str(error.strerror)
    else:
        if not stat.S_ISDIR(status.st_mode):
            fault = "it is no directory"
        elif status.st_uid != os.geteuid():
            fault = "it belongs to another user"
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            fault = "other users can write to it"
        else:
            return
    raise ConfigurationError(
        f"the artifact cache {shown(str(directory))} cannot be used: {fault}; remove it, or set TMPDIR to a directory "
        "of your own"
    )


def _content(directory: Path) -> dict[str, list[int]]:
    """Return size in bytes and modification time in nanoseconds of each file below a directory.

    Links are not followed.
    """
    found = {}
    for place, _, names in os.walk(directory):
        for path in (Path(place, name) for name in names):
            status = path.lstat()
            found[str(path.relative_to(directory))] = [status.st_size, status.st_mtime_ns]
    return found


def _recorded(record: Path) -> object:
    """Return the recorded `_content` of a directory when it was made; None without a record."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _download_file(file: InputFile, relative: str, directory: Path) -> None:
    if any(part in ("", ".", "..") for part in relative.split("/")):
        raise ArtifactError(f"the object {shown(file.uri)} has no safe local name: remove it from the artifact")
    path = directory / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    s3.copy_to_local(file.uri, file.version, path)

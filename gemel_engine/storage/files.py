"""Files on a local disk or in S3, behind one set of functions.

An address is a local path (absolute, relative or `file:///...`) or `s3://bucket/key`. Nothing here knows what a file
contains.

Errors are the same for both kinds: FileNotFoundError for what does not exist, ConfigurationError for an address of an
unknown kind or refused credentials, OSError for any other failure.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock
from pyarrow.fs import FileSystem, LocalFileSystem

from gemel_engine.config.addresses import local_path
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, shown
from gemel_engine.storage import s3

ARTIFACT_CACHE = Path(tempfile.gettempdir()) / f"gemel-artifacts-{os.geteuid()}"
_RAY_WORKING_DIRECTORIES = "working_dir_files"
_MAX_VANISHED = 100
# With these os.link fails on file systems without hard links: exFAT, SMB, many in user space.
_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of Linux
_SUFFIXES = (".parquet", ".parq", ".pq")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A stored file as it was when it was listed.

    Attributes:
        uri: Absolute local path, or `s3://bucket/key`.
        size: Length in bytes.
        version: Changes when the content does: the ETag in S3, size and modification time on a local disk.
    """

    uri: str
    size: int
    version: str


def check_kept(uri: str) -> None:
    """See that an address is not in the working directory that a job brought to a cluster: Ray removes that later.

    Raises:
        ConfigurationError: It is.
    """
    path, here = local_path(uri), Path.cwd()
    if path is not None and _RAY_WORKING_DIRECTORIES in here.parts and path.is_relative_to(here):
        raise ConfigurationError(
            f"{shown(uri)} is in the job's working directory, which Ray removes: give s3://bucket/prefix, or an "
            "absolute path that all nodes share"
        )


def check_apart(output: str, source: str) -> None:
    """Raise if a job would read its own output as input, at once or when it is run again; links are followed.

    Args:
        output: Directory that the job writes to; it need not exist.
        source: Parquet file or directory that the job reads.

    Raises:
        ConfigurationError: `output` is `source` or lies in it where `list_parquet` would find its files, or `source`
            lies where a job keeps its files in `output`.
    """
    root, target = _normalised(source), _normalised(output)
    is_read = any(_is_table(os.path.normpath(f"{place}/data/x.parquet")) for place in _places_within(target, root))
    if is_read or any(re.match(r"(data|_[^/]*)(/|$)", place) for place in _places_within(root, target)):
        raise ConfigurationError(
            f"the output {shown(output)} and the input {shown(source)} lie one in the other, so that the job would "
            "read what it writes: choose an output outside of the input"
        )


def resolve(uri: str) -> tuple[FileSystem, str]:
    """Return the pyarrow file system of an address and the path inside it, for pyarrow's own readers and writers.

    The S3 file system holds no secret: it is built from the environment, also where it is sent to another process.
    """
    path = local_path(uri)
    if path is not None:
        return LocalFileSystem(), str(path)
    return s3.file_system(), uri.removeprefix("s3://").rstrip("/")


def list_parquet(uri: str) -> list[InputFile]:
    """List the Parquet file at an address, or those anywhere under it, sorted by address.

    Under a directory only names ending in `.parquet`, `.parq` or `.pq` count, and what begins with a dot or an
    underscore, at any level, is left out, but for a directory `_key=value`. Links are followed; a directory to which
    several lead is read once.

    Raises:
        InputError: There is no such file, or a local directory or link can't be read.
    """
    root = _normalised(uri)
    single = _stat(root)
    if single is not None:
        return [single]
    try:
        files = [file for file in _walk(root) if _is_table(_relative(file, root))]
    except OSError as error:
        if root.startswith("s3://"):
            raise
        raise InputError(f"cannot list all of {shown(uri)} ({error}): make it readable, or remove it") from error
    if not files:
        raise InputError(f"no Parquet file at {shown(uri)}: give a file, or a directory with files named *.parquet")
    return sorted(files, key=lambda file: file.uri)


def partition_keys(uri: str, file: InputFile) -> list[str]:
    """The keys of the directories `key=value` between a listed address and one of its files, as Hive names them."""
    directories = _relative(file, _normalised(uri)).split("/")[:-1]
    return [unquote(name.partition("=")[0]) for name in directories if "=" in name]


def list_files(uri: str) -> list[str]:
    """The addresses of all files under a directory, relative to it; none if it does not exist."""
    root = _normalised(uri)
    return [_relative(file, root) for file in _walk(root)]


def exists(uri: str) -> bool:
    """Tell whether there is a file at the address, or any file under it; an empty directory does not count."""
    root = _normalised(uri)
    return _stat(root) is not None or next(_walk(root), None) is not None


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """Read a file, or at most its first `limit` bytes."""
    path = local_path(uri)
    if path is None:
        return s3.read_bytes(uri, limit)
    with open_regular(path) as stream:
        return stream.read(-1 if limit is None else limit)


def open_regular(path: Path) -> BufferedReader:
    """Open a local file for reading, if it is a regular one: a pipe could block, a device have no end.

    Raises:
        OSError: It is not a regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(uri: str, remedy: str) -> Any:
    """Read a JSON file that a job keeps in its output.

    Raises:
        InputError: It is missing or damaged; the message ends with the remedy.
    """
    try:
        return json.loads(read_bytes(uri))
    except FileNotFoundError as error:
        raise InputError(f"{shown(uri)} is missing: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(uri)} is damaged ({error}): {remedy}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, replacing what was there; a reader sees the old content or the new, never a part."""
    path = local_path(uri)
    if path is None:
        s3.write_bytes(uri, data)
    else:
        _write_local(path, data, Path.replace)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write a file unless there is one already: of any number of writers one wins, and the file is always complete.

    Returns:
        Whether this call created the file. In S3, False may also mean that it did but that the answer was lost on the
        way back and the request sent again.

    Raises:
        ConfigurationError: The file system can't do this safely.
    """
    path = local_path(uri)
    if path is None:
        return s3.create_exclusive(uri, data)
    try:
        _write_local(path, data, _publish_exclusively)
    except FileExistsError:
        return False
    return True


def download_directory(uri: str, cache_dir: str | os.PathLike[str] = ARTIFACT_CACHE) -> Path:
    """Make an artifact directory available as a local one.

    A directory in S3 is copied once into `cache_dir`, under a name made from its address and its files' versions; of
    several processes that ask for it at once one copies and the others wait. A copy that has been changed since, such
    as by a cleaner of temporary files, is made again. A local directory is returned as it is.

    Raises:
        ArtifactError: There is no such directory, or it holds a name that could lead out of it.
        ConfigurationError: Other users can write to `cache_dir`, or this one cannot.
    """
    root = _normalised(uri)
    if not root.startswith("s3://"):
        if not os.path.isdir(root):
            raise ArtifactError(f"no artifact directory at {shown(uri)}: check the path, or build the artifact first")
        return Path(root)
    files = sorted(_walk(root), key=lambda file: file.uri)
    if not files:
        raise ArtifactError(f"no artifact directory at {shown(uri)}: check the address, or upload the artifact first")
    digest = hashlib.sha256(repr([(file.uri, file.version) for file in files]).encode()).hexdigest()[:16]
    target = Path(cache_dir) / f"{root.rpartition('/')[2]}-{digest}"

    def download(directory: Path) -> None:
        with ThreadPoolExecutor() as pool:
            for copy in [pool.submit(_download_file, file, _relative(file, root), directory) for file in files]:
                copy.result()

    return made_once(target, download)


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """Return the directory `target`, which `make` fills where it is missing or no longer as it was made.

    Other processes that ask for it wait. The lock of a process that is killed goes with it, and the next begins anew.

    Raises:
        ConfigurationError: Other users can write to the directory around it, or this one cannot.
    """
    temporary, record = target.with_name(f".{target.name}"), target.with_name(f".{target.name}.json")
    with _room_for(target):
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
    """Make a directory that only this user can write to, or raise unless the existing one is such a directory."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        status = directory.lstat()  # of a link, not of what it leads to
    except OSError as error:
        if error.errno in _NO_ROOM:
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
    """Size in bytes and modification time in nanoseconds of each file below a directory; links are not followed."""
    found = {}
    for place, _, names in os.walk(directory):
        for path in (Path(place, name) for name in names):
            status = path.lstat()
            found[str(path.relative_to(directory))] = [status.st_size, status.st_mtime_ns]
    return found


def _recorded(record: Path) -> object:
    """Read what `_content` was when the directory was made; None if that is not known."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def remove_tree(uri: str) -> None:
    """Remove a directory and all that is in it; do nothing if it does not exist.

    Other processes may write there or remove it at the same time; what they write meanwhile may stay.
    """
    root = _normalised(uri)
    if root.startswith("s3://"):
        s3.remove_tree(root)
    elif os.path.isdir(root):
        shutil.rmtree(root, onerror=_unless_others_are_there)


def _unless_others_are_there(_: object, path: str, raised: tuple[type, BaseException, object]) -> None:
    """Let a removal go on where somebody else removes, or writes."""
    error = raised[1]
    assert isinstance(error, OSError), "rmtree catches nothing else"
    is_made_anew = error.errno is None and not os.path.islink(path)  # rmtree takes such a directory for a link
    if not is_made_anew and error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
        raise error


def _normalised(uri: str) -> str:
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path)


def _places_within(target: str, root: str) -> Iterator[str]:
    """Yield where a normalised address lies below another, relative to it; links in the directory are followed."""
    if root.startswith("s3://") or target.startswith("s3://"):
        if f"{target}/".startswith(f"{root}/"):
            yield target[len(root) + 1 :]
        return
    real = Path(os.path.realpath(target))
    links = [
        os.path.join(directory, name)
        for directory, *names in os.walk(root)
        for name in chain(*names)
        if os.path.islink(os.path.join(directory, name))
    ]
    for place in [root, *links]:
        for ancestor in (real, *real.parents):
            if _is_same(ancestor, place):
                yield os.path.normpath(os.path.join(os.path.relpath(place, root), real.relative_to(ancestor)))


def _is_same(path: Path, other: str) -> bool:
    """Whether two paths lead to one file or directory, also on a file system that ignores case."""
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them is not there, or not yet
        return str(path) == os.path.realpath(other)


def _relative(file: InputFile, root: str) -> str:
    return file.uri[len(root) + 1 :]


def _is_table(relative: str) -> bool:
    *directories, name = relative.split("/")
    parts = [name, *(part for part in directories if "=" not in part)]
    return name.lower().endswith(_SUFFIXES) and not any(part.startswith((".", "_")) for part in parts)


def _stat(root: str) -> InputFile | None:
    """Describe the single file at a normalised address; None if there is none, or a directory."""
    if not root.startswith("s3://"):
        return _local_file(root) if os.path.isfile(root) else None
    found = s3.head(root)
    return None if found is None else InputFile(root, *found)


def _walk(root: str) -> Iterator[InputFile]:
    """Describe all files under a normalised address, in no particular order."""
    if root.startswith("s3://"):
        for found in s3.walk(root):
            yield InputFile(*found)
        return
    visited: set[tuple[int, int]] = set()
    for directory, directories, names in os.walk(root, onerror=_unless_gone, followlinks=True):
        try:
            status = os.stat(directory)
        except FileNotFoundError:  # removed since
            continue
        if (status.st_dev, status.st_ino) in visited:  # a link leads to where the walk has been
            directories.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        directories.sort()
        for name in names:
            file = _local_file(os.path.join(directory, name))
            if file is not None:
                yield file


def _unless_gone(error: OSError) -> None:
    """Pass over a directory that does not exist, or not any more, and no other."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _local_file(path: str) -> InputFile | None:
    """Describe a local file; None if it has been removed.

    Raises:
        InputError: It is not a regular file.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise
        return None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            f"{shown(path)} is a pipe, a socket or a device: remove it, or put a regular file in its place"
        )
    return InputFile(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def _write_local(path: Path, data: bytes, publish: Callable[[Path, Path], object]) -> None:
    """Write a hidden file beside `path`, on disk before it is published, and gone afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    for attempt in range(_MAX_VANISHED):
        try:
            with _room_for(path):
                _make_directory(path.parent)
                with temporary.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                publish(temporary, path)
                return
        except FileNotFoundError:  # another process has removed the directory since
            if attempt == _MAX_VANISHED - 1:
                raise
        finally:
            temporary.unlink(missing_ok=True)


def _publish_exclusively(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken.

    A hard link does so on all file systems that have any. Others are asked for a rename that replaces nothing.

    Raises:
        ConfigurationError: The file system has neither.
        FileExistsError: The name is taken.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_exclusively(temporary, path)


def _rename_exclusively(temporary: Path, path: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Python has no name for it
    arguments = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE)
    if rename is not None and rename(*arguments) == 0:
        return
    number = errno.ENOSYS if rename is None else ctypes.get_errno()
    if number not in _NO_HARD_LINKS:
        raise OSError(number, os.strerror(number), str(path))
    raise ConfigurationError(
        f"the file system of {shown(str(path.parent))} has neither hard links nor renames that replace nothing, so "
        "that two runs could mix there: choose an output on a local disk, on NFS or in S3"
    )


def _make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are missing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # it was there and has been removed; or it is a file
        raise FileNotFoundError(errno.ENOENT, "is no directory", str(path)) from error


@contextmanager
def _room_for(path: Path) -> Iterator[None]:
    """Say what to do about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        message = "no room left on the disk: make room, then run the same command again"
        raise OSError(error.errno, message, str(path)) from error


def _download_file(file: InputFile, relative: str, directory: Path) -> None:
    if any(part in ("", ".", "..") for part in relative.split("/")):
        raise ArtifactError(f"the object {shown(file.uri)} has no safe local name: remove it from the artifact")
    path = directory / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    s3.copy_to_local(file.uri, file.version, path)

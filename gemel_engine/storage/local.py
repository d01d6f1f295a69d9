"""Local files: atomic writes, exclusive creation, and reading of regular files only."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from gemel_engine.errors import ConfigurationError, shown

_MAX_VANISHED = 100
# Errors of os.link on file systems without hard links: exFAT, SMB, many in user space.
_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # Linux only
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OF_SYSTEM = (*NO_ROOM, errno.EIO, errno.EMFILE, errno.ENFILE)  # s3fs gives EIO to S3's answers


def open_regular(path: Path) -> BufferedReader:
    """Open a regular local file for reading; a pipe could block, and a device be endless.

    Raises:
        OSError: The path is not a regular file, or cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def write_local(path: Path, data: bytes, publish: Callable[[Path, Path], object]) -> None:
    """Write a hidden temporary file beside `path`, sync it to disk, and call `publish` on both."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    for attempt in range(_MAX_VANISHED):
        try:
            with explain_full_disk(path):
                _make_directory(path.parent)
                with temporary.open("xb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                publish(temporary, path)
                return
        except FileNotFoundError:  # another process has removed the directory
            if attempt == _MAX_VANISHED - 1:
                raise
        finally:
            temporary.unlink(missing_ok=True)


def publish_exclusively(temporary: Path, path: Path) -> None:
    """Give a temporary file its final name unless that exists.

    Uses a hard link, or a rename that replaces nothing on file systems without hard links.

    Raises:
        ConfigurationError: The file system supports neither.
        FileExistsError: The name exists.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _rename_exclusively(temporary, path)


def _rename_exclusively(temporary: Path, path: Path) -> None:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # not exposed by Python
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
    """Create a directory and its missing parents.

    Raises:
        FileNotFoundError: The path is a file, or was removed meanwhile.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # removed meanwhile, or a file
        raise FileNotFoundError(errno.ENOENT, "is no directory", str(path)) from error


def is_of_system(error: Exception) -> bool:
    """Return whether an error is of disk, network or process, and says nothing of a file's content."""
    return isinstance(error, OSError) and error.errno in _OF_SYSTEM


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Add a remedy to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        message = "no room left on the disk: make room, then run the same command again"
        raise OSError(error.errno, message, str(path)) from error

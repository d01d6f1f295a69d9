"""Files on a local disk or in S3, behind one set of functions.

An address is a local path (absolute, relative or `file:///...`) or `s3://bucket/key`. These
functions do not depend on the content of files.

Errors are the same for both kinds: FileNotFoundError for a missing file, ConfigurationError for an
unknown kind of address or refused credentials, OSError for any other failure.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pyarrow.fs import FileSystem, LocalFileSystem

from gemel_engine.config.addresses import RAY_WORKING_DIRECTORIES, local_path
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.storage import s3
from gemel_engine.storage.local import open_regular, publish_exclusively, write_local

SUFFIXES = (".parquet", ".parq", ".pq")
_TEXT_FILE = re.compile(r".*\.(csv|tsv|jsonl|ndjson|json)(\.(gz|bz2|zst))?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A stored file at the time of its listing.

    Attributes:
        uri: Absolute local path, or `s3://bucket/key`.
        size: Size in bytes.
        version: String that changes with the content: the ETag in S3, size and modification time on
            a local disk.
    """

    uri: str
    size: int
    version: str


def check_kept(uri: str) -> None:
    """Reject an address inside Ray's uploaded working directory; Ray deletes it after the job.

    Raises:
        ConfigurationError: The address is inside that directory.
    """
    path, here = local_path(uri), Path.cwd()
    if path is not None and RAY_WORKING_DIRECTORIES in here.parts and path.is_relative_to(here):
        raise ConfigurationError(
            f"{shown(uri)} is in the job's working directory, which Ray removes: give s3://bucket/prefix, or an "
            "absolute path that all nodes share"
        )


def check_apart(output: str, source: str) -> None:
    """Raise if a job would read its own output as input, now or when it is run again.

    Links are followed. Mentions that were found for the job, in `_mentions`, may be its input.

    Args:
        output: Directory that the job writes to; it need not exist.
        source: Table file or directory that the job reads.

    Raises:
        ConfigurationError: `output` is `source` or is inside of it where `list_parquet` would find
            its files, or `source` is in a directory of `output` that a job writes to.
    """
    root, target = normalised_uri(source), normalised_uri(output)
    is_read = any(_is_table(os.path.normpath(f"{place}/data/x.parquet")) for place in places_within(target, root))
    if is_read or any(re.match(r"(data|_(?!mentions/)[^/]*)(/|$)", place) for place in places_within(root, target)):
        raise ConfigurationError(
            f"the output {shown(output)} and the input {shown(source)} lie one in the other, so that the job would "
            "read what it writes: choose an output outside of the input"
        )


def resolve(uri: str) -> tuple[FileSystem, str]:
    """Return the pyarrow file system of an address and the path inside it.

    The S3 file system contains no secret: it is built from the environment, in another process too.
    """
    path = local_path(uri)
    if path is not None:
        return LocalFileSystem(), str(path)
    return s3.file_system(), uri.removeprefix("s3://").rstrip("/")


def list_parquet(uri: str) -> list[InputFile]:
    """List the Parquet file at an address, or all Parquet files below it, sorted by address.

    Below a directory, only files named `*.parquet`, `*.parq` or `*.pq` are listed, none whose name
    or directory begins with a dot or an underscore, except directories named `_key=value`. Links
    are followed; a directory with several links to it is read once.

    Raises:
        InputError: There is no Parquet file, or a local directory or link cannot be read.
    """
    if files := _list_files(uri, _is_table):
        return files
    raise InputError(
        f"no Parquet file at {shown(normalised_uri(uri))}: give a file, or a directory with files named *.parquet"
    )


def list_tables(uri: str) -> list[InputFile]:
    """List what `list_parquet` does, or if it lists nothing, CSV, TSV and JSON Lines by `text_format`.

    Files named `*.json` are tables only if they are named themselves. Errors are the same.
    """
    if not (files := _list_files(uri, _is_table) or _list_files(uri, _is_text)):
        raise InputError(
            f"no table at {shown(normalised_uri(uri))}: give a file, or a directory of *.parquet, *.csv, *.tsv or "
            "*.jsonl; relative paths begin at the working directory"
        )
    return files


def text_format(uri: str) -> str:
    """Return `csv`, `tsv`, `jsonl`, `ndjson` or `json` if a file's name says so, else ""."""
    return found[1].lower() if (found := _TEXT_FILE.fullmatch(uri)) else ""


def _list_files(uri: str, is_wanted: Callable[[str], bool]) -> list[InputFile]:
    """Return the file at an address, or the wanted ones below it by relative path, sorted."""
    root = normalised_uri(uri)
    if (single := find_file(root)) is not None:
        return [single]
    try:
        files = [file for file in walk_files(root) if is_wanted(relative_path(file, root))]
    except OSError as error:
        if root.startswith("s3://"):
            raise
        raise InputError(f"cannot list all of {shown(root)} ({error}): make it readable, or remove it") from error
    return sorted(files, key=lambda file: file.uri)


def partition_keys(uri: str, file: InputFile) -> list[str]:
    """Return the keys of the Hive partitions (`key=value`) that contain a listed file."""
    directories = relative_path(file, normalised_uri(uri)).split("/")[:-1]
    return [unquote(name.partition("=")[0]) for name in directories if "=" in name]


def list_files(uri: str) -> list[str]:
    """Return the relative paths of all files below a directory; empty if it does not exist."""
    root = normalised_uri(uri)
    return [relative_path(file, root) for file in walk_files(root)]


def exists(uri: str) -> bool:
    """Return whether there is a file at or below an address; an empty directory does not count."""
    root = normalised_uri(uri)
    return find_file(root) is not None or next(walk_files(root), None) is not None


def read_bytes(uri: str, limit: int | None = None, offset: int = 0) -> bytes:
    """Return the content of a file from a byte on, or at most `limit` bytes of it."""
    path = local_path(uri)
    if path is None:
        return s3.read_bytes(uri, limit, offset)
    with open_regular(path) as stream:
        stream.seek(offset)
        return stream.read(-1 if limit is None else limit)


def read_json(uri: str, remedy: str) -> Any:
    """Read a JSON file that a job keeps in its output.

    Raises:
        InputError: The file is missing or damaged; the message ends with `remedy`.
    """
    try:
        return json.loads(read_bytes(uri))
    except FileNotFoundError as error:
        raise InputError(f"{shown(uri)} is missing: {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{shown(uri)} is damaged ({error}): {remedy}") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace a file atomically: readers see the old or the new content, never a part."""
    path = local_path(uri)
    if path is None:
        s3.write_bytes(uri, data)
    else:
        write_local(path, data, Path.replace)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write a file unless it exists: one of several writers wins, and the file is always complete.

    Returns:
        Whether this call created the file. In S3, False may also mean that this call created the
        file, but the response was lost and the request was sent again.

    Raises:
        ConfigurationError: The file system cannot do this safely.
    """
    path = local_path(uri)
    if path is None:
        return s3.create_exclusive(uri, data)
    try:
        write_local(path, data, publish_exclusively)
    except FileExistsError:
        return False
    return True


def remove_tree(uri: str) -> None:
    """Remove a directory and its contents; do nothing if it does not exist.

    Files that other processes write meanwhile may remain.
    """
    root = normalised_uri(uri)
    if root.startswith("s3://"):
        s3.remove_tree(root)
    elif os.path.isdir(root):
        shutil.rmtree(root, onerror=_unless_others_are_there)


def _unless_others_are_there(_: object, path: str, raised: tuple[type, BaseException, object]) -> None:
    """Ignore errors of `rmtree` that other processes cause by removing or writing files."""
    error = raised[1]
    assert isinstance(error, OSError), "rmtree catches nothing else"
    is_made_anew = error.errno is None and not os.path.islink(path)  # rmtree reports such a directory as a link
    if not is_made_anew and error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
        raise error


def normalised_uri(uri: str) -> str:
    """Return the path of a local address, and any other address without trailing slashes."""
    path = local_path(uri)
    return uri.rstrip("/") if path is None else str(path)


def places_within(target: str, root: str) -> Iterator[str]:
    """Yield the paths of `target` relative to `root`, if inside; links in `root` are followed.

    Both addresses are normalised.
    """
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
    """Return whether two paths are the same file, also on a file system that ignores case."""
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return str(path) == os.path.realpath(other)


def relative_path(file: InputFile, root: str) -> str:
    """Return the address of a file relative to a normalised address above it."""
    return file.uri[len(root) + 1 :]


def _is_table(relative: str) -> bool:
    return relative.lower().endswith(SUFFIXES) and not _is_hidden(relative)


def _is_text(relative: str) -> bool:
    return text_format(relative) not in ("", "json") and not _is_hidden(relative)


def _is_hidden(relative: str) -> bool:
    *directories, name = relative.split("/")
    parts = [name, *(part for part in directories if "=" not in part)]
    return any(part.startswith((".", "_")) for part in parts)


def find_file(root: str) -> InputFile | None:
    """Return the file at a normalised address; None for a directory or a missing file."""
    if not root.startswith("s3://"):
        return _local_file(root) if os.path.isfile(root) else None
    found = s3.head(root)
    return None if found is None else InputFile(root, *found)


def walk_files(root: str) -> Iterator[InputFile]:
    """Yield all files below a normalised address, in no particular order."""
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
        if (status.st_dev, status.st_ino) in visited:  # a link to a directory that was visited
            directories.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        directories.sort()
        for name in names:
            file = _local_file(os.path.join(directory, name))
            if file is not None:
                yield file


def _unless_gone(error: OSError) -> None:
    """Ignore a directory that does not exist or was removed; raise any other error."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _local_file(path: str) -> InputFile | None:
    """Return a local file; None if it has been removed.

    Raises:
        FileNotFoundError: The path is a link to a missing file.
        InputError: The path is not a regular file.
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

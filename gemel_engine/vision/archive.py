"""Reads pictures of tar archives, such as the shards of WebDataset, without unpacking them.

The address of a picture is that of its archive, a `#`, and the name of the member:
`s3://bucket/shard-0001.tar#000123.jpg`. The places of all members are found once on each machine,
and kept in its artifact cache.

Archives are untrusted: headers are bounded, and only regular members are read, never links.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.errors import ImageFetchError, redacted, shown

_SUFFIX, _MARK = ".tar", "#"
_INDEX = "members.json"
_MAX_MEMBERS = 1_000_000
_MAX_HEADER_BYTES = 1 << 20


def split_address(uri: str) -> tuple[str, str]:
    """Return the address of an archive and the name of a member, "" if an address has none."""
    archive, mark, member = uri.partition(f"{_SUFFIX}{_MARK}")
    return (f"{archive}{_SUFFIX}", member) if mark else (uri, "")


def read_member(location: str, member: str, max_bytes: int) -> bytes:
    """Return the content of a member of an archive.

    Args:
        location: Local path or address in S3 of the archive.
        member: Name of the member.
        max_bytes: Maximum size of the member.

    Raises:
        ImageFetchError: The archive is missing or damaged, has no such member, or a larger one.
        OSError: The archive cannot be read.
        ConfigurationError: Access is refused.
    """
    file = storage.find_file(location)
    if file is None:
        raise ImageFetchError(f"{shown(location)}: no such file")
    found = _places(file.uri, file.version).get(member)
    if found is None:
        raise ImageFetchError(f"{shown(location)}: no regular member {member[:200]!r}")
    offset, size = found
    if size > max_bytes:
        raise ImageFetchError(f"{shown(location)}: member {member[:200]!r} is larger than max_bytes, {max_bytes}")
    return storage.read_bytes(location, size, offset) if size else b""


@lru_cache(maxsize=64)
def _places(uri: str, version: str) -> dict[str, list[int]]:
    """Return the offset and the size in bytes of each regular member, by name."""
    digest = hashlib.sha256(repr((uri, version)).encode()).hexdigest()[:16]
    directory = storage.made_once(storage.ARTIFACT_CACHE / f"archive-{digest}", lambda path: _write_index(uri, path))
    places: dict[str, list[int]] = json.loads((directory / _INDEX).read_text(encoding="ascii"))
    return places


def _write_index(uri: str, directory: Path) -> None:
    file_system, place = storage.resolve(uri)
    places = {}
    try:
        with (
            file_system.open_input_file(place) as source,
            tarfile.open(fileobj=_Headers(source), mode="r:") as archive,  # type: ignore[call-overload]
        ):
            for number, member in enumerate(archive):
                if number == _MAX_MEMBERS:
                    raise tarfile.TarError(f"it has more than {_MAX_MEMBERS} members")
                if member.isreg() and not member.issparse() and member.size >= 0:
                    places[member.name] = [member.offset_data, member.size]
                archive.members.clear()
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise ImageFetchError(f"{shown(uri)}: not a readable tar archive: {redacted(str(error), uri)}") from error
    (directory / _INDEX).write_text(json.dumps(places), encoding="ascii")


class _Headers:
    """The file of an archive, of which only headers of bounded size are read."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._source = source
        self.seek, self.tell = source.seek, source.tell

    def read(self, num_bytes: int) -> bytes:
        if num_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {num_bytes} bytes")
        data: bytes = self._source.read(num_bytes)
        return data

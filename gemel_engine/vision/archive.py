"""Reads pictures of tar archives, such as the shards of WebDataset, without unpacking them.

The address of a picture is that of its archive, a `#`, and the name of the member:
`s3://bucket/shard-0001.tar#000123.jpg`. The places of all members are found once on each machine,
and kept in its artifact cache.

Archives are untrusted: headers are bounded, and only regular members are read, never links.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import marisa_trie
import pyarrow as pa

from gemel_engine import storage
from gemel_engine.errors import ImageFetchError, redacted, shown

_SUFFIX, _MARK = ".tar", "#"
_PLACES, _DAMAGE = "places.marisa", "damage.txt"
_OFFSET_AND_SIZE = "<QQ"
_MAX_OPEN = 256  # each takes a file descriptor
_MAX_MEMBERS = 1_000_000
_MAX_HEADER_BYTES = 1 << 20


def split_address(uri: str) -> tuple[str, str]:
    """Return the address of an archive and the name of a member, "" if an address has none."""
    archive, mark, member = uri.partition(f"{_SUFFIX}{_MARK}")
    return (f"{archive}{_SUFFIX}", member) if mark else (uri, "")


def read_member(location: str, member: str, max_bytes: int) -> bytes:
    """Return the content of a member of an archive; of a damaged one, a member in front of the damage.

    Args:
        location: Local path or address in S3 of the archive.
        member: Name of the member.
        max_bytes: Maximum size of the member.

    Raises:
        ImageFetchError: The archive is missing, or has no such member that can be read, or a larger
            one.
        OSError: The archive cannot be read.
        ConfigurationError: Access is refused.
    """
    file = storage.find_file(location)
    if file is None:
        raise ImageFetchError(f"{shown(location)}: no such file")
    places, damage = _index(file.uri, file.version)
    found = places.get(member)
    if found is None and damage:
        raise ImageFetchError(
            f"{shown(location)}: not a readable tar archive: {damage}; no member {member[:200]!r} is in front of that: "
            "write the archive again"
        )
    if found is None:
        raise ImageFetchError(f"{shown(location)}: no regular member {member[:200]!r}")
    ((offset, size),) = found
    if size > max_bytes:
        raise ImageFetchError(f"{shown(location)}: member {member[:200]!r} is larger than max_bytes, {max_bytes}")
    return storage.read_bytes(location, size, offset) if size else b""


@lru_cache(maxsize=_MAX_OPEN)
def _index(uri: str, version: str) -> tuple[marisa_trie.RecordTrie, str]:
    """Return offset and size in bytes of regular members by name, and what keeps others from being found, or ""."""
    digest = hashlib.sha256(repr((uri, version)).encode()).hexdigest()[:16]
    directory = storage.made_once(storage.ARTIFACT_CACHE / f"members-{digest}", lambda path: _write_index(uri, path))
    places = marisa_trie.RecordTrie(_OFFSET_AND_SIZE).mmap(str(directory / _PLACES))
    return places, (directory / _DAMAGE).read_text(encoding="utf-8")


def _write_index(uri: str, directory: Path) -> None:
    file_system, place = storage.resolve(uri)
    places, damage = {}, ""
    with file_system.open_input_file(place) as source:
        try:
            for name, offset, size in _members(source):
                places[name] = offset, size
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            damage = redacted(str(error), uri)
    marisa_trie.RecordTrie(_OFFSET_AND_SIZE, places.items()).save(str(directory / _PLACES))
    (directory / _DAMAGE).write_text(damage, encoding="utf-8")


def _members(source: pa.NativeFile) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size in bytes of each whole regular member; raise where the archive is damaged."""
    num_bytes = source.size()
    with tarfile.open(  # type: ignore[call-overload]
        fileobj=_Headers(source),
        mode="r:",
        encoding="utf-8",
        errors="replace",  # no address asks for a name that is not UTF-8
    ) as archive:
        for number, member in enumerate(archive):
            if number == _MAX_MEMBERS:
                raise tarfile.TarError(f"it has more than {_MAX_MEMBERS} members")
            end = member.offset_data + member.size
            if member.isreg() and not member.issparse() and member.offset_data <= end <= num_bytes:
                yield member.name, member.offset_data, member.size
            archive.members.clear()
        source.seek(archive.offset)
        if source.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile takes a damaged header for the end
            raise tarfile.ReadError(f"no header at byte {archive.offset}")


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

"""Reads the lines of a text file, local or in S3, plain or compressed, in bounded memory."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pyarrow as pa
from tqdm import tqdm

from gemel_engine.config.addresses import local_path
from gemel_engine.errors import InputError, redacted, shown
from gemel_engine.storage.files import resolve
from gemel_engine.verbosity import bar_interval

MAX_LINE_BYTES = 64 << 20  # far above the largest item of Wikidata
_BUFFER_BYTES = 1 << 20
_LINES_PER_UPDATE = 1 << 12
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAGIC_NUMBERS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}


def read_lines(uri: str, *, keep_ends: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line, from 1, and its bytes without byte order mark.

    Args:
        uri: Address of the file: plain text, or compressed by gzip, bzip2 or Zstandard, as its
            first bytes show. A compressed file may consist of several streams.
        keep_ends: Whether to keep line feeds and carriage returns at the end of a line.

    Raises:
        InputError: The file does not exist, is damaged or cut off, or has a line of over 64 MiB.
    """
    number = 0
    with _open(uri) as source, _decompressed(source) as stream, _progress(uri, source) as progress:
        while True:
            try:
                line = stream.readline(MAX_LINE_BYTES)
            except OSError as error:
                raise InputError(
                    f"{shown(uri)} is damaged or cut off after line {number} ({redacted(str(error), uri)}): "
                    "download or write it again"
                ) from error
            if not line:
                return
            number += 1
            if len(line) == MAX_LINE_BYTES:
                raise InputError(
                    f"{shown(uri)}, line {number} has more than {MAX_LINE_BYTES >> 20} MiB: "
                    "give a file with one entity, row or triple on each line"
                )
            if number % _LINES_PER_UPDATE == 0:
                progress.update(source.tell() - progress.n)
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            yield number, line if keep_ends else line.rstrip(b"\r\n")


def _open(uri: str) -> pa.NativeFile:
    path = local_path(uri)
    if path is not None and path.exists() and not path.is_file():  # a pipe would block
        raise InputError(f"{shown(uri)} is no regular file: give the address of a file")
    file_system, place = resolve(uri)
    try:
        return file_system.open_input_file(place)
    except OSError as error:
        raise InputError(
            f"{shown(uri)} cannot be read ({redacted(str(error), uri)}): give the address of a file"
        ) from error


def _decompressed(source: pa.NativeFile) -> io.BufferedReader:
    start = source.read(max(map(len, _MAGIC_NUMBERS)))
    source.seek(0)
    codec = next((codec for number, codec in _MAGIC_NUMBERS.items() if start.startswith(number)), None)
    return io.BufferedReader(source if codec is None else pa.CompressedInputStream(source, codec), _BUFFER_BYTES)


def _progress(uri: str, source: pa.NativeFile) -> tqdm:
    name = uri.rstrip("/").rpartition("/")[2]
    total = source.size()
    return tqdm(desc=f"read {name}", total=total, unit="B", unit_scale=True, delay=5, mininterval=bar_interval())

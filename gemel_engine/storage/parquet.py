"""Opens every table of the engine: finds files, checks them, and reads them in pieces.

The footer of a file is checked before Arrow reads it, see `parquet_footer`.

The memory for a file is bounded, whatever its compression, dictionaries and nested nulls: at most
`_EXPANSION` times its size or `_ALWAYS_ALLOWED`, and `_PIECE_BYTES` or one row for a piece. Sizes
in the footer are trusted.

Columns are converted by the rules of `storage.columns`, so that files of different tools become one
table.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gemel_engine.config.addresses import local_path
from gemel_engine.errors import InputError
from gemel_engine.storage import files as storage
from gemel_engine.storage import s3
from gemel_engine.storage.columns import Column
from gemel_engine.storage.files import InputFile
from gemel_engine.storage.local import open_regular
from gemel_engine.storage.parquet_footer import EXTENSION_KEY
from gemel_engine.storage.table import Table, check_memory, explain_unreadable
from gemel_engine.storage.text import parquet_copy

_THREADS = 16  # they mostly wait for S3


def open_table(
    uri: str,
    columns: Mapping[str, Column] | None = None,
    required: Sequence[str] = (),
    *,
    file: InputFile | None = None,
) -> Table:
    """Open a table: a Parquet file, or a file in text, by its Parquet copy (see `text`).

    Args:
        uri: Address of the file.
        columns: See `Table`.
        required: See `Table`.
        file: The file as it was listed, if it was; an object in S3 must not have changed since.

    Raises:
        InputError: The file cannot be read, or `Table` rejects it.
    """
    with explain_unreadable(uri):
        path = local_path(uri)
        if path is not None and path.exists() and not path.is_file():
            raise InputError(f"{uri} is no regular file: give a Parquet file")  # a pipe would block
        is_text = bool(storage.text_format(uri))
        if is_text:
            file = file or storage.list_tables(uri)[0]
            uri = str(parquet_copy(file))
        if local_path(uri) is not None:
            file_system, place = storage.resolve(uri)
            source = file_system.open_input_file(place)
        elif file := file or storage.find_file(storage.normalised_uri(uri)):
            source = s3.open_file(file.uri, file.size, file.version)
        else:
            raise FileNotFoundError(uri)
    return _opened(source, file or InputFile(uri, source.size(), ""), columns, required, is_text=is_text)


def open_tables(uri: str, columns: Mapping[str, Column] | None = None, required: Sequence[str] = ()) -> Iterator[Table]:
    """Yield the tables at an address, one open at a time; in S3, the next ones are opened meanwhile.

    Args:
        uri: Address of a file or directory.
        columns: See `Table`.
        required: See `Table`.

    Raises:
        InputError: There is no table, `Table` rejects one, or a column is stored in the name
            of a directory (a Hive partition).
    """
    files = storage.list_tables(uri)
    waits = local_path(uri) is None and not storage.text_format(files[0].uri)  # copies of text take memory
    threads, ahead = ThreadPoolExecutor(_THREADS), deque[Future[Table]]()
    try:
        for number, file in enumerate(files):
            for next_file in files[number + len(ahead) : number + (_THREADS if waits else 1)]:
                ahead.append(threads.submit(open_table, next_file.uri, columns, required, file=next_file))
            with ahead.popleft().result() as table:
                for key in storage.partition_keys(uri, file):
                    if key in (columns or ()) and key not in table.names:
                        raise InputError(
                            f"{file.uri} has its {key!r} in the name of a directory: write it as a column of the file"
                        )
                yield table
    finally:
        threads.shutdown(cancel_futures=True)


def read_tables(
    uri: str, columns: Mapping[str, Column] | None, names: Sequence[str], required: Sequence[str] = ()
) -> pa.Table:
    """Read some columns of all tables at an address; a column that a file lacks is null.

    Raises:
        InputError: See `open_tables` and `Table.pieces`.
    """
    tables, num_bytes, stored_bytes = [], 0, 0
    for table in open_tables(uri, columns, required):
        tables.append(table.read(names))
        num_bytes += tables[-1].nbytes
        stored_bytes += table.file.size
        check_memory(uri, num_bytes, stored_bytes, "all rows")
    return pa.concat_tables(tables, promote_options="default")


def from_bytes(data: bytes, uri: str) -> pa.Table:
    """Read a Parquet file from its content, with all columns as they are stored.

    Raises:
        InputError: See `open_table`.
    """
    with _opened(pa.BufferReader(data), InputFile(uri, len(data), ""), None, ()) as table:
        return table.read()


def open_arrow(path: Path) -> pa.ipc.RecordBatchFileReader:
    """Open a local Arrow file, memory-mapped, unless it has extension types.

    Raises:
        OSError: The file does not exist or is not a regular file.
        pa.ArrowInvalid: The file is not an Arrow file, or has an extension type.
    """
    open_regular(path).close()
    source = pa.memory_map(str(path))
    size, tail = source.size(), 10  # length of the footer, magic number
    length = int.from_bytes(source.read_at(min(size, 4), max(0, size - tail)), "little")
    if EXTENSION_KEY in source.read_at(min(size, length + tail), max(0, size - tail - length)):
        raise pa.ArrowInvalid("it has a column of an Arrow extension type")
    return pa.ipc.open_file(source)


def _opened(
    source: pa.NativeFile,
    file: InputFile,
    columns: Mapping[str, Column] | None,
    required: Sequence[str],
    *,
    is_text: bool = False,
) -> Table:
    try:
        return Table(source, file, columns, required, is_text=is_text)
    except BaseException:
        source.close()
        raise


def parquet_bytes(table: pa.Table, row_group_size: int | None = None) -> bytes:
    """Return the content of a Parquet file with the rows of a table."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    return sink.getvalue()

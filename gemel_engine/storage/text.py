"""Reads tables in text: CSV, TSV and JSON Lines, plain or compressed.

The name of a file tells its format, such as `mentions.csv.gz`. A field of CSV may be quoted, in TSV
a quote is a character. The first line of both names the columns. CSV may have semicolons for commas.

Other readers get a copy in Parquet, which each machine makes once in its artifact cache. Its
columns are text: what JSON stores in another type is written as JSON, empty fields of CSV are null.
`parsing` makes numbers and lists of them, once it is known which column is which.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemel_engine.errors import InputError, shown
from gemel_engine.storage.cache import ARTIFACT_CACHE, made_once
from gemel_engine.storage.files import InputFile, find_file, text_format
from gemel_engine.storage.lines import MAX_LINE_BYTES, read_lines

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_FILE = "table.parquet"
_ROWS_PER_GROUP, _CHARACTERS_PER_GROUP = 1 << 16, 64 << 20

OnBadRow = Callable[[str, Exception], object]  # gets place and fault of a row that is left out
CheckNames = Callable[[list[str]], object]  # gets the names of the columns


def parquet_copy(file: InputFile) -> Path:
    """Return a local copy of a table, in Parquet with columns of text.

    Raises:
        InputError: The file is damaged, is not UTF-8, has a malformed row, or was replaced since it
            was listed.
    """
    digest = hashlib.sha256(repr((file.uri, file.version)).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", file.uri.rpartition("/")[2])[-80:]
    return made_once(ARTIFACT_CACHE / f"{name}-{digest}", lambda directory: _copy(file, directory)) / _FILE


def _copy(file: InputFile, directory: Path) -> None:
    names: dict[str, None] = {}
    while not _write(file.uri, directory / _FILE, names):
        pass  # a later line has names that the first lines lack
    if find_file(file.uri) != file:
        raise InputError(f"{shown(file.uri)} was replaced while it was read: run the same command again")


def _write(uri: str, path: Path, names: dict[str, None]) -> bool:
    """Write all rows; return False if some have other names, which are then in `names`."""
    groups = _groups(read_rows(uri, _refuse_rows_of(uri), lambda found: names.update(dict.fromkeys(found))))
    first = next(groups)
    names.update(dict.fromkeys(name for row in first for name in row))
    if not names:
        raise InputError(f"{shown(uri)} has no columns: give a table with a header, or with an object on each line")
    schema = pa.schema([(name, pa.large_string()) for name in names])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in chain([first], groups):
            names.update(dict.fromkeys(name for row in group for name in row))
            if len(names) == len(schema):
                columns = [pa.array([row.get(name) for row in group], pa.large_string()) for name in names]
                writer.write_table(pa.table(columns, schema=schema))
    return len(names) == len(schema)


def _groups(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[list[dict[str, str | None]]]:
    """Yield rows as text, in groups of bounded size."""
    group: list[dict[str, str | None]] = []
    num_characters = 0
    for _, row in rows:
        group.append({name: _text(value) for name, value in row.items()})
        num_characters += sum(map(len, filter(None, group[-1].values())))
        if len(group) == _ROWS_PER_GROUP or num_characters > _CHARACTERS_PER_GROUP:
            yield group
            group, num_characters = [], 0
    yield group


def _refuse_rows_of(uri: str) -> OnBadRow:
    def refuse(place: str, error: Exception) -> None:
        raise InputError(f"{shown(uri)}, {place} is malformed ({error}): correct it") from error

    return refuse


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def read_rows(uri: str, on_bad_row: OnBadRow, check_names: CheckNames) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place of each row, such as "line 3", and its values; empty lines are left out.

    Args:
        uri: Address of the file, whose name tells the format.
        on_bad_row: Called for a malformed row.
        check_names: Called with the names of the columns: in CSV and TSV before the first row, with
            repeated names; in JSON Lines after the last.

    Raises:
        InputError: The file cannot be read, has a malformed header, or is a JSON array.
    """
    delimiter = _DELIMITERS.get(text_format(uri))
    yield from (
        _json_rows(uri, on_bad_row, check_names)
        if delimiter is None
        else _csv_rows(uri, delimiter, on_bad_row, check_names)
    )


def _json_rows(uri: str, on_bad_row: OnBadRow, check_names: CheckNames) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: dict[str, None] = {}
    is_first = True
    for number, line in read_lines(uri):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            raise InputError(
                f"{shown(uri)}, line {number} begins a JSON array: write JSON Lines, one object on each line"
            )
        is_first = False
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            _check_encodable(row)
        except (ValueError, RecursionError) as error:
            on_bad_row(f"line {number}", error)
            continue
        seen |= dict.fromkeys(row)
        yield f"line {number}", row
    check_names(list(seen))


def _csv_rows(
    uri: str, delimiter: str, on_bad_row: OnBadRow, check_names: CheckNames
) -> Iterator[tuple[str, dict[str, Any]]]:
    # Escaped bytes that are not UTF-8 are found as lone surrogates, in the one row that has them.
    lines = (line.decode(errors="surrogateescape") for _, line in read_lines(uri, keep_ends=True))
    header_line = next(lines, "")
    if delimiter not in header_line and ";" in header_line and delimiter == ",":
        delimiter = ";"  # of spreadsheets where a comma separates decimals
    csv.field_size_limit(MAX_LINE_BYTES)
    chained = chain([header_line], lines)
    if delimiter == "\t":
        reader = csv.reader(chained, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(chained, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _check_encodable(header)
    except ValueError as error:
        raise InputError(f"{shown(uri)} is not UTF-8: save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(
            f"{shown(uri)}, line 1 names the columns and is malformed ({error}): write it again"
        ) from error
    check_names(header)
    if repeated := {name for name in header if header.count(name) > 1}:
        raise InputError(f"{shown(uri)} has the column {min(repeated)!r} more than once: keep one")
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
            if row is None:
                return
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields, but the header has {len(header)}")
            _check_encodable(row)
        except (csv.Error, ValueError) as error:
            on_bad_row(f"line {first}" if reader.line_num <= first else f"lines {first} to {reader.line_num}", error)
            continue
        if row:
            yield f"line {first}", dict(zip(header, (value or None for value in row), strict=True))


def _check_encodable(values: Iterable[object]) -> None:
    """Raise ValueError for text with a lone surrogate, in a CSV a byte that is not UTF-8."""
    try:
        for value in chain(values, values.values()) if isinstance(values, dict) else values:
            (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text that is not UTF-8") from error

"""Reads entities from any table: Parquet, CSV, TSV or JSON Lines.

The name of a file tells its format, such as `entities.csv.gz`; whatever is not named as one of text
is Parquet. Text may be compressed. Fields of CSV may be quoted; in TSV a quote is a character.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.importers.entities import SCHEMA, ImportedEntity, ImportReport, other_names
from gemel_engine.importers.lines import read_lines
from gemel_engine.storage.parquet import open_tables

_TEXT_FILE = re.compile(r".*\.(csv|tsv|jsonl|ndjson|json)(\.(gz|bz2|zst))?", re.IGNORECASE | re.DOTALL)
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_LISTS = ("aliases", "image_uri", "other_names")
_MAX_NAMES_SHOWN = 30

logger = logging.getLogger(__name__)

_Rows = Iterator[tuple[str, Mapping[str, Any]]]  # place, and values by the table's own names


def parse_columns(pairs: Sequence[str]) -> dict[str, str]:
    """Return the table's names of columns of `SCHEMA` from texts such as `name=title`.

    Raises:
        ConfigurationError: A text is of another form, or names another column or one twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, separator, theirs = pair.partition("=")
        if not separator or not theirs or name not in SCHEMA.names or name in columns:
            raise ConfigurationError(
                f"--columns is {pair!r}: give COLUMN=NAME_IN_THE_TABLE once for each of {', '.join(SCHEMA.names)}"
            )
        columns[name] = theirs
    return columns


def read_table(
    source: str, report: ImportReport, *, columns: Mapping[str, str], separator: str
) -> Iterator[ImportedEntity]:
    """Yield the entities of a table.

    Args:
        source: Address of the table; for Parquet, also of a directory.
        report: Receives the number of rows that are malformed, or lack an identifier or a name.
        columns: The table's names of columns of `SCHEMA`; the others have their own names.
        separator: Text between the items of lists in CSV and TSV.

    Raises:
        InputError: The table cannot be read, or lacks a column that is required or in `columns`.
    """
    names = {name: columns.get(name, name) for name in SCHEMA.names}
    required = {names[name] for name in ("entity_id", "name", *columns)}
    found = _TEXT_FILE.fullmatch(source)
    extension = "" if found is None else found[1].lower()
    if extension in _DELIMITERS:
        rows = _csv_rows(source, _DELIMITERS[extension], names.values(), required, report)
    elif extension:
        rows = _json_rows(source, names.values(), required, report)
    else:
        rows = _parquet_rows(source, names.values(), required)
    for place, row in rows:
        values: dict[str, Any] = {name: row.get(theirs) for name, theirs in names.items()}
        if extension in _DELIMITERS:
            values |= {name: values[name].split(separator) for name in _LISTS if values[name]}
        try:
            entity = _entity(values)
        except ValueError as error:
            report.add_unusable(f"{shown(source)}, {place}", error)
        else:
            yield entity


def _parquet_rows(source: str, names: Collection[str], required: Collection[str]) -> _Rows:
    for table in open_tables(source):
        _check_columns(table.file.uri, table.names, names, required)
        number = 0
        for piece in table.pieces(list(names)):
            try:
                rows = piece.to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"{shown(table.file.uri)} has text that is not UTF-8: write it again") from error
            for row in rows:
                yield f"row {number} of {shown(table.file.uri)}", row
                number += 1


def _json_rows(source: str, names: Collection[str], required: Collection[str], report: ImportReport) -> _Rows:
    seen: dict[str, None] = {}
    is_first = True
    for number, line in read_lines(source):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith(b"["):
            raise InputError(
                f"{shown(source)}, line {number} begins a JSON array: write JSON Lines, one object on each line"
            )
        is_first = False
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            report.add_unusable(f"{shown(source)}, line {number}", error)
            continue
        seen |= dict.fromkeys(row)
        yield f"line {number}", row
    _check_columns(source, seen, names, required)


def _csv_rows(
    source: str, delimiter: str, names: Collection[str], required: Collection[str], report: ImportReport
) -> _Rows:
    # Escaped bytes that are not UTF-8 are found as lone surrogates, in the one row that has them.
    lines = (f"{line.decode(errors='surrogateescape')}\n" for _, line in read_lines(source))
    if delimiter == ",":
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InputError(
            f"{shown(source)}, line 1 names the columns and is malformed ({error}): write it again"
        ) from error
    _check_columns(source, header, names, required)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
            if row is None:
                return
            if row and len(row) != len(header):
                raise csv.Error(f"{len(row)} fields, but the header has {len(header)}")
        except csv.Error as error:
            report.add_unusable(f"{shown(source)}, lines {first} to {reader.line_num}", error)
            continue
        if row:
            yield f"line {first}", dict(zip(header, row, strict=True))


def _check_columns(source: str, found: Collection[str], names: Collection[str], required: Collection[str]) -> None:
    """Raise if a table lacks a column or has it twice, and log which columns are not imported."""
    shown_names = ", ".join(map(repr, list(found)[:_MAX_NAMES_SHOWN]))
    if missing := [name for name in required if name not in found]:
        raise InputError(
            f"{shown(source)} has no column {', '.join(map(repr, sorted(missing)))}, only {shown_names}: "
            "name the right ones with --columns"
        )
    if repeated := [name for name in names if list(found).count(name) > 1]:
        raise InputError(f"{shown(source)} has the column {repeated[0]!r} more than once: keep one")
    if others := [name for name in found if name not in names]:
        logger.warning(
            "%s: columns not imported: %s; the columns that can be are %s, under other names with --columns",
            shown(source),
            ", ".join(map(repr, others[:_MAX_NAMES_SHOWN])),
            ", ".join(SCHEMA.names),
        )


def _entity(values: Mapping[str, Any]) -> ImportedEntity:
    """Return the entity of a row.

    Raises:
        ValueError: The identifier or name is missing, or a value is of another type.
    """
    texts = {name: _text(name, values[name]) for name in ("entity_id", "name", "description", "language")}
    for name in ("entity_id", "name"):
        if not texts[name].strip():
            raise ValueError(f"{name} is missing")
    lists = {name: _texts(name, values[name]) for name in _LISTS}
    return ImportedEntity(
        **texts,
        popularity=_number("popularity", values["popularity"]),
        aliases=list(other_names(texts["name"], lists["aliases"])),
        image_uri=list(dict.fromkeys(filter(None, lists["image_uri"]))),
        other_names=tuple(other_names(texts["name"], lists["other_names"])),
    )


def _text(name: str, value: object) -> str:
    """Return a text, "" for a null; an integer is a text, too."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} is {value!r:.50}, not a text")
    text = value or ""
    text.encode()  # raises for lone surrogates
    return text


def _texts(name: str, value: object) -> list[str]:
    return [_text(name, item) for item in (value if isinstance(value, list) else [value])]


def _number(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r:.50}, not a finite number")
    return number

"""Reads entities from any table: Parquet, CSV, TSV or JSON Lines.

The name of a file gives its format, such as `entities.csv.gz`; a file with any other name is read as
Parquet. Text may be compressed. Fields of CSV may be quoted; in TSV a quote is a character.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.importers.entities import SCHEMA, ImportedEntity, ImportReport, other_names
from gemel_engine.storage.files import text_format
from gemel_engine.storage.parquet import open_tables
from gemel_engine.storage.text import read_rows

_SEPARATED = ("csv", "tsv")
_LISTS = ("aliases", "image_uri", "other_names")
_MAX_NAMES_SHOWN = 30

logger = logging.getLogger(__name__)

_Rows = Iterator[tuple[str, Mapping[str, Any]]]  # place, and values by the table's own names


def parse_columns(pairs: Sequence[str], names: Collection[str] = tuple(SCHEMA.names)) -> dict[str, str]:
    """Return the table's names of the columns `names` from texts such as `name=title`.

    Raises:
        ConfigurationError: A text is of another form, or names another column or one twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, separator, theirs = pair.partition("=")
        if not separator or not theirs or name not in names or name in columns:
            raise ConfigurationError(
                f"--columns is {pair!r}: give COLUMN=NAME_IN_THE_TABLE once for each of {', '.join(names)}"
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
    if extension := text_format(source):
        rows: _Rows = read_rows(
            source,
            lambda place, error: report.add_unusable(f"{shown(source)}, {place}", error),
            lambda found: _check_columns(source, found, names.values(), required),
        )
    else:
        rows = _parquet_rows(source, names.values(), required)
    for place, row in rows:
        values: dict[str, Any] = {name: row.get(theirs) for name, theirs in names.items()}
        if extension in _SEPARATED:
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

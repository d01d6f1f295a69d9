"""Finds the columns of a table by the names that its file has for them, and names what is missing."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa

from gemel_engine.errors import InputError
from gemel_engine.storage.columns import Column
from gemel_engine.storage.parsing import UnparsedError

_MAX_NAMES_SHOWN = 30


def stored_names(schema: pa.Schema, columns: Mapping[str, Column] | None) -> dict[str, str]:
    """Return the file's name of each column that it has, by the column's own name.

    Args:
        schema: Schema of the file.
        columns: Columns to find, see `Column.stored_names`; None: all columns of the file.
    """
    if columns is None:
        return {name: name for name in schema.names}
    found = {}
    for name, column in columns.items():
        first, *others = column.stored_names or (name,)
        names = [first] if first in schema.names else []
        names += [
            other for other in others if schema.names.count(other) == 1 and column.takes(schema.field(other).type)
        ]
        if names:
            found[name] = names[0]
    return found


def missing_columns(uri: str, missing: Sequence[str], known: Sequence[str]) -> InputError:
    """Return the error for a table that lacks columns; it suggests the names nearest to them."""
    close = [f"{near[0]!r} for {name!r}" for name in missing if (near := difflib.get_close_matches(name, known, n=1))]
    meant = f" (did you mean {', '.join(close)}?)" if close else ""
    return InputError(
        f"{uri} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(known[:_MAX_NAMES_SHOWN])}"
        f"{meant}: rename or add them, or give the file's names in [columns] of a configuration"
    )


@contextmanager
def explain_unparsed(uri: str, column: str, first: int) -> Iterator[None]:
    """Add place and remedy to the error of a text that is no number or list.

    Args:
        uri: Address of the file.
        column: The file's name of the column.
        first: Number of the first row, from 0.
    """
    try:
        yield
    except UnparsedError as error:
        raise InputError(
            f"{uri}: column {column!r} is {error.text[:50]!r} in row {first + error.row}, counted from 1 without a "
            f"header; it must be {error.expected}: correct it"
        ) from error

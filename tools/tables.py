"""Tables of results in Markdown, each with the commands, commits and conditions of its figures."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from figures import Results, origin

from benchmarks.record import difference


@dataclass(frozen=True, slots=True)
class Column:
    """A column of values.

    Attributes:
        heading: Heading of the column.
        place: Reference of a cell, with `{row}` for the key of its row, or several that " | " separates.
        layout: Format of the cells.
    """

    heading: str
    place: str
    layout: str = ".3f"


@dataclass(frozen=True, slots=True)
class Compared:
    """A column of paired differences between the answers of a row and those of another one.

    Attributes:
        heading: Heading of the column.
        place: Reference of a row's digits, one for each mention, with `{row}` for the row's key.
        base: Key of the row that others are compared with.
        others: Rows that are compared with another one than `base`.
    """

    heading: str
    place: str
    base: str
    others: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of results.

    Attributes:
        text: Sentence above the table.
        columns: Columns after the first, which has the labels of the rows.
        rows: Labels of the rows and their keys.
    """

    text: str
    columns: Sequence[Column | Compared]
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Facts:
    """A table of single figures.

    Attributes:
        text: Sentence above the table.
        source: Name of the file of results.
        rows: Label, one or more places in the file, joined by " | ", and Python's format for them.
    """

    text: str
    source: str
    rows: Sequence[tuple[str, str, str]]


def rendered(table: Table | Facts, results: Results) -> str:
    """Return a table in Markdown, with what made its figures folded below."""
    shown = _table(table, results) if isinstance(table, Table) else _facts(table, results)
    return f"{textwrap.fill(table.text, 100)}\n\n{shown}"


def _table(table: Table, results: Results) -> str:
    lines = [_line(["", *(column.heading for column in table.columns)]), "|---" * (1 + len(table.columns)) + "|"]
    for label, row in table.rows:
        cells = [_cell(column, row, results) for column in table.columns]
        if not any(cells):
            raise LookupError(f"no result has a row {row!r}")
        lines.append(_line([label, *cells]))
    places = [column.place.format(row=row) for column in table.columns for _, row in table.rows]
    return "\n".join([*lines, "", *_origin(places, results)])


def _facts(facts: Facts, results: Results) -> str:
    lines = ["| measurement | result |", "|---|---|"]
    for label, places, layout in facts.rows:
        found = [results.show(f"{facts.source}/{place}", layout) for place in places.split(" | ")]
        lines.append(_line([label, " / ".join(found)]))
    origins = [f"{facts.source}/{place}" for _, places, _ in facts.rows for place in places.split(" | ")]
    return "\n".join([*lines, "", *_origin(origins, results)])


def _cell(column: Column | Compared, row: str, results: Results) -> str:
    if isinstance(column, Column):
        return _shown(column.place.format(row=row), column.layout, results)
    base = column.others.get(row, column.base)
    if row == base:
        return ""
    right, other = (results.look_up(column.place.format(row=key))[0] for key in (row, base))
    return difference(right, other) + ("" if base == column.base else f" ({base})")


def _shown(places: str, layout: str, results: Results) -> str:
    """Return the values at several references; those that were not measured are empty."""
    found = []
    for place in places.split(" | "):
        try:
            found.append(results.show(place, layout))
        except LookupError:
            found.append("")
    return " / ".join(found) if any(found) else ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(places: Iterable[str], results: Results) -> list[str]:
    """Return the distinct commands, commits and conditions behind the figures at some references."""
    found: dict[str, None] = {}
    for place in (part for places_ in places for part in places_.split(" | ")):
        try:
            _, record = results.look_up(place)
        except LookupError:
            continue
        found[f"- {origin(record)}: {record['conditions']}"] = None
    summary = "<summary>Command, commit and conditions</summary>"
    return ['<details markdown="1">', summary, "", *found, "", "</details>"]

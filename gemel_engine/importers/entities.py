"""The table of entities that every importer writes, and its report."""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gemel_engine.display import counts
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.storage import check_apart
from gemel_engine.storage.local import explain_full_disk

SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("popularity", pa.float64()),
        pa.field("aliases", pa.list_(pa.string())),
        pa.field("image_uri", pa.list_(pa.string())),
        pa.field("language", pa.string()),
        pa.field("other_names", pa.list_(pa.string())),
    ]
)
_ROWS_PER_GROUP = 1 << 16
_MAX_EXAMPLES = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedEntity:
    """One row of `SCHEMA`; empty text and empty lists are written as nulls.

    Attributes:
        entity_id: Identifier.
        name: Name in `language`.
        description: Description in `language`.
        popularity: Number by which entities of the same name are ranked.
        aliases: Other names, in any language, without duplicates.
        image_uri: Addresses of pictures, the best first.
        language: Language code of name and description.
        other_names: Those of the aliases that may be generated, too.
    """

    entity_id: str
    name: str
    description: str | None = None
    popularity: float | None = None
    aliases: Sequence[str] = ()
    image_uri: Sequence[str] = ()
    language: str | None = None
    other_names: Sequence[str] = ()


@dataclass(slots=True)
class ImportReport:
    """Counts of an import.

    Attributes:
        num_entities: Number of entities, or other rows, that were written.
        num_left_out: Number of well-formed entities that were left out, by reason.
        num_unusable: Number of malformed lines or rows.
        examples: Place and fault of the first few of them.
    """

    num_entities: int = 0
    num_left_out: Counter[str] = field(default_factory=Counter)
    num_unusable: int = 0
    examples: list[str] = field(default_factory=list)

    def add_unusable(self, place: str, fault: BaseException | str) -> None:
        """Count a malformed line or row."""
        self.num_unusable += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(f"{place}: {fault}")

    def add(self, other: ImportReport) -> None:
        """Add the counts of a later part of the same input."""
        self.num_entities += other.num_entities
        self.num_left_out += other.num_left_out
        self.num_unusable += other.num_unusable
        self.examples += other.examples[: _MAX_EXAMPLES - len(self.examples)]


def check_output(output: Path, inputs: Sequence[str]) -> None:
    """Raise if an output is not named as a Parquet file, or if an import reads it.

    Raises:
        ConfigurationError: The name ends in anything but `.parquet`, or the output is a directory or an
            input.
    """
    if output.suffix != ".parquet":
        raise ConfigurationError(f"the output {shown(str(output))} is not named *.parquet: name the output last")
    if output.is_dir():
        raise ConfigurationError(f"the output {shown(str(output))} is a directory: name a file")
    for source in inputs:
        check_apart(str(output), source)


def write_entities(output: Path, entities: Iterable[ImportedEntity], report: ImportReport) -> None:
    """Write a table of entities; see `write_rows`."""
    write_rows(output, entities, report, SCHEMA, "entities")


def write_rows(output: Path, found: Iterable[object], report: ImportReport, schema: pa.Schema, noun: str) -> None:
    """Write a table of rows as they are read, complete or not at all, and log the report.

    Args:
        output: Local Parquet file; an existing one is replaced.
        found: Rows; reading them fills in the report, except for their number.
        report: Report of the import.
        schema: Schema of the table, each column an attribute of the rows.
        noun: What the rows are, such as `entities`, for messages.

    Raises:
        InputError: There are no rows.
    """
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows = iter(found)
    try:
        with explain_full_disk(output), pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while group := list(islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(_table(group, schema))
                report.num_entities += len(group)
        if not report.num_entities:
            raise InputError(f"there are no {noun} to write to {shown(str(output))}; {_explained(report)}")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    if report.num_unusable:
        logger.warning("%d lines or rows are unusable, the first: %s", report.num_unusable, "; ".join(report.examples))
    logger.info("%s: %d %s; left out: %s", output, report.num_entities, noun, counts(report.num_left_out) or "none")


def _table(group: Sequence[object], schema: pa.Schema) -> pa.Table:
    columns = {name: [_stored(getattr(row, name)) for row in group] for name in schema.names}
    return pa.Table.from_pydict(columns, schema)


def _stored(value: object) -> object:
    return None if value == "" or value == () or value == [] else value


def _explained(report: ImportReport) -> str:
    left_out = [f"{number} left out: {reason}" for reason, number in report.num_left_out.items()]
    unusable = [f"{report.num_unusable} unusable, the first {report.examples[0]}"] if report.examples else []
    return "; ".join([*left_out, *unusable]) or "the input is empty: give the file that the command's --help describes"


def other_names(name: str, names: Iterable[str]) -> Iterator[str]:
    """Yield distinct names, without empty ones and without `name`, in the order given."""
    return (other for other in dict.fromkeys(names) if other.strip() and other != name)

"""Writes a finished run in a chosen format, one piece after the other."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from gemel_engine import storage
from gemel_engine.errors import ConfigurationError, shown
from gemel_engine.export import WIKIDATA, Format
from gemel_engine.export.documents import DOCUMENT_COLUMNS, Documents, blink_lines, elevant_lines, nif_lines
from gemel_engine.export.joined import JoinedRun
from gemel_engine.storage.files import normalised_uri, places_within
from gemel_engine.storage.local import explain_full_disk

_OF_SUFFIXES: dict[str, Format] = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ttl": "nif"}

logger = logging.getLogger(__name__)


def format_of(target: str) -> Format:
    """Return the format that the name of a file asks for.

    Raises:
        ConfigurationError: The name ends with no known suffix.
    """
    suffix = os.path.splitext(target)[1].lower()
    if suffix not in _OF_SUFFIXES:
        raise ConfigurationError(
            f"{shown(target)} ends with none of {', '.join(_OF_SUFFIXES)}: give --format, such as --format elevant"
        )
    return _OF_SUFFIXES[suffix]


def export_run(output: str, target: str, kind: Format, entity_prefix: str = WIKIDATA) -> int:
    """Write a finished run to one file; return the number of its rows.

    Args:
        output: Output directory of the run, local or `s3://`.
        target: File to write or replace, local or `s3://`.
        kind: Format of the file.
        entity_prefix: Beginning of the addresses of entities in NIF.

    Raises:
        InputError: The run has not finished, or its input is missing or has changed.
        ConfigurationError: The file would be among the run's own or those of its input.
    """
    if any(re.match(r"data(/|$)|_", place) for place in places_within(normalised_uri(target), normalised_uri(output))):
        raise ConfigurationError(f"{shown(target)} would be among the run's own files: choose another place")
    is_of_documents = kind in ("nif", "elevant", "blink")
    with TemporaryDirectory() as temporary, _replacing(target, Path(temporary)) as path:
        run = JoinedRun(output, path.parent, DOCUMENT_COLUMNS if is_of_documents else None)
        storage.check_apart(target, run.source)
        return _write_documents(run, path, kind, entity_prefix) if is_of_documents else _write_table(run, path, kind)


def _write_documents(run: JoinedRun, path: Path, kind: Format, entity_prefix: str) -> int:
    documents, num_rows = Documents(run, path.parent), run.num_rows
    if kind == "nif":
        lines = nif_lines(documents, entity_prefix)
    else:
        lines = elevant_lines(documents) if kind == "elevant" else blink_lines(documents)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)
    if documents.num_left_out:
        logger.warning("%d mentions are left out: they are not in their text", documents.num_left_out)
    return num_rows - documents.num_left_out


def _write_table(run: JoinedRun, path: Path, kind: Format) -> int:
    if kind == "parquet":
        with pq.ParquetWriter(path, run.schema, compression="zstd") as writer:
            for piece in run.pieces():
                writer.write_table(piece)
    elif kind == "csv":
        flat = pa.schema([field if _is_flat(field.type) else field.with_type(pa.string()) for field in run.schema])
        with pyarrow.csv.CSVWriter(str(path), flat) as writer:
            for piece in run.pieces():
                writer.write_table(pa.table([_flattened(column) for column in piece.columns], schema=flat))
    else:
        with path.open("w", encoding="utf-8") as stream:
            for piece in run.pieces():
                stream.writelines(f"{_json(row)}\n" for row in piece.to_pylist())
    return run.num_rows


@contextmanager
def _replacing(target: str, temporary: Path) -> Iterator[Path]:
    """Yield a temporary file whose content replaces the target when it is complete."""
    path = temporary / "export"
    with explain_full_disk(path):
        yield path
    place = storage.local_path(target)
    if place is not None:
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            with explain_full_disk(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, beside)  # may be another file system
                beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)
        return
    file_system, key = storage.resolve(target)
    with path.open("rb") as source, file_system.open_output_stream(key) as sink:
        shutil.copyfileobj(source, sink, 8 << 20)


def _is_flat(kind: pa.DataType) -> bool:
    return not pa.types.is_nested(kind)


def _flattened(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write lists and structs as JSON."""
    if _is_flat(column.type):
        return column
    return pa.chunked_array([[None if value is None else _json(value) for value in column.to_pylist()]], pa.string())


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)

"""The files of an update, and checks of the changes before writing and after reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.errors import ArtifactError, InputError, shown
from gemel_engine.knowledge_base.build import checked_entities
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS, ENTITY_SCHEMA, as_stored, earlier_schema
from gemel_engine.knowledge_base.store import FORMAT_VERSION, MANIFEST, WITHOUT_CHECKSUM
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256, parse_manifest, read_manifest

CHANGES = "changes.arrow"
CHANGES_SCHEMA = pa.schema(
    [
        *ENTITY_SCHEMA,
        pa.field("token_ids", pa.large_list(pa.uint32())),  # of the name; empty for a retired entity
        pa.field("is_retired", pa.bool_()),
    ]
)
_NUM_EXAMPLES = 5

_STRICT = ConfigDict(extra="forbid")


@pydantic_dataclass(frozen=True, slots=True, config=_STRICT)
class Base:
    """Address of the base, and its checksum when the update was written."""

    address: str
    sha256: str


@pydantic_dataclass(frozen=True, slots=True, config=_STRICT)
class UpdateManifest:
    """`knowledge_base.json` of an update, without the format version.

    Attributes:
        base: Knowledge base or update that is changed.
        kept_columns: Columns that the changes lack; replaced entities keep the base's values.
        changes_sha256: Checksum of the file with the changes.
        tokenizer_fingerprint: Fingerprint of the tokenizer of base and update.
        num_added: See `UpdateReport`, as the other counts.
    """

    base: Base
    kept_columns: list[Literal["description", "popularity", "language", "image_uri", "aliases"]]
    changes_sha256: str
    tokenizer_fingerprint: str
    num_added: int
    num_replaced: int
    num_retired: int
    num_skipped: dict[str, int]


def read_contents(directory: Path) -> dict[str, Any]:
    """Return the manifest of a knowledge base or an update; only an update has the key `base`."""
    return read_manifest(directory / MANIFEST, FORMAT_VERSION, without_checksum=WITHOUT_CHECKSUM)


def read_update_manifest(directory: Path) -> UpdateManifest:
    """Return the manifest of an update.

    Raises:
        ArtifactError: The manifest is missing or damaged, or is that of a knowledge base.
    """
    return parse_manifest(read_contents(directory), UpdateManifest, directory / MANIFEST)


def read_changes(directory: Path, manifest: UpdateManifest) -> pa.Table:
    """Return all changes, with the columns of `CHANGES_SCHEMA`; every byte is checked.

    Raises:
        ArtifactError: The file is missing, damaged, or does not fit the manifest.
    """
    path = directory / CHANGES
    try:
        with parquet.open_arrow(path) as reader:
            if reader.schema not in (CHANGES_SCHEMA, earlier_schema(CHANGES_SCHEMA)):
                raise ArtifactError(f"{path} has other columns than an update; write the update again")
            changes = reader.read_all()
        changes.validate(full=True)
        is_damaged = file_sha256(path) != manifest.changes_sha256
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); write the update again") from error
    if is_damaged or not _is_well_formed(changes):
        raise ArtifactError(f"{path} is damaged or not of its manifest; write the update again")
    return as_stored(changes)


def _is_well_formed(changes: pa.Table) -> bool:
    ids, token_ids = changes["entity_id"], changes["token_ids"]
    if not len(changes) or any(changes[name].null_count for name in ("entity_id", "name", "token_ids", "is_retired")):
        return False
    has_tokens = pc.greater(pc.list_value_length(token_ids), 0)
    return bool(
        pc.count_distinct(ids).as_py() == len(ids)
        and pc.list_flatten(token_ids).null_count == 0
        and pc.all(pc.xor(has_tokens, changes["is_retired"])).as_py()
    )


def check_same_columns(uri: str) -> None:
    """Raise unless all files of changes have the same columns, but for files without names, which only retire.

    Args:
        uri: Table file or directory of changes.

    Raises:
        InputError: Two files differ in their columns, so that values of the base would be lost: they
            are kept where the whole table lacks a column.
    """
    files: dict[frozenset[str], str] = {}
    for table in parquet.open_tables(uri, ENTITY_COLUMNS):
        if "name" in table.names:
            files.setdefault(frozenset(ENTITY_SCHEMA.names).intersection(table.names), table.file.uri)
    if len(files) > 1:
        (some, one), (others, other), *_ = files.items()
        raise InputError(
            f"of {shown(one)} and {shown(other)}, only one has the columns {', '.join(sorted(some ^ others))}: add "
            "them to the other, or write an update of each"
        )


def checked_changes(changes: pa.Table) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Return the entities as `checked_entities` does, and whether each is retired.

    The name of a retired entity is empty.

    Raises:
        InputError: As for `checked_entities`, or the column `retired` is not boolean.
    """
    if "name" not in changes.column_names:
        changes = changes.append_column("name", pa.nulls(len(changes), pa.large_string()))
    entities = checked_entities(changes)
    is_retired = pa.chunked_array([pa.repeat(False, len(changes))])
    if "retired" in changes.column_names:
        if not pa.types.is_boolean(found := changes["retired"].type):
            raise InputError(f"column 'retired' is of type {found}, it must be boolean: cast it")
        is_retired = pc.fill_null(changes["retired"], False)
    place = entities.column_names.index("name")
    entities = entities.set_column(
        place, "name", pc.if_else(is_retired, pa.scalar("", pa.large_string()), entities["name"])
    )
    return entities, is_retired.to_numpy()


def check_retired(ids: pa.ChunkedArray, is_retired: NDArray[np.bool_], is_known: NDArray[np.bool_], base: str) -> None:
    """Raise unless all retired entities are in the base.

    Raises:
        InputError: A retired entity is not in the base.
    """
    unknown = np.flatnonzero(is_retired & ~is_known)
    if len(unknown):
        examples = ids.take(pa.array(unknown[:_NUM_EXAMPLES])).to_pylist()
        raise InputError(
            f"{len(unknown)} retired entities are not in the knowledge base {shown(base)}, such as {examples}: correct "
            "their ids, or leave them out"
        )

"""Builds a knowledge base from a table of entities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import InputError, shown
from gemel_engine.knowledge_base.arrays import IntArray
from gemel_engine.knowledge_base.columns import (
    ENTITY_COLUMNS,
    ENTITY_SCHEMA,
    PICTURE_COLUMNS,
    STORED_SCHEMA,
    all_aliases,
    as_lists,
)
from gemel_engine.knowledge_base.names import (
    TokenisedNames,
    count_skipped,
    normalised_name,
    normalised_names,
    reasons_to_skip,
)
from gemel_engine.knowledge_base.other_names import OtherNames, tokenise_other_names
from gemel_engine.knowledge_base.store import FORMAT_VERSION, MANIFEST, TRIE_DIRECTORY
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import claimed, file_sha256, write_manifest
from gemel_engine.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnowledgeBaseReport:
    """Counts of a knowledge base that was built.

    Attributes:
        num_entities: Number of entities.
        num_names: Number of distinct names.
        longest_name: Number of tokens of the longest name.
        num_skipped: Number of entities left out, by reason.
        num_repeated_aliases: Number of aliases that an earlier row, or the same one, has too.
        num_aliases_like_names: Number of aliases that are the name of another entity.
        num_other_names: Number of names of entities besides their main names.
    """

    num_entities: int
    num_names: int
    longest_name: int
    num_skipped: dict[str, int]
    num_repeated_aliases: int
    num_aliases_like_names: int
    num_other_names: int = 0


def read_entities(uri: str, also: Sequence[str] = ()) -> pa.Table:
    """Read the columns of entities, and those in `also`, from all Parquet files at an address.

    Columns that the files lack are left out. Pictures are not read. A warning names columns that
    no command reads.

    Raises:
        InputError: There is no Parquet file, or one is unreadable or has a column of another type.
    """
    known = [*ENTITY_SCHEMA.names, *also]
    kinds = {name: ENTITY_COLUMNS[name] for name in (*known, *PICTURE_COLUMNS)}
    unknown: dict[str, None] = {}
    for table in parquet.open_tables(uri, kinds):
        unknown |= dict.fromkeys(name for name in table.names if name not in kinds)
    if unknown:
        logger.warning(
            "%s: columns that nothing reads: %s; the columns of entities are %s",
            shown(uri),
            ", ".join(unknown),
            ", ".join(kinds),
        )
    return parquet.read_tables(uri, {name: kinds[name] for name in known}, known)


def build_knowledge_base(
    entities: pa.Table, tokenizer: PreTrainedTokenizerFast, directory: Path, settings: KnowledgeBaseSettings
) -> KnowledgeBaseReport:
    """Write a knowledge base to a new directory.

    Names are normalised to Unicode's form NFC and stripped of surrounding white space. A name is
    unusable if it is empty, contains control or line-separating characters, U+FFFD or a prompt
    marker, is too long, or if its tokens contain a special token or do not decode to the name.

    Args:
        entities: Columns `entity_id` and `name`, and optionally others of `ENTITY_SCHEMA` and
            `other_names`, lists of further names that may be generated; unusable ones among these
            are left out. Other columns are ignored.
        tokenizer: Tokenizer of the language model.
        directory: New or empty directory.
        settings: How to treat unusable names.

    Raises:
        ConfigurationError: The directory is not empty, or another command is writing to it.
        InputError: A column is missing or of another type, an id is missing or not unique, text is
            not UTF-8, or names are unusable (all of them, if they are skipped).
    """
    with claimed(directory):
        fingerprint = tokenizer_fingerprint(tokenizer)
        other_names = _other_names(entities)
        entities = checked_entities(entities)
        if other_names is not None:
            aliases = map(all_aliases, entities["aliases"].to_pylist(), other_names.to_pylist())
            field = ENTITY_SCHEMA.field("aliases")
            entities = entities.set_column(
                entities.column_names.index("aliases"), field, [pa.array(list(aliases), field.type)]
            )
        names = TokenisedNames.tokenise(entities["name"], tokenizer)
        reasons = reasons_to_skip(entities["name"], names, tokenizer, settings.max_name_tokens)
        num_skipped = count_skipped(entities["entity_id"], reasons, settings.on_bad_name)
        is_kept = reasons == ""
        manifest = {"tokenizer_fingerprint": fingerprint, "vocabulary_size": len(tokenizer)}
        token_ids, offsets = names.select(is_kept)
        owners = np.zeros(0, np.intp)
        if other_names is not None:
            others = other_names.filter(pa.array(is_kept))
            other_ids, other_offsets, owners = tokenise_other_names(others, tokenizer, settings.max_name_tokens)
            token_ids = np.concatenate([token_ids, other_ids])
            offsets = np.concatenate([offsets, offsets[-1] + other_offsets[1:]])
        kept = entities.filter(pa.array(is_kept))
        return save_knowledge_base(directory, kept, (token_ids, offsets), manifest, num_skipped, owners)


def save_knowledge_base(
    directory: Path,
    entities: pa.Table,
    names: tuple[IntArray, IntArray],
    manifest: Mapping[str, object],
    num_skipped: dict[str, int],
    owners: NDArray[np.intp] | None = None,
) -> KnowledgeBaseReport:
    """Write a knowledge base from S entities with tokenised names.

    Args:
        directory: Directory to write to.
        entities: Rows of `ENTITY_SCHEMA`, in any order.
        names: Tokens of the rows' names and then of other names, as `PrefixTrie.build` takes them.
        manifest: Contents of the manifest besides counts and checksums.
        num_skipped: Number of entities left out, by reason.
        owners: Row in `entities` of each other name's entity; None: there are none.
    """
    trie, name_of_sequence = PrefixTrie.build(*names)
    name_of_row = name_of_sequence[: len(entities)]
    order = _order(entities, name_of_row)
    stored = _stored(entities, name_of_row, order)
    trie.save(directory / TRIE_DIRECTORY)
    path = directory / "entities.arrow"
    with pa.ipc.new_file(str(path), STORED_SCHEMA) as writer:
        writer.write_table(stored.combine_chunks())
    report = KnowledgeBaseReport(
        stored.num_rows,
        trie.num_names,
        trie.longest(0),
        num_skipped,
        *_count_aliases(stored["aliases"], stored["name"]),
    )
    checksums: dict[str, object] = {
        "entities_sha256": file_sha256(path),
        "trie_sha256": file_sha256(directory / TRIE_DIRECTORY / TRIE_MANIFEST),
    }
    if owners is not None and len(owners):
        place = np.argsort(order)  # row in the knowledge base of each of `entities`
        others = OtherNames.of(name_of_sequence[len(entities) :], place[owners], name_of_row[order])
        if len(others):
            checksums["other_names_sha256"] = others.save(directory)
            report = replace(report, num_other_names=len(others))
    write_manifest(directory / MANIFEST, FORMAT_VERSION, {**manifest, **checksums, **asdict(report)})
    return report


def checked_entities(entities: pa.Table) -> pa.Table:
    """Validate ids and types, and normalise names; return the columns of `ENTITY_SCHEMA`.

    Raises:
        InputError: A column is missing or of another type, an id is missing or not unique, or text
            is not UTF-8.
    """
    for required in ("entity_id", "name"):
        if required not in entities.column_names:
            raise InputError(f"the entities have no column {required!r}, only {entities.column_names}; add it")
    columns = []
    for column in ENTITY_SCHEMA:
        if column.name not in entities.column_names:
            columns.append(pa.nulls(len(entities), column.type))
            continue
        try:
            values = entities[column.name]
            values = (as_lists(values) if pa.types.is_list(column.type) else values).cast(column.type)
            values.validate(full=True)
        except (KeyError, pa.ArrowException) as error:
            raise InputError(f"column {column.name!r} is not valid {column.type} ({error}); correct it") from error
        columns.append(values)
    table = pa.table(columns, schema=ENTITY_SCHEMA)
    _check_ids(table["entity_id"])
    names = normalised_names(pc.fill_null(table["name"], ""))
    return table.set_column(table.column_names.index("name"), "name", names)


def _check_ids(ids: pa.ChunkedArray) -> None:
    if not len(ids):
        raise InputError("there are no entities; give a table with at least one row")
    is_missing = pc.equal(pc.fill_null(ids, ""), "")
    if pc.any(is_missing).as_py():
        raise InputError(f"row {pc.index(is_missing, True).as_py()} has no entity_id; give every entity a unique one")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
        raise InputError(
            f"{len(repeated)} entity ids occur more than once, such as {repeated[0].as_py()!r}; merge them"
        )


def _count_aliases(aliases: pa.ChunkedArray, names: pa.ChunkedArray) -> tuple[int, int]:
    """Return the number of repeated aliases, and of those that are names of other entities."""
    lists = aliases.combine_chunks()
    flat, own = pc.list_flatten(lists), names.combine_chunks().take(pc.list_parent_indices(lists))
    is_name = pc.and_(pc.is_in(flat, names.combine_chunks()), pc.not_equal(flat, own))
    num_repeated = len(flat) - flat.null_count - pc.count_distinct(flat).as_py()
    return num_repeated, pc.sum(is_name, min_count=0).as_py()


def _other_names(entities: pa.Table) -> pa.ChunkedArray | None:
    """Return the column `other_names` normalised as names are; None if no entity has any.

    Raises:
        InputError: The column does not contain lists of strings.
    """
    if "other_names" not in entities.column_names:
        return None
    found = entities["other_names"]
    try:
        lists = as_lists(found).cast(pa.list_(pa.large_string())).to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"column 'other_names' is not valid lists of strings ({error}); correct it") from error
    names = [list(dict.fromkeys(normalised_name(name) for name in row or () if name)) for row in lists]
    return pa.chunked_array([pa.array(names, pa.list_(pa.large_string()))]) if any(names) else None


def _order(entities: pa.Table, name_of_row: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the places of rows by name, descending popularity (unknown last), and id."""
    named = entities.append_column("name_index", pa.array(name_of_row.astype(np.uint32)))
    keys = [("name_index", "ascending"), ("popularity", "descending"), ("entity_id", "ascending")]
    order: NDArray[np.intp] = pc.sort_indices(named, sort_keys=keys).to_numpy().astype(np.intp)
    return order


def _stored(entities: pa.Table, name_of_row: NDArray[np.intp], order: NDArray[np.intp]) -> pa.Table:
    """Return the rows of `STORED_SCHEMA` in an order."""
    ordered = entities.take(pa.array(order))
    row_by_id = pc.sort_indices(ordered["entity_id"]).cast(pa.uint32())
    ordered = ordered.append_column("name_index", pa.array(name_of_row[order].astype(np.uint32)))
    return ordered.append_column("row_by_id", row_by_id).cast(STORED_SCHEMA)

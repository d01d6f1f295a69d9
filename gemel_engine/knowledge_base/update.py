"""Changes to a knowledge base, kept beside it: entities added, renamed or retired, in time proportional to these.

    knowledge_base.json     the base's address and checksum, counts, checksum of the changes; written last
    changes.arrow           one record batch: entities with the tokens of their names, and the ids of retired ones

An update stands wherever a knowledge base does. Where one is read it is merged with its base, once on each node, from
the tokens that both hold: the result is, to the bit of the trie, what building from the changed table would give. The
base of an update may be an update itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass
from transformers import PreTrainedTokenizerFast

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, shown
from gemel_engine.knowledge_base.build import KnowledgeBaseReport, checked_entities, save_knowledge_base
from gemel_engine.knowledge_base.names import TokenisedNames, count_skipped, reasons_to_skip
from gemel_engine.knowledge_base.store import (
    ENTITY_SCHEMA,
    FORMAT_VERSION,
    MANIFEST,
    TRIE_DIRECTORY,
    WITHOUT_CHECKSUM,
    KnowledgeBase,
)
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import claimed, file_sha256, parse_manifest, read_manifest, write_manifest
from gemel_engine.tokenizer import tokenizer_fingerprint

_CHANGES_SCHEMA = pa.schema(
    [
        *ENTITY_SCHEMA,
        pa.field("token_ids", pa.large_list(pa.uint32())),  # of the name; none for a retired entity
        pa.field("is_retired", pa.bool_()),
    ]
)
_OPTIONAL = [name for name in ENTITY_SCHEMA.names if name not in ("entity_id", "name")]
_CHANGES = "changes.arrow"
_NUM_EXAMPLES = 5


_STRICT = ConfigDict(extra="forbid")


@pydantic_dataclass(frozen=True, slots=True, config=_STRICT)
class _Base:
    """Where the base is, and the checksum that it had when the update was written."""

    address: str
    sha256: str


@pydantic_dataclass(frozen=True, slots=True, config=_STRICT)
class _Manifest:
    """`knowledge_base.json` of an update, without the format version.

    Attributes:
        kept_columns: Those that the changes did not have; the values of the base stay.
    """

    base: _Base
    kept_columns: list[Literal["description", "popularity", "image_uri", "aliases"]]
    changes_sha256: str
    tokenizer_fingerprint: str
    num_added: int
    num_replaced: int
    num_retired: int
    num_skipped: dict[str, int]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What an update changes.

    Attributes:
        num_added: Entities that the base lacks.
        num_replaced: Entities of the base with a new record: another name, description, popularity, ...
        num_retired: Entities of the base that are no more.
        num_skipped: Changes left out for their names, by reason.
    """

    num_added: int
    num_replaced: int
    num_retired: int
    num_skipped: dict[str, int]


def open_knowledge_base(uri: str, *, verify: bool = False) -> KnowledgeBase:
    """Open a knowledge base or an update, local or `s3://`; see `local_knowledge_base`.

    Args:
        uri: Address of the directory.
        verify: See `KnowledgeBase.open`.

    Raises:
        ArtifactError: As for `local_knowledge_base` and `KnowledgeBase.open`.
    """
    return KnowledgeBase.open(local_knowledge_base(uri), verify=verify)


def local_knowledge_base(uri: str, cache_dir: str | os.PathLike[str] = storage.ARTIFACT_CACHE) -> Path:
    """A local directory for `KnowledgeBase.open`: downloaded from S3, or an update merged with its base, where needed.

    Both are done once on a node and kept in `cache_dir`.

    Raises:
        ArtifactError: There is no knowledge base at the address, it is damaged, or its base is not the one that it was
            made for.
    """
    return _merged(storage.download_directory(uri, cache_dir), Path(cache_dir))


def update_knowledge_base(
    base: str,
    changes: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    settings: KnowledgeBaseSettings,
) -> UpdateReport:
    """Write an update of a knowledge base to a new directory; the base stays as it is, and has to stay where it is.

    Args:
        base: Address of a knowledge base, which may be an update.
        changes: The columns of `ENTITY_SCHEMA`, of which only `entity_id` is needed for a retired entity, and
            `retired`, true or not. A row with the id of an entity takes the place of its record; columns that the table
            lacks keep their values.
        tokenizer: The language model's.
        directory: Does not exist yet, or is empty.
        settings: What to do with unusable names; where they are skipped, their entities stay as they were.

    Raises:
        ArtifactError: The base is unusable, or was built with another tokenizer.
        ConfigurationError: The directory holds something, or another command is writing it.
        InputError: As for `build_knowledge_base`; or a retired entity is not in the base, or none would be left.
    """
    with claimed(directory):
        return _write_update(base, changes, tokenizer, directory, settings)


def _write_update(
    base: str,
    changes: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    settings: KnowledgeBaseSettings,
) -> UpdateReport:
    source = storage.download_directory(base)
    knowledge_base = KnowledgeBase.open(_merged(source, storage.ARTIFACT_CACHE))
    if knowledge_base.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ArtifactError(
            f"the knowledge base {shown(base)} was built with another tokenizer than {tokenizer.name_or_path!r}: give "
            "the one that it was built with"
        )
    entities, is_retired = _checked_changes(changes)
    found = knowledge_base.names_of_entities(entities["entity_id"].to_pylist())
    is_known = np.array([name is not None for name in found])
    _check_retired(entities["entity_id"], is_retired, is_known, base)
    names = TokenisedNames.tokenise(entities["name"], tokenizer)
    reasons = reasons_to_skip(entities["name"], names, tokenizer, settings.max_name_tokens)
    reasons[is_retired] = ""
    num_skipped = count_skipped(entities["entity_id"], reasons, settings.on_bad_name)
    is_kept = reasons == ""
    report = UpdateReport(
        num_added=int((is_kept & ~is_known).sum()),
        num_replaced=int((is_kept & is_known & ~is_retired).sum()),
        num_retired=int(is_retired.sum()),
        num_skipped=num_skipped,
    )
    if knowledge_base.num_entities + report.num_added == report.num_retired:
        raise InputError(f"the changes retire all entities of the knowledge base {shown(base)}: keep at least one")

    token_ids, offsets = names.select(is_kept)
    stored = entities.filter(pa.array(is_kept))
    stored = stored.append_column("token_ids", pa.LargeListArray.from_arrays(offsets, token_ids))
    stored = stored.append_column("is_retired", pa.array(is_retired[is_kept])).cast(_CHANGES_SCHEMA)
    with pa.ipc.new_file(str(directory / _CHANGES), _CHANGES_SCHEMA) as writer:
        writer.write_table(stored.combine_chunks())
    local = storage.local_path(base)
    manifest = {
        "base": {"address": str(local or base.rstrip("/")), "sha256": _checksum(str(source))},
        "kept_columns": [name for name in _OPTIONAL if name not in changes.column_names],
        "changes_sha256": file_sha256(directory / _CHANGES),
        "tokenizer_fingerprint": knowledge_base.tokenizer_fingerprint,
    }
    write_manifest(directory / MANIFEST, FORMAT_VERSION, manifest | asdict(report))
    return report


def compact_knowledge_base(update: str, directory: Path) -> KnowledgeBaseReport:
    """Write what an update and its base say together to a new directory: a knowledge base that needs neither.

    Raises:
        ArtifactError: The update or its base is unusable.
        ConfigurationError: The directory holds something, another command is writing it, or `update` is no update.
    """
    with claimed(directory):
        source = storage.download_directory(update)
        if "base" not in _contents(source):
            raise ConfigurationError(f"{shown(update)} is no update but a knowledge base: there is nothing to merge")
        manifest = _read_manifest(source)
        base = _merged(_download_base(source, manifest.base, storage.ARTIFACT_CACHE), storage.ARTIFACT_CACHE)
        return _merge(source, manifest, base, directory)


def _merged(directory: Path, cache_dir: Path) -> Path:
    """The directory itself, or for an update that of the cache in which it is merged with its base.

    Updates of updates are merged from the oldest on.
    """
    updates = []
    while "base" in _contents(directory):
        manifest = _read_manifest(directory)
        updates.append((directory, manifest))
        directory = _download_base(directory, manifest.base, cache_dir)
    for update, manifest in reversed(updates):
        content = json.dumps(asdict(manifest) | {"base": manifest.base.sha256}, sort_keys=True)
        target = cache_dir / f"{update.name}-merged-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        directory = storage.made_once(target, partial(_merge, update, manifest, directory))
    return directory


def _merge(directory: Path, manifest: _Manifest, base_directory: Path, target: Path) -> KnowledgeBaseReport:
    """Write a knowledge base: the changes of an update applied to its base, which is no update."""
    base, changes = KnowledgeBase.open(base_directory, verify=True), _read_changes(directory, manifest)
    if base.tokenizer_fingerprint != manifest.tokenizer_fingerprint:
        raise ArtifactError(f"the update {directory} and its base are of two tokenizers; write the update again")
    entities = base.table()
    kept = entities.filter(pc.invert(pc.is_in(entities["entity_id"], changes["entity_id"].combine_chunks())))
    new = changes.filter(pc.invert(changes["is_retired"]))
    if manifest.kept_columns:
        place = pc.index_in(new["entity_id"], entities["entity_id"].combine_chunks())  # null for an added entity
        for name in manifest.kept_columns:
            new = new.set_column(new.column_names.index(name), ENTITY_SCHEMA.field(name), entities[name].take(place))
    kept_tokens, kept_offsets = base.trie.sequences(kept["name_index"].to_numpy())
    new_tokens = new["token_ids"].combine_chunks()
    new_ends = kept_offsets[-1] + np.cumsum(pc.list_value_length(new_tokens).to_numpy())
    columns = ENTITY_SCHEMA.names
    return save_knowledge_base(
        target,
        pa.concat_tables([kept.select(columns), new.select(columns)]),
        (np.concatenate([kept_tokens, new_tokens.flatten().to_numpy()]), np.concatenate([kept_offsets, new_ends])),
        {
            "tokenizer_fingerprint": base.tokenizer_fingerprint,
            "vocabulary_size": _contents(base_directory).get("vocabulary_size"),
        },
        manifest.num_skipped,
    )


def _download_base(directory: Path, base: _Base, cache_dir: Path) -> Path:
    """The base as it was when the update was written.

    Raises:
        ArtifactError: It is not there, or another one is.
    """
    try:
        downloaded = storage.download_directory(base.address, cache_dir)
        is_same = _checksum(str(downloaded)) == base.sha256
    except (ArtifactError, FileNotFoundError) as error:
        raise _base_is_missing(directory, base) from error
    if not is_same:
        raise ArtifactError(
            f"{shown(base.address)} is another knowledge base than the update was written for: {_remedy(directory)}"
        )
    return downloaded


def _base_is_missing(directory: Path, base: _Base) -> ArtifactError:
    return ArtifactError(f"there is no knowledge base at {shown(base.address)}: {_remedy(directory)}")


def _remedy(directory: Path) -> str:
    return f"put the base of {directory} back, or write the update again"


def _checksum(uri: str) -> str:
    """SHA-256 of what a knowledge base says of itself, which holds the checksums of all its files."""
    manifests = [f"{uri}/{MANIFEST}", f"{uri}/{TRIE_DIRECTORY}/{TRIE_MANIFEST}"]  # the second where it is no update
    found = [storage.read_bytes(manifest) for manifest in manifests if storage.exists(manifest)]
    return hashlib.sha256(b"".join(found)).hexdigest()


def _contents(directory: Path) -> dict[str, Any]:
    """Return what a knowledge base or an update says of itself."""
    return read_manifest(directory / MANIFEST, FORMAT_VERSION, without_checksum=WITHOUT_CHECKSUM)


def _read_manifest(directory: Path) -> _Manifest:
    return parse_manifest(_contents(directory), _Manifest, directory / MANIFEST)


def _read_changes(directory: Path, manifest: _Manifest) -> pa.Table:
    """All changes, every byte of them checked; columns of `_CHANGES_SCHEMA`."""
    path = directory / _CHANGES
    try:
        with parquet.open_arrow(path) as reader:
            if reader.schema != _CHANGES_SCHEMA:
                raise ArtifactError(f"{path} has other columns than an update; write the update again")
            changes = reader.read_all()
        changes.validate(full=True)
        is_damaged = file_sha256(path) != manifest.changes_sha256
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"{path} is missing or damaged ({error}); write the update again") from error
    if is_damaged or not _is_well_formed(changes):
        raise ArtifactError(f"{path} is damaged or not of its manifest; write the update again")
    return changes


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


def _checked_changes(changes: pa.Table) -> tuple[pa.Table, NDArray[np.bool_]]:
    """Entities as `checked_entities` gives them, and whether each is retired; the name of such a one is empty."""
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


def _check_retired(ids: pa.ChunkedArray, is_retired: NDArray[np.bool_], is_known: NDArray[np.bool_], base: str) -> None:
    unknown = np.flatnonzero(is_retired & ~is_known)
    if len(unknown):
        examples = ids.take(pa.array(unknown[:_NUM_EXAMPLES])).to_pylist()
        raise InputError(
            f"{len(unknown)} retired entities are not in the knowledge base {shown(base)}, such as {examples}: correct "
            "their ids, or leave them out"
        )

"""Updates of a knowledge base: entities added, renamed or retired, in time linear in the change.

    knowledge_base.json     address and checksum of the base, counts, checksum of the changes;
                            written last
    changes.arrow           one record batch: changed entities with the tokens of their names, and
                            ids of retired entities

An update can be used in place of a knowledge base. When it is opened, it is merged with its base,
once on each node, from the tokens stored in both. The trie of the result is bit-identical to that
of a knowledge base built from the changed table. The base of an update may itself be an update.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, shown
from gemel_engine.knowledge_base.build import KnowledgeBaseReport, save_knowledge_base
from gemel_engine.knowledge_base.columns import ENTITY_SCHEMA
from gemel_engine.knowledge_base.names import TokenisedNames, count_skipped, reasons_to_skip
from gemel_engine.knowledge_base.store import (
    FORMAT_VERSION,
    MANIFEST,
    TRIE_DIRECTORY,
    KnowledgeBase,
)
from gemel_engine.knowledge_base.trie import MANIFEST as TRIE_MANIFEST
from gemel_engine.knowledge_base.update_files import (
    CHANGES,
    CHANGES_SCHEMA,
    Base,
    UpdateManifest,
    check_retired,
    checked_changes,
    read_changes,
    read_contents,
    read_update_manifest,
)
from gemel_engine.storage.manifest import claimed, file_sha256, write_manifest
from gemel_engine.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_OPTIONAL = [name for name in ENTITY_SCHEMA.names if name not in ("entity_id", "name")]


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Counts of an update.

    Attributes:
        num_added: Number of entities that the base lacks.
        num_replaced: Number of entities of the base with a new record (name, description, ...).
        num_retired: Number of entities of the base that are removed.
        num_skipped: Number of changes left out because their names are unusable, by reason.
    """

    num_added: int
    num_replaced: int
    num_retired: int
    num_skipped: dict[str, int]


@dataclass(frozen=True, slots=True)
class Companion:
    """What else lies in the directories of knowledge bases and updates, and is merged with them.

    Attributes:
        merge: Function that merges it: from the directories of an update, of its base (a knowledge
            base) and of the merged knowledge base.
        version: Function that returns a string that changes with what `merge` reads of an update
            and its base; empty if there is nothing to merge.
    """

    merge: Callable[[Path, Path, Path], object]
    version: Callable[[Path, Path], str]


def local_knowledge_base(
    uri: str, cache_dir: str | os.PathLike[str] = storage.ARTIFACT_CACHE, companion: Companion | None = None
) -> Path:
    """Return a local directory for `KnowledgeBase.open`.

    A directory in S3 is downloaded, and an update is merged with its base; both are done once on
    each node and kept in `cache_dir`.

    Args:
        uri: Address of the directory.
        cache_dir: Directory for downloads and merged knowledge bases.
        companion: What is merged beside the entities; None: nothing.

    Raises:
        ArtifactError: There is no knowledge base at the address, it is damaged, or its base is not
            the one that it was written for.
    """
    return _merged(storage.download_directory(uri, cache_dir), Path(cache_dir), companion)


def update_knowledge_base(
    base: str,
    changes: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    settings: KnowledgeBaseSettings,
    companion: Companion | None = None,
) -> UpdateReport:
    """Write an update of a knowledge base to a new directory.

    The base is not changed, and must stay at its address.

    Args:
        base: Address of a knowledge base or an update.
        changes: Columns of `ENTITY_SCHEMA`, and optionally a boolean column `retired`. A retired
            entity needs only `entity_id`. A row with the id of an existing entity replaces its
            record; columns that the table lacks keep their values.
        tokenizer: Tokenizer of the language model.
        directory: New or empty directory.
        settings: How to treat unusable names; a skipped change leaves its entity unchanged.
        companion: See `local_knowledge_base`; it is merged if the base is itself an update.

    Raises:
        ArtifactError: The base is unusable, or was built with another tokenizer.
        ConfigurationError: The directory is not empty, or another command is writing to it.
        InputError: As for `build_knowledge_base`; or a retired entity is not in the base, or no
            entity would remain.
    """
    with claimed(directory):
        return _write_update(base, changes, tokenizer, directory, settings, companion)


def _write_update(
    base: str,
    changes: pa.Table,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    settings: KnowledgeBaseSettings,
    companion: Companion | None,
) -> UpdateReport:
    source = storage.download_directory(base)
    knowledge_base = KnowledgeBase.open(_merged(source, storage.ARTIFACT_CACHE, companion))
    if knowledge_base.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise ArtifactError(
            f"the knowledge base {shown(base)} was built with another tokenizer than {tokenizer.name_or_path!r}: give "
            "the one that it was built with"
        )
    if len(knowledge_base.other_names) or "other_names" in changes.column_names:
        raise ConfigurationError(
            f"the knowledge base {shown(base)}, or its changes, have 'other_names', which updates can't change: build "
            "the knowledge base again from the whole table of entities"
        )
    entities, is_retired = checked_changes(changes)
    found = knowledge_base.names_of_entities(entities["entity_id"].to_pylist())
    is_known = np.array([name is not None for name in found])
    check_retired(entities["entity_id"], is_retired, is_known, base)
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
    stored = stored.append_column("is_retired", pa.array(is_retired[is_kept])).cast(CHANGES_SCHEMA)
    with pa.ipc.new_file(str(directory / CHANGES), CHANGES_SCHEMA) as writer:
        writer.write_table(stored.combine_chunks())
    local = storage.local_path(base)
    manifest = {
        "base": {"address": str(local or base.rstrip("/")), "sha256": _checksum(str(source))},
        "kept_columns": [name for name in _OPTIONAL if name not in changes.column_names],
        "changes_sha256": file_sha256(directory / CHANGES),
        "tokenizer_fingerprint": knowledge_base.tokenizer_fingerprint,
    }
    write_manifest(directory / MANIFEST, FORMAT_VERSION, manifest | asdict(report))
    return report


def compact_knowledge_base(update: str, directory: Path, companion: Companion | None = None) -> KnowledgeBaseReport:
    """Merge an update with its base into a new directory: a knowledge base that needs neither.

    Args:
        update: Address of the update.
        directory: New or empty directory.
        companion: See `local_knowledge_base`.

    Raises:
        ArtifactError: The update or its base is unusable.
        ConfigurationError: The directory is not empty, another command is writing to it, or
            `update` is a knowledge base.
    """
    with claimed(directory):
        source = storage.download_directory(update)
        if "base" not in read_contents(source):
            raise ConfigurationError(f"{shown(update)} is no update but a knowledge base: there is nothing to merge")
        manifest = read_update_manifest(source)
        cache_dir = storage.ARTIFACT_CACHE
        base = _merged(_download_base(source, manifest.base, cache_dir), cache_dir, companion)
        return _merge(source, manifest, base, companion, directory)


def _merged(directory: Path, cache_dir: Path, companion: Companion | None) -> Path:
    """Return the directory of a knowledge base, or of an update merged with its base in the cache.

    A chain of updates is merged from the oldest to the newest.
    """
    updates = []
    while "base" in read_contents(directory):
        manifest = read_update_manifest(directory)
        updates.append((directory, manifest))
        directory = _download_base(directory, manifest.base, cache_dir)
    for update, manifest in reversed(updates):
        version = "" if companion is None else companion.version(update, directory)
        companions = {"companion": version} if version else {}
        content = json.dumps(asdict(manifest) | {"base": manifest.base.sha256} | companions, sort_keys=True)
        target = cache_dir / f"{update.name}-merged-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        directory = storage.made_once(target, partial(_merge, update, manifest, directory, companion))
    return directory


def _merge(
    directory: Path, manifest: UpdateManifest, base_directory: Path, companion: Companion | None, target: Path
) -> KnowledgeBaseReport:
    """Apply the changes of an update to its base, a knowledge base, and write the result."""
    base, changes = KnowledgeBase.open(base_directory, verify=True), read_changes(directory, manifest)
    if base.tokenizer_fingerprint != manifest.tokenizer_fingerprint:
        raise ArtifactError(f"the update {directory} and its base are of two tokenizers; write the update again")
    entities = base.table()
    kept = entities.filter(pc.invert(pc.is_in(entities["entity_id"], changes["entity_id"].combine_chunks())))
    new = _with_kept_columns(changes.filter(pc.invert(changes["is_retired"])), manifest, entities)
    kept_tokens, kept_offsets = base.trie.sequences(kept["name_index"].to_numpy())
    new_tokens = new["token_ids"].combine_chunks()
    new_ends = kept_offsets[-1] + np.cumsum(pc.list_value_length(new_tokens).to_numpy())
    columns = ENTITY_SCHEMA.names
    report = save_knowledge_base(
        target,
        pa.concat_tables([kept.select(columns), new.select(columns)]),
        (np.concatenate([kept_tokens, new_tokens.flatten().to_numpy()]), np.concatenate([kept_offsets, new_ends])),
        {
            "tokenizer_fingerprint": base.tokenizer_fingerprint,
            "vocabulary_size": read_contents(base_directory).get("vocabulary_size"),
        },
        manifest.num_skipped,
    )
    if companion is not None:
        companion.merge(directory, base_directory, target)
    return report


def changed_records(directory: Path, base: KnowledgeBase) -> pa.Table:
    """Return the entities that an update adds or replaces as they are after it: `ENTITY_SCHEMA`.

    Args:
        directory: Local directory of the update.
        base: Its base, if need be merged.

    Raises:
        ArtifactError: The update is damaged.
    """
    manifest = read_update_manifest(directory)
    changes = read_changes(directory, manifest)
    new = _with_kept_columns(changes.filter(pc.invert(changes["is_retired"])), manifest, base.table())
    return new.select(ENTITY_SCHEMA.names)


def _with_kept_columns(changed: pa.Table, manifest: UpdateManifest, base: pa.Table) -> pa.Table:
    """Return changed entities with the base's values in the columns that the changes lacked."""
    place = pc.index_in(changed["entity_id"], base["entity_id"].combine_chunks())  # null for an added entity
    for name in manifest.kept_columns:
        position = changed.column_names.index(name)
        changed = changed.set_column(position, ENTITY_SCHEMA.field(name), base[name].take(place))
    return changed


def _download_base(directory: Path, base: Base, cache_dir: Path) -> Path:
    """Return a local directory with the base that the update was written for.

    Raises:
        ArtifactError: The base is missing, or another knowledge base is at its address.
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


def _base_is_missing(directory: Path, base: Base) -> ArtifactError:
    return ArtifactError(f"there is no knowledge base at {shown(base.address)}: {_remedy(directory)}")


def _remedy(directory: Path) -> str:
    return f"put the base of {directory} back, or write the update again"


def _checksum(uri: str) -> str:
    """Return a SHA-256 of a knowledge base's manifests, which contain checksums of all files."""
    manifests = [f"{uri}/{MANIFEST}", f"{uri}/{TRIE_DIRECTORY}/{TRIE_MANIFEST}"]  # an update has no trie
    found = [storage.read_bytes(manifest) for manifest in manifests if storage.exists(manifest)]
    return hashlib.sha256(b"".join(found)).hexdigest()

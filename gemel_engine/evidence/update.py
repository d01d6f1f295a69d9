"""The evidence of updates: vectors of added and replaced entities, merged with those of the base.

An update has a directory `evidence` if its base has embeddings or pictures, or if its changes have
features of pictures:

    update.json         checksum of the changes, encoder fingerprints, checksums of the parts; last
    part-*.parquet      vectors of added and replaced entities (see `parts`)

When the update is merged with its base, vectors of unchanged entities are carried over, and the
other indexes are built anew from the merged table.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine import storage
from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.index import (
    DESCRIPTIONS,
    DIRECTORY,
    MANIFEST,
    NAMES,
    PICTURES,
    EvidenceManifest,
    complete_evidence,
    entities_checksum,
    open_evidence,
)
from gemel_engine.evidence.parts import INDEXES, Kind, VectorParts
from gemel_engine.evidence.pictures import PictureIndex
from gemel_engine.knowledge_base import update as knowledge_base_update
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.update_files import read_changes, read_update_manifest
from gemel_engine.storage.manifest import file_sha256, parse_manifest, read_manifest, write_manifest

FORMAT_VERSION = 1
UPDATE_MANIFEST = "update.json"


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UpdateEvidence:
    """The contents of `update.json`.

    Attributes:
        changes: Checksum of the changes of the update.
        mention_encoder_fingerprint: Fingerprint of the encoder of the embeddings; None without.
        image_encoder_fingerprint: Fingerprint of the image encoder; None if unknown or without.
        files: Checksum of every part, by its name.
    """

    changes: str
    mention_encoder_fingerprint: str | None
    image_encoder_fingerprint: str | None
    files: dict[str, str]


def open_knowledge_base(uri: str, *, verify: bool = False) -> KnowledgeBase:
    """Open a knowledge base or an update, local or `s3://`; see `local_knowledge_base`."""
    return KnowledgeBase.open(local_knowledge_base(uri), verify=verify)


def local_knowledge_base(uri: str, cache_dir: str | os.PathLike[str] = storage.ARTIFACT_CACHE) -> Path:
    """Return a local directory for `KnowledgeBase.open` and `open_evidence`.

    As `knowledge_base.update.local_knowledge_base`; an update is merged with its base together with
    their evidence.
    """
    return knowledge_base_update.local_knowledge_base(uri, cache_dir, EVIDENCE)


def write_update_evidence(update: Path, parts: Sequence[str], base: EvidenceManifest) -> None:
    """Store the vectors of added and replaced entities with an update.

    Args:
        update: Directory of the update.
        parts: Addresses of the parts with the vectors; none if it only retires entities.
        base: Manifest of the base's evidence, whose encoders have computed them.
    """
    directory = update / DIRECTORY
    directory.mkdir()
    for number, part in enumerate(parts):
        (directory / f"part-{number:05d}.parquet").write_bytes(storage.read_bytes(part))
    manifest = UpdateEvidence(
        changes=read_update_manifest(update).changes_sha256,
        mention_encoder_fingerprint=base.mention_encoder_fingerprint,
        image_encoder_fingerprint=base.image_encoder_fingerprint,
        files={path.name: file_sha256(path) for path in sorted(directory.glob("part-*.parquet"))},
    )
    write_manifest(directory / UPDATE_MANIFEST, FORMAT_VERSION, asdict(manifest))


def has_vectors(evidence: EvidenceManifest) -> bool:
    """Return whether an evidence index has embeddings or pictures, so that updates need vectors."""
    has_encoder = evidence.mention_encoder_fingerprint or evidence.image_encoder_fingerprint
    return bool(has_encoder or evidence.num_pictures)


def merge_evidence(update: Path, base: Path, target: Path) -> None:
    """Write the evidence of a merged knowledge base, if its base has any.

    Args:
        update: Directory of the update.
        base: Directory of its base, a knowledge base.
        target: Directory of the merged knowledge base, in which its evidence is written.

    Raises:
        ArtifactError: Evidence is missing or damaged, or was computed with other encoders.
    """
    evidence = open_evidence(base, verify=True)
    if evidence is None:
        return
    changes = read_changes(update, read_update_manifest(update))
    entities = KnowledgeBase.open(target).table()
    ids = entities["entity_id"].combine_chunks()
    parts = VectorParts(_part_files(update, evidence.manifest), ids)
    new_rows = _rows_of(KnowledgeBase.open(base).table()["entity_id"], ids)
    directory = target / DIRECTORY
    directory.mkdir()
    unchanged = _without(new_rows, _rows_of(changes["entity_id"], ids))
    unpictured = _without(new_rows, parts.rows[parts.has_pictures])
    _merge(NAMES, evidence.names, parts, base, directory, unchanged, len(ids))
    _merge(DESCRIPTIONS, evidence.descriptions, parts, base, directory, unchanged, len(ids))
    _merge(PICTURES, evidence.pictures, parts, base, directory, unpictured, len(ids))
    complete_evidence(
        entities,
        directory,
        knowledge_base=entities_checksum(target),
        mention_encoder_fingerprint=evidence.manifest.mention_encoder_fingerprint,
        image_encoder_fingerprint=evidence.manifest.image_encoder_fingerprint,
    )


def _merge(
    kind: Kind,
    index: DenseIndex | PictureIndex | None,
    parts: VectorParts,
    base: Path,
    directory: Path,
    kept: NDArray[np.int64],
    num_rows: int,
) -> None:
    """Write an index of the vectors of a base that are kept and those of an update, if there are any.

    Args:
        kind: Kind of the vectors.
        index: Index of the base; None if it has no such vectors.
        parts: Vectors of the update.
        base: Directory of the base.
        directory: Directory of the merged evidence.
        kept: New row of each entity of the base; -1: its vectors are left out.
        num_rows: Number of entities after the update.
    """
    with parts.vectors(kind, directory / "vectors.tmp") as found:
        if index is None:
            if found is not None:
                INDEXES[kind].build(directory / kind, *found, num_rows)
        elif found is not None or (kept[index.entities] >= 0).any():
            more = found or (np.zeros((0, index.width), np.float32), np.zeros(0, np.uint32))
            index.merge(directory / kind, base / DIRECTORY / kind, kept, *more, num_rows)


def _version(update: Path, base: Path) -> str:
    paths = [base / DIRECTORY / MANIFEST, update / DIRECTORY / UPDATE_MANIFEST]
    found = [file_sha256(path) for path in paths if path.exists()]
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else ""


EVIDENCE = knowledge_base_update.Companion(merge_evidence, _version)


def _part_files(update: Path, base: EvidenceManifest) -> list[str]:
    """Return the paths of the parts of an update, after a check of every byte."""
    directory, remedy = update / DIRECTORY, "write the update again with `gemel update-kb`"
    if not directory.is_dir():
        if not has_vectors(base):
            return []
        raise ArtifactError(f"the base of {update} has embeddings or pictures, the update has none: {remedy}")
    path = directory / UPDATE_MANIFEST
    manifest = parse_manifest(read_manifest(path, FORMAT_VERSION), UpdateEvidence, path)
    if manifest.changes != read_update_manifest(update).changes_sha256:
        raise ArtifactError(f"{directory} is the evidence of another update: {remedy}")
    encoders = manifest.mention_encoder_fingerprint, manifest.image_encoder_fingerprint
    if encoders != (base.mention_encoder_fingerprint, base.image_encoder_fingerprint):
        raise ArtifactError(f"{directory} was computed with other encoders than the evidence of its base: {remedy}")
    for name, checksum in manifest.files.items():
        part = directory / Path(name).name
        if not part.is_file() or file_sha256(part) != checksum:
            raise ArtifactError(f"{part} is missing or damaged: {remedy}")
    return [str(directory / Path(name).name) for name in manifest.files]


def _rows_of(entity_ids: pa.ChunkedArray, ids: pa.Array) -> NDArray[np.int64]:
    """Return the row of each entity in `ids`; -1 for an entity that is not there."""
    found: NDArray[np.int64] = pc.fill_null(pc.index_in(entity_ids, ids), -1).to_numpy().astype(np.int64)
    return found


def _without(new_rows: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return new rows, -1 for those in `rows`."""
    return np.where(np.isin(new_rows, rows), -1, new_rows)

"""Builds, updates and merges knowledge bases with their evidence, so that a killed run goes on.

Everything is written beside its place and moved there at the end, the manifest of the knowledge
base last. What takes long, the vectors of entities, is written to the output in parts, which are
removed at the end:

    OUTPUT/evidence-parts/      vectors of entities (see `evidence.parts`)
    OUTPUT/.unfinished/         the other files; in S3, where they are in a temporary directory of
                                this machine: a mark that their upload has begun
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.evidence.index import (
    DIRECTORY,
    EvidenceIndex,
    EvidenceManifest,
    complete_evidence,
    entities_checksum,
    open_evidence,
)
from gemel_engine.evidence.parts import VectorParts, index_parts
from gemel_engine.evidence.update import EVIDENCE, has_vectors, local_knowledge_base, write_update_evidence
from gemel_engine.knowledge_base.build import KnowledgeBaseReport, build_knowledge_base, read_entities
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS
from gemel_engine.knowledge_base.other_names import FILE as OTHER_NAMES
from gemel_engine.knowledge_base.store import MANIFEST, TRIE_DIRECTORY, KnowledgeBase
from gemel_engine.knowledge_base.update import (
    UpdateReport,
    changed_records,
    compact_knowledge_base,
    update_knowledge_base,
)
from gemel_engine.knowledge_base.update_files import check_same_columns, read_update_manifest
from gemel_engine.pipeline.entity_vectors import (
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    EntityEncoders,
    encode_entities,
    features_width,
)
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import claimed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PARTS, _STAGING = "evidence-parts", ".unfinished"
_OURS = {_PARTS, _STAGING, TRIE_DIRECTORY, DIRECTORY, OTHER_NAMES, "entities.arrow", "changes.arrow", ".being-written"}
_ROWS_PER_READ = 128  # which may contain pictures

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Counts of a knowledge base that was built with its evidence.

    Attributes:
        knowledge_base: Counts of the knowledge base.
        evidence: Manifest of its evidence; None if it has none.
        num_unusable_pictures: Number of pictures that could not be fetched, decoded or used.
    """

    knowledge_base: KnowledgeBaseReport
    evidence: EvidenceManifest | None
    num_unusable_pictures: int = 0


def build(
    entities_uri: str,
    output: str,
    tokenizer: PreTrainedTokenizerFast,
    settings: KnowledgeBaseSettings,
    encoders: EntityEncoders | None,
) -> BuildReport:
    """Build a knowledge base and its evidence; go on with an unfinished build of the same.

    Args:
        entities_uri: Table file or directory of entities, local or `s3://`.
        output: New or empty directory, or one with an unfinished build; local or `s3://`.
        tokenizer: Tokenizer of the language model.
        settings: How to treat unusable names.
        encoders: Models of the evidence; None: a knowledge base without evidence.

    Raises:
        ArtifactError: An encoder can't be loaded.
        ConfigurationError: The output is not empty, or has an unfinished build with other arguments.
        InputError: The table is unusable, see `build_knowledge_base`.
    """
    storage.check_kept(output)
    output = _absolute(output)
    with _staged(output) as staging:
        report = build_knowledge_base(read_entities(entities_uri, also=("other_names",)), tokenizer, staging, settings)
        if encoders is None:
            return BuildReport(report, None)
        fingerprints = encoders.fingerprints()
        checksum = entities_checksum(staging)
        addresses: list[str] = []
        if encoders.mention_encoder or encoders.image_encoder or _has_features(entities_uri):
            identity = _identity(entities_uri, checksum, fingerprints)
            addresses = encode_entities(entities_uri, f"{output}/{_PARTS}", encoders, identity)
        entities = KnowledgeBase.open(staging).table()
        parts = VectorParts(addresses, entities["entity_id"].combine_chunks())
        index_parts(parts, staging / DIRECTORY, len(entities))
        mention_encoder, image_encoder = fingerprints
        evidence = complete_evidence(
            entities,
            staging / DIRECTORY,
            knowledge_base=checksum,
            mention_encoder_fingerprint=mention_encoder,
            image_encoder_fingerprint=image_encoder,
        )
        _warn_of_pictures(parts)
        return BuildReport(report, evidence.manifest, len(parts.faults))


def update(
    base: str,
    changes_uri: str,
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    settings: KnowledgeBaseSettings,
    encoders: EntityEncoders,
) -> UpdateReport:
    """Write an update of a knowledge base, with evidence if the base or the changes have vectors.

    Args:
        base: Address of a knowledge base or an update.
        changes_uri: Table file or directory of entities, and optionally the column `retired`.
        output: New or empty local directory, or one with an unfinished update.
        tokenizer: Tokenizer of the language model.
        settings: How to treat unusable names.
        encoders: Models of the base's evidence.

    Raises:
        ArtifactError: The base or an encoder is unusable.
        ConfigurationError: The encoders are not those of the base; or as for `build`.
        InputError: The changes are unusable, see `update_knowledge_base`; or their features are of
            another width than those of the base.
    """
    storage.check_kept(str(output))
    with _staged(_absolute(str(output))) as staging:
        check_same_columns(changes_uri)
        table = read_entities(changes_uri, also=("retired", "other_names"))
        base_directory = local_knowledge_base(base)
        evidence = open_evidence(base_directory)
        fingerprints = encoders.fingerprints()
        _check_encoders(base, None if evidence is None else evidence.manifest, fingerprints)
        width = _checked_width(base, evidence, changes_uri)
        report = update_knowledge_base(base, table, tokenizer, staging, settings, EVIDENCE)
        if evidence is None or not (has_vectors(evidence.manifest) or _has_features(changes_uri)):
            return report
        records = changed_records(staging, KnowledgeBase.open(base_directory, verify=True))
        addresses: list[str] = []
        if len(records):
            manifest = read_update_manifest(staging)
            identity = _identity(changes_uri, manifest.changes_sha256, fingerprints) | {
                "base": manifest.base.sha256,
                "kept_columns": manifest.kept_columns,
            }
            digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
            parts = output.absolute() / _PARTS
            written = parts / f"records-{digest}"
            _write_records(changes_uri, records, written, staging / "records")
            addresses = encode_entities(str(written), str(parts), encoders, identity, width)
        write_update_evidence(staging, addresses, evidence.manifest)
        _warn_of_pictures(VectorParts(addresses, records["entity_id"].combine_chunks()))
        return report


def compact(knowledge_base: str, output: Path) -> KnowledgeBaseReport:
    """Merge an update with its base, and their evidence, into a knowledge base that needs neither.

    Args:
        knowledge_base: Address of the update.
        output: New or empty local directory, or one with an unfinished merge.

    Raises:
        ArtifactError: The update or its base is unusable.
        ConfigurationError: The output is not empty, another command is writing to it, or
            `knowledge_base` is no update.
    """
    storage.check_kept(str(output))
    with _staged(_absolute(str(output))) as staging:
        return compact_knowledge_base(knowledge_base, staging, EVIDENCE)


@contextmanager
def _staged(output: str) -> Iterator[Path]:
    """Yield an empty local directory whose contents are moved to the output at the end.

    Raises:
        ConfigurationError: The output is not empty, or was finished but for what is then removed.
    """
    local = storage.local_path(output)
    with ExitStack() as stack:
        if local is None:
            names = {name.partition("/")[0] for name in storage.list_files(output)}
            staging = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gemel-kb-")))
        else:
            stack.enter_context(claimed(local, must_be_empty=False))
            names = {path.name for path in local.iterdir()}
            staging = local / _STAGING
            stack.callback(shutil.rmtree, staging, ignore_errors=True)
        left = names & {_PARTS, _STAGING}
        if left and MANIFEST in names and names <= {*_OURS, MANIFEST}:
            for name in left:
                storage.remove_tree(f"{output}/{name}")
            raise ConfigurationError(
                f"{shown(output)} was finished by a command that was killed at its end; what that left is now removed: "
                "use it, or name a new directory"
            )
        if names - {".being-written"} and not (left and names <= _OURS):
            raise ConfigurationError(f"{shown(output)} is not an empty directory; remove it or name a new one")
        for name in names - {".being-written", _PARTS, _STAGING}:  # of a publication that was killed
            if local is not None and not (local / name).is_dir():
                (local / name).unlink()
            else:  # does nothing to a single object in S3, which is replaced
                storage.remove_tree(f"{output}/{name}")
        if local is not None:
            storage.remove_tree(str(staging))
            staging.mkdir()
        yield staging
        if local is None:
            storage.write_bytes(f"{output}/{_STAGING}/upload", b"")
        storage.publish_directory(staging, output, MANIFEST)
        storage.remove_tree(f"{output}/{_PARTS}")
        if local is None:
            storage.remove_tree(f"{output}/{_STAGING}")


def _absolute(output: str) -> str:
    """Return an address that means the same in the working directories of all processes."""
    local = storage.local_path(output)
    return output.rstrip("/") if local is None else str(local.absolute())


def _has_features(entities_uri: str) -> bool:
    return any("image_features" in table.names for table in parquet.open_tables(entities_uri, ENTITY_COLUMNS))


def _checked_width(base: str, evidence: EvidenceIndex | None, changes_uri: str) -> int | None:
    """Return the width of the features of a base's pictures; None if it has none.

    Raises:
        InputError: The changes have features of another width.
    """
    if evidence is None and _has_features(changes_uri):
        logger.warning(
            "%s: image_features are left out, because the knowledge base %s has no evidence",
            shown(changes_uri),
            shown(base),
        )
    if evidence is None or evidence.pictures is None:
        return None
    width, given = evidence.pictures.width, features_width(changes_uri)
    if given not in (None, width):
        raise InputError(
            f"{shown(changes_uri)}: image_features hold {given} numbers, those of the knowledge base {shown(base)} "
            f"{width}: use the features of one image encoder"
        )
    return width


def _identity(source: str, checksum: str, fingerprints: tuple[str | None, str | None]) -> dict[str, Any]:
    """Return what the vectors of a table depend on."""
    files = [(file.uri, file.size, file.version) for file in storage.list_tables(source)]
    mention_encoder, image_encoder = fingerprints
    return {
        "entities": checksum,
        "files": sha256(repr(files).encode()).hexdigest(),
        "mention_encoder": mention_encoder,
        "image_encoder": image_encoder,
    }


def _check_encoders(base: str, evidence: EvidenceManifest | None, fingerprints: tuple[str | None, str | None]) -> None:
    """Raise unless the encoders are those of the base's evidence.

    Raises:
        ConfigurationError: An encoder is missing, unneeded or another one.
    """
    needed: tuple[str | None, str | None] = (None, None)
    if evidence is not None:
        needed = evidence.mention_encoder_fingerprint, evidence.image_encoder_fingerprint
    for option, wanted, given in zip(("--mention-encoder", "--image-encoder"), needed, fingerprints, strict=True):
        if wanted == given:
            continue
        if given is None:
            fault = f"was built with {option}: give that encoder"
        elif wanted is None:
            fault = f"was built without {option}: leave it out, or build the knowledge base again"
        else:
            fault = f"was built with another encoder: give {option} that one, or build the knowledge base again"
        raise ConfigurationError(f"the evidence of the knowledge base {shown(base)} {fault}")


def _write_records(changes_uri: str, records: pa.Table, directory: Path, scratch: Path) -> None:
    """Write changed entities with all their texts, and the pictures of their rows in the changes.

    Args:
        changes_uri: Table file or directory of the changes.
        records: The entities as they are after the update.
        directory: Output directory; nothing is done if it exists.
        scratch: Directory that becomes the output directory.
    """
    if directory.exists():
        return
    place_of = {entity_id: row for row, entity_id in enumerate(records["entity_id"].to_pylist())}
    texts = records.select(TEXT_COLUMNS)
    scratch.mkdir()
    for number, table in enumerate(parquet.open_tables(changes_uri, ENTITY_COLUMNS)):
        names = ["entity_id", *IMAGE_COLUMNS]
        schema = pa.schema([*texts.schema, *list(table.schema(names))[1:]])
        with pq.ParquetWriter(scratch / f"{number:05d}.parquet", schema, compression="zstd") as writer:
            for piece in table.pieces(names, max_rows=_ROWS_PER_READ):
                rows = [place_of.get(entity_id) for entity_id in piece["entity_id"].to_pylist()]
                found = texts.take(pa.array([row for row in rows if row is not None], pa.int64()))
                pictures = piece.filter(pa.array([row is not None for row in rows]))
                for name in pictures.column_names[1:]:
                    found = found.append_column(name, pictures[name])
                writer.write_table(found.cast(schema))
    directory.parent.mkdir(exist_ok=True)
    scratch.rename(directory)


def _warn_of_pictures(parts: VectorParts) -> None:
    if parts.faults:
        entity_id, reason = parts.faults[0]
        logger.warning(
            "%d pictures of entities are left out, such as one of %r: %s", len(parts.faults), entity_id, reason
        )

"""Build and open the evidence index of a knowledge base: a directory of search indexes.

    evidence.json   counts, encoder fingerprints, and checksums of all other files; written last
    dictionary/     names and aliases (see `dictionary`)
    lexical/        words of names and aliases (see `lexical`)
    names/          embeddings of names and aliases (see `dense`), optional
    descriptions/   embeddings of descriptions (see `dense`), optional
    pictures/       features of pictures (see `pictures`), optional
    popularity.npy  popularity of each entity, 0 where it is unknown, optional

An entity is identified by its row in the knowledge base, in whose directory the index is.

Shapes: S entities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ConfigDict, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.evidence.arrays import open_array
from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.dictionary import NameDictionary
from gemel_engine.evidence.lexical import LexicalIndex
from gemel_engine.evidence.pictures import PictureIndex
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.update_files import read_contents
from gemel_engine.storage.manifest import file_sha256, read_manifest, write_manifest

FORMAT_VERSION = 3
MANIFEST = "evidence.json"
DIRECTORY = "evidence"  # in the directory of the knowledge base
NAMES: Final = "names"
DESCRIPTIONS: Final = "descriptions"
PICTURES: Final = "pictures"
_POPULARITY = "popularity.npy"
_CHUNK = 1 << 13


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class EvidenceManifest:
    """The contents of `evidence.json`.

    Attributes:
        knowledge_base: Checksum of the entities that the index was built from: the
            `entities_sha256` of `knowledge_base.json`.
        num_entities: S, the number of entities.
        num_names: Number of names and aliases in the lexical index.
        num_embedded_names: Number of embedded names and aliases.
        num_descriptions: Number of embedded descriptions.
        num_pictures: Number of pictures.
        has_popularity: Whether the popularity of any entity is known.
        mention_encoder_fingerprint: `MentionEncoder.fingerprint`; None without embeddings.
        image_encoder_fingerprint: Fingerprint of the image encoder; None without pictures, or if
            their features were given with the entities.
        files: Checksum of every other file, by its relative path.
    """

    knowledge_base: str
    num_entities: PositiveInt
    num_names: int
    num_embedded_names: int
    num_descriptions: int
    num_pictures: int
    has_popularity: bool
    mention_encoder_fingerprint: str | None
    image_encoder_fingerprint: str | None
    files: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class EvidenceIndex:
    """The search indexes of a knowledge base's entities, mapped read-only.

    Attributes:
        manifest: Contents of `evidence.json`.
        dictionary: Index by name and alias.
        lexical: Index by the words of names and aliases.
        names: Index by the embeddings of names and aliases; None if built without a mention
            encoder.
        descriptions: Index by the embeddings of descriptions; None if there are none.
        pictures: Index by picture; None if built without pictures.
        popularity: Popularity of each entity, 0 where it is unknown, shape (S,); None if it is
            unknown for all.
    """

    manifest: EvidenceManifest
    dictionary: NameDictionary
    lexical: LexicalIndex
    names: DenseIndex | None = None
    descriptions: DenseIndex | None = None
    pictures: PictureIndex | None = None
    popularity: NDArray[np.float32] | None = None

    @classmethod
    def open(cls, directory: Path, *, knowledge_base: str | None = None, verify: bool = False) -> Self:
        """Map what `complete_evidence` wrote.

        Args:
            directory: Local directory; it may be read-only.
            knowledge_base: Expected checksum of the entities; None: not compared.
            verify: Whether to compare every file with its checksum, as is due once for files from
                elsewhere.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit
                the others.
        """
        path = directory / MANIFEST
        try:
            manifest = EvidenceManifest(**read_manifest(path, FORMAT_VERSION))
        except (TypeError, ValidationError) as error:
            raise ArtifactError(f"{path} is not the manifest of an evidence index ({error}); build it again") from error
        if knowledge_base is not None and manifest.knowledge_base != knowledge_base:
            raise ArtifactError(f"{directory} is the evidence index of another knowledge base; build it again")
        if verify:
            _check_files(directory, manifest.files)
        popularity = open_array(directory / _POPULARITY, np.float32, 1) if manifest.has_popularity else None
        if popularity is not None and len(popularity) != manifest.num_entities:
            raise ArtifactError(f"{directory / _POPULARITY} has {len(popularity)} values; build the index again")
        return cls(
            manifest,
            NameDictionary.open(directory / "dictionary"),
            LexicalIndex.open(directory / "lexical"),
            DenseIndex.open(directory / NAMES) if manifest.num_embedded_names else None,
            DenseIndex.open(directory / DESCRIPTIONS) if manifest.num_descriptions else None,
            PictureIndex.open(directory / PICTURES) if manifest.num_pictures else None,
            popularity,
        )

    def move_to_gpu(self) -> None:
        """Search embeddings and pictures on the current GPU from now on, where faiss can."""
        pictures = None if self.pictures is None else self.pictures.index
        for index in (self.names, self.descriptions, pictures):
            if index is not None:
                index.move_to_gpu()


def complete_evidence(
    entities: pa.Table,
    directory: Path,
    *,
    knowledge_base: str,
    mention_encoder_fingerprint: str | None = None,
    image_encoder_fingerprint: str | None = None,
) -> EvidenceIndex:
    """Write all of an evidence index but embeddings and pictures, which are there if it has any.

    Args:
        entities: Result of `KnowledgeBase.table()`: columns `name`, and optionally `aliases` and
            `popularity`.
        directory: Output directory, empty but for `names`, `descriptions` and `pictures`.
        knowledge_base: Checksum of these entities.
        mention_encoder_fingerprint: Fingerprint of the encoder of the embeddings; None without.
        image_encoder_fingerprint: Fingerprint of the encoder of `pictures`; None if unknown.

    Raises:
        InputError: There are no entities.
    """
    if not len(entities):
        raise InputError("there are no entities; give a table with at least one row")
    directory.mkdir(parents=True, exist_ok=True)
    NameDictionary.build(directory / "dictionary", _names_and_aliases(entities))
    names = ((row, text) for row, name, aliases in _names_and_aliases(entities) for text in (name, *aliases))
    lexical = LexicalIndex.build(directory / "lexical", names)
    has_popularity = "popularity" in entities.column_names and entities["popularity"].null_count < len(entities)
    if has_popularity:
        np.save(directory / _POPULARITY, _popularity(entities["popularity"]))
    manifest = EvidenceManifest(
        knowledge_base=knowledge_base,
        num_entities=len(entities),
        num_names=lexical.num_documents,
        num_embedded_names=_num_vectors(directory / NAMES),
        num_descriptions=_num_vectors(directory / DESCRIPTIONS),
        num_pictures=_num_vectors(directory / PICTURES),
        has_popularity=has_popularity,
        mention_encoder_fingerprint=mention_encoder_fingerprint,
        image_encoder_fingerprint=image_encoder_fingerprint,
        files={name: file_sha256(directory / name) for name in _files(directory)},
    )
    write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(manifest))
    return EvidenceIndex.open(directory)


def open_evidence(knowledge_base_directory: Path, *, verify: bool = False) -> EvidenceIndex | None:
    """Open the evidence index of a knowledge base; None if it was built without one.

    Args:
        knowledge_base_directory: Local directory of the knowledge base.
        verify: Whether to compare every file with its checksum, as is due once for files from
            elsewhere.

    Raises:
        ArtifactError: The index or the knowledge base is damaged, or the index is that of another
            knowledge base.
    """
    directory = knowledge_base_directory / DIRECTORY
    if not directory.is_dir():
        return None
    return EvidenceIndex.open(directory, knowledge_base=entities_checksum(knowledge_base_directory), verify=verify)


def changed_pictures(before: KnowledgeBase, after: KnowledgeBase) -> pa.Array:
    """Return the ids of the entities of both knowledge bases whose first pictures differ."""
    old = dict(_first_pictures(before))
    changed = [entity_id for entity_id, picture in _first_pictures(after) if old.pop(entity_id, None) != picture]
    kept = [entity_id for entity_id in sorted([*changed, *old]) if before.row_of_entity(entity_id) is not None]
    return pa.array(kept, pa.large_string())


def _first_pictures(knowledge_base: KnowledgeBase) -> Iterator[tuple[str, bytes]]:
    """Yield the id of each entity with pictures, and a hash of the features of its first one."""
    evidence = open_evidence(knowledge_base.directory)
    if evidence is not None and (pictures := evidence.pictures) is not None:
        rows, places = np.unique(pictures.entities, return_index=True)
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            features = pictures.features[place].tobytes()
            yield knowledge_base.entity_id(row), blake2b(features, digest_size=16).digest()


def entities_checksum(knowledge_base_directory: Path) -> str:
    """Return the checksum of a knowledge base's entities, from its manifest.

    Raises:
        ArtifactError: The manifest is missing or damaged.
    """
    return str(read_contents(knowledge_base_directory).get("entities_sha256"))


def embedded_names(name: str, aliases: Iterable[str | None] | None) -> list[str]:
    """Return the names and aliases of an entity that are embedded, each once."""
    return list(dict.fromkeys(text for text in (name, *(aliases or ())) if text))


def _num_vectors(directory: Path) -> int:
    return DenseIndex.open(directory).num_vectors if directory.is_dir() else 0


def _names_and_aliases(entities: pa.Table) -> Iterator[tuple[int, str, list[str]]]:
    row = 0
    has_aliases = "aliases" in entities.column_names
    for batch in entities.select(["name", "aliases"] if has_aliases else ["name"]).to_batches(max_chunksize=_CHUNK):
        aliases = batch["aliases"].to_pylist() if has_aliases else [None] * len(batch)
        for name, others in zip(batch["name"].to_pylist(), aliases, strict=True):
            yield row, name, [alias for alias in others or () if alias]
            row += 1


def _popularity(column: pa.ChunkedArray) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        values = column.fill_null(0.0).to_numpy().astype(np.float32)
    largest = float(np.finfo(np.float32).max)
    finite: NDArray[np.float32] = np.nan_to_num(values, nan=0.0, posinf=largest, neginf=0.0)
    return finite


def _files(directory: Path) -> list[str]:
    """Return the relative paths of all files of an index except its manifest."""
    paths = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(str(path.relative_to(directory)) for path in paths)


def _check_files(directory: Path, checksums: Mapping[str, str]) -> None:
    if sorted(checksums) != _files(directory):
        raise ArtifactError(f"the files in {directory} are not those of its {MANIFEST}; build the evidence index again")
    for name, checksum in checksums.items():
        if file_sha256(directory / name) != checksum:
            raise ArtifactError(f"{directory / name} has another checksum than {MANIFEST} gives; build it again")

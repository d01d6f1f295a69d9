"""Embeds the texts of entities and encodes their pictures, a part at a time.

A part is written once; a run that was killed goes on from the parts that exist. Several parts are
encoded by actors of Ray; one part on a CPU, as of a small update, is encoded in this process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine import storage
from gemel_engine.config.bounds import NumPixels
from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import ArtifactError, ConfigurationError, MentionError, shown
from gemel_engine.evidence.index import embedded_names
from gemel_engine.evidence.parts import make_part
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS, all_aliases
from gemel_engine.knowledge_base.names import normalised_name
from gemel_engine.pipeline.corpus import Shard, check_version, cut_file, version_of
from gemel_engine.storage import parquet
from gemel_engine.types import Features, are_features
from gemel_engine.vision.fetch import fetch_images

_ROWS_PER_PART = 1024
_ROWS_PER_READ = 128  # which may contain pictures
_PICTURES_PER_PASS = 16
_CPUS_PER_ACTOR = 2
TEXT_COLUMNS = ("entity_id", "name", "aliases", "description")
_READ = (*TEXT_COLUMNS, "other_names")
IMAGE_COLUMNS = ("image_features", "image_bytes", "image_uri")
_RECORD = "parts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityEncoders:
    """Which models compute the vectors of entities, and which pictures may be read.

    Attributes:
        mention_encoder: Sentence encoder of names, aliases and descriptions: local directory, or
            name on the model hub; None: without embeddings.
        image_encoder: open_clip architecture, or local directory in open_clip's layout; None:
            only features of the table are used.
        image_encoder_pretrained: Name of open_clip's weights, if the encoder is an architecture.
        device: torch device of both encoders.
        max_image_pixels: Maximum number of pixels of a decoded picture; a larger one is unusable.
        images: Which image addresses may be read.
    """

    mention_encoder: str | None = None
    image_encoder: str | None = None
    image_encoder_pretrained: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    max_image_pixels: NumPixels = 50_000_000
    images: ImagePolicy = field(default_factory=ImagePolicy)

    def fingerprints(self) -> tuple[str | None, str | None]:
        """Load the encoders and return the fingerprints of mention encoder and image encoder.

        Raises:
            ArtifactError: An encoder can't be loaded.
            ConfigurationError: An encoder is of a kind that cannot be used.
        """
        return EncodeEntities("", replace(self, device="cpu")).fingerprints


class EncodeEntities:
    """Writes a part: the vectors of a shard of entities.

    Args:
        parts: Address of the directory of the parts.
        encoders: Models and limits.
        expected: Fingerprints of the encoders at the start of the run; None: not compared.
        vision_width: Width of features of the table without an image encoder, whose width it is
            otherwise; None if none are usable.

    Raises:
        ArtifactError: An encoder can't be loaded, or is another one than at the start.
    """

    def __init__(
        self,
        parts: str,
        encoders: EntityEncoders,
        expected: tuple[str | None, str | None] | None = None,
        vision_width: int | None = None,
    ) -> None:
        from gemel_engine.retrieval.encoder import MentionEncoder
        from gemel_engine.vision.encoder import ImageEncoder, PictureEncoder

        self._parts, self._encoders = parts, encoders
        self._texts = self._pictures = None
        self._vision_width = vision_width
        if encoders.mention_encoder is not None:
            self._texts = MentionEncoder(encoders.mention_encoder, device=encoders.device)
        if encoders.image_encoder is not None:
            model = ImageEncoder(encoders.image_encoder, encoders.image_encoder_pretrained, device=encoders.device)
            self._vision_width = model.width
            self._pictures = PictureEncoder(model, encoders.max_image_pixels, _PICTURES_PER_PASS)
        models = self._texts, self._pictures
        text, image = (None if model is None else model.fingerprint for model in models)
        self.fingerprints = text, image
        if expected is not None and expected != self.fingerprints:
            raise ArtifactError(
                f"the encoders {encoders.mention_encoder!r} and {encoders.image_encoder!r} are others here than at the "
                "start of the run: give all nodes the same files"
            )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the parts of a table of shards; return the table."""
        for row in batch.to_pylist():
            self.write_part(Shard(**row))
        return batch

    def write_part(self, shard: Shard) -> None:
        """Encode a shard and write its part, unless it exists.

        Raises:
            InputError: The file has changed since the run was planned.
        """
        check_version(shard)
        with parquet.open_table(shard.uri, ENTITY_COLUMNS, ("entity_id",)) as table:
            has_pictures = not set(IMAGE_COLUMNS).isdisjoint(table.names)
            rows = range(shard.start, shard.stop)
            entities = table.read(_READ, rows)
            pictures = list(self._encoded(table.pieces(IMAGE_COLUMNS, rows, _ROWS_PER_READ))) if has_pictures else None
        check_version(shard)
        part = make_part(entities["entity_id"], *self._embedded(entities), pictures)
        storage.create_exclusive(f"{self._parts}/{shard.name}.parquet", parquet.parquet_bytes(part))

    def _embedded(self, entities: pa.Table) -> tuple[list[Features], list[Features]]:
        """Return the embeddings of the names, and of the description, of each entity, (number, E)."""
        names, descriptions = [], []
        for row in entities.to_pylist():
            others = (normalised_name(name) for name in row.get("other_names") or () if name)
            aliases = all_aliases(row.get("aliases"), others)
            names.append(embedded_names(normalised_name(row["name"] or ""), aliases))
            descriptions.append([text] if (text := row.get("description")) else [])
        return self._of_each(names), self._of_each(descriptions)

    def _of_each(self, texts: Sequence[Sequence[str]]) -> list[Features]:
        if self._texts is None:
            return [np.zeros((0, 0), np.float32)] * len(texts)
        vectors = self._texts.encode([text for of_entity in texts for text in of_entity])
        return np.split(vectors, np.cumsum([len(of_entity) for of_entity in texts])[:-1])

    def _encoded(self, pieces: Iterator[pa.Table]) -> Iterator[list[Features | MentionError]]:
        """Yield the features or errors of the pictures of each entity."""
        for piece in pieces:
            rows = piece.to_pylist()
            given = [[np.array(item, np.float64) for item in row.get("image_features") or () if item] for row in rows]
            files = [
                [] if features else [file for file in row.get("image_bytes") or row.get("image_uri") or () if file]
                for row, features in zip(rows, given, strict=True)
            ]
            encoded: Iterator[Features | MentionError | None] = iter(())
            if self._pictures is not None:
                everything = (file for of_entity in files for file in of_entity)
                encoded = iter(self._pictures.encode(fetch_images(everything, self._encoders.images)))
            for features, of_entity in zip(given, files, strict=True):
                found = [self._checked(item) for item in features]
                if self._pictures is not None:
                    found += [item for _ in of_entity if (item := next(encoded)) is not None]
                yield found

    def _checked(self, features: NDArray[np.float64]) -> Features | MentionError:
        """Return features of the table, or why they are unusable."""
        values, width = _as_features(features), self._vision_width or len(features)
        if are_features(values, width):
            return values
        return MentionError(f"image_features holds {len(features)} numbers: give {width} finite ones of at most 1e6")


def check_table(entities_uri: str, encoders: EntityEncoders, required: Sequence[str]) -> None:
    """Check a table of entities as far as that takes no model.

    Args:
        entities_uri: Table file or directory of entities.
        encoders: Models and limits.
        required: Columns that the table must have.

    Raises:
        ConfigurationError: Pictures are to be encoded, and no address of one may be read.
        InputError: The table is unreadable, or lacks a column.
    """
    reads_none = encoders.image_encoder is not None and not encoders.images.allowed_prefixes
    for table in parquet.open_tables(entities_uri, ENTITY_COLUMNS, required):
        if reads_none and "image_uri" in table.names and "image_bytes" not in table.names:
            raise ConfigurationError(
                f"{shown(entities_uri)} has addresses of pictures, and none may be read: name the places of these with "
                "--allowed-image-prefixes, or leave out --image-encoder"
            )


def features_width(entities_uri: str) -> int | None:
    """Return the width of the first usable `image_features` of a table; None if it has none.

    Raises:
        InputError: The table is unreadable.
    """
    for table in parquet.open_tables(entities_uri, ENTITY_COLUMNS):
        if "image_features" not in table.names:
            continue
        for piece in table.pieces(["image_features"], max_rows=_ROWS_PER_READ):
            for item in (item for items in piece["image_features"].to_pylist() for item in items or () if item):
                if are_features(_as_features(np.array(item, np.float64)), len(item)):
                    return len(item)
    return None


def _as_features(values: NDArray[np.float64]) -> Features:
    with np.errstate(over="ignore"):  # values too large become infinite
        return values.astype(np.float32)


def encode_entities(
    entities_uri: str,
    parts: str,
    encoders: EntityEncoders,
    identity: dict[str, Any],
    vision_width: int | None = None,
) -> list[str]:
    """Write the parts of a table of entities that do not exist yet; return the addresses of all.

    Args:
        entities_uri: Table file or directory of entities.
        parts: Address of the directory of the parts, which all nodes share.
        encoders: Models and limits.
        identity: What the parts depend on, with the fingerprints `mention_encoder` and
            `image_encoder`; a run goes on only from parts of equal identity.
        vision_width: Width of the features of the table; None: that of the first usable ones.
            Others are unusable.

    Raises:
        ArtifactError: An encoder can't be loaded.
        ConfigurationError: There are parts of another identity, or the nodes do not share them.
        InputError: A table is unreadable, or changes meanwhile.
    """
    claim_parts(parts, identity | asdict(encoders.images) | {"max_image_pixels": encoders.max_image_pixels})
    plan: list[Shard] = []
    for table in parquet.open_tables(entities_uri, ENTITY_COLUMNS, ("entity_id",)):
        plan += cut_file(table.file.uri, version_of(table.file), table.num_rows, _ROWS_PER_PART, len(plan))
    remaining = _remaining(plan, parts)
    if remaining and encoders.image_encoder is None and vision_width is None:
        vision_width = features_width(entities_uri)
    has_models = encoders.mention_encoder or encoders.image_encoder
    if has_models and (len(remaining) > 1 or (remaining and encoders.device == "cuda")):
        from gemel_engine.pipeline.ray_data import run_each

        expected = identity["mention_encoder"], identity["image_encoder"]
        num_gpus = 1 if encoders.device == "cuda" else 0
        arguments = parts, encoders, expected, vision_width
        shards = [asdict(shard) for shard in remaining]
        run_each(shards, EncodeEntities, arguments, num_cpus=_CPUS_PER_ACTOR, num_gpus=num_gpus)
    elif remaining:
        stage = EncodeEntities(parts, encoders, vision_width=vision_width)
        for shard in remaining:
            stage.write_part(shard)
    if missing := _remaining(plan, parts):
        raise ConfigurationError(
            f"{len(missing)} of {len(plan)} parts are not in {shown(parts)}: give an output that all nodes share"
        )
    return [f"{parts}/{shard.name}.parquet" for shard in plan]


def claim_parts(parts: str, identity: dict[str, Any]) -> None:
    """Record what the parts in a directory depend on, or compare it with the record.

    Raises:
        ConfigurationError: There are parts of another identity.
    """
    record = f"{parts}/{_RECORD}"
    text = json.dumps(identity, sort_keys=True)
    if storage.create_exclusive(record, text.encode()):
        return
    found = storage.read_json(record, f"remove {shown(parts)}")
    changed = sorted(name for name, value in json.loads(text).items() if name not in found or found[name] != value)
    if changed:
        raise ConfigurationError(
            f"{shown(parts)} has parts of an unfinished run with another {', '.join(changed)}: remove it, or give the "
            "arguments of that run"
        )


def _remaining(plan: Sequence[Shard], parts: str) -> list[Shard]:
    finished = set(storage.list_files(parts))
    return [shard for shard in plan if f"{shard.name}.parquet" not in finished]

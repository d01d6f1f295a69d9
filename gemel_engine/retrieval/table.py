"""The table of demonstrations on disk: its columns, its metadata, and the checks of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass as pydantic_dataclass

from gemel_engine.config.bounds import Width
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.knowledge_base.names import are_demonstrable
from gemel_engine.types import CARD_PREFIX, are_features

TEXT_COLUMNS = ("mention_id", "text", "mention", "entity_id", "entity_name", "group")

FloatArray = NDArray[np.float32]
SIMILARITY_DECIMALS = 5  # of cosines, before ties are broken: the last bits depend on the machine


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A training mention with its answer.

    Attributes:
        mention_id: Unique among the demonstrations.
        mention: The surface form.
        name: The entity's name, the target.
        group: Group whose mentions do not get it in training; the `mention_id` if it has none.
        features: Image features (C,), read-only; None without a usable picture.
    """

    mention_id: str
    text: str
    mention: str
    entity_id: str
    name: str
    group: str
    features: FloatArray | None = None


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class IndexMetadata:
    """Describes the table of an index; stored beside it as JSON.

    Attributes:
        num_demonstrations: N, the number of rows.
        num_surface_forms: M, the number of distinct surface forms.
        num_images: Number of demonstrations with image features.
        surface_width: E, the width of the mention encoder.
        vision_width: C, the width of image features; None if the index was built without pictures.
        mention_encoder_fingerprint: `MentionEncoder.fingerprint`; queries must come from the same
            encoder.
        image_encoder_fingerprint: Fingerprint of the image encoder; None if unknown or without
            pictures.
        table_sha256: SHA-256 of the Parquet file.
    """

    num_demonstrations: PositiveInt
    num_surface_forms: PositiveInt
    num_images: int
    surface_width: Width
    vision_width: Width | None
    mention_encoder_fingerprint: str
    image_encoder_fingerprint: str | None
    table_sha256: str


def shuffled_by_form(demonstration: Demonstration) -> tuple[str, bytes]:
    """Return a sort key: the surface form, then a hash.

    Neighbours in a corpus often come from one document, so their order is not kept.
    """
    return demonstration.mention, sha256(demonstration.mention_id.encode()).digest()


def _schema(surface_width: int, vision_width: int | None) -> pa.Schema:
    fields = [pa.field(column, pa.string(), nullable=False) for column in TEXT_COLUMNS]
    fields.append(pa.field("surface_embedding", pa.list_(pa.float32(), surface_width), nullable=False))
    if vision_width is not None:
        fields.append(pa.field("image_features", pa.list_(pa.float32(), vision_width)))
    return pa.schema(fields)


def make_table(demonstrations: Sequence[Demonstration], embeddings: FloatArray, vision_width: int | None) -> pa.Table:
    """Return demonstrations and the embeddings (N, E) of their surface forms as a table."""
    columns = [
        pa.array([d.mention_id for d in demonstrations]),
        pa.array([d.text for d in demonstrations]),
        pa.array([d.mention for d in demonstrations]),
        pa.array([d.entity_id for d in demonstrations]),
        pa.array([d.name for d in demonstrations]),
        pa.array([d.group for d in demonstrations]),
        pa.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1]),
    ]
    if vision_width is not None:
        absent = np.zeros(vision_width, np.float32)
        features = [absent if d.features is None else d.features for d in demonstrations]
        mask = pa.array([d.features is None for d in demonstrations])
        columns.append(pa.FixedSizeListArray.from_arrays(np.concatenate(features), vision_width, mask=mask))
    return pa.table(columns, schema=_schema(embeddings.shape[1], vision_width))


def as_matrix(column: pa.ChunkedArray, width: int) -> FloatArray:
    """Return the rows of a column of fixed-size lists; a missing row has arbitrary values."""
    values: FloatArray = column.combine_chunks().values.to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)


def vision_width_of(demonstrations: Sequence[Demonstration]) -> int | None:
    """Return C; None if no demonstration has image features.

    Raises:
        InputError: Image features differ in width.
    """
    widths = {len(demonstration.features) for demonstration in demonstrations if demonstration.features is not None}
    if len(widths) > 1:
        raise InputError(f"image features have the widths {sorted(widths)}; use those of one image encoder")
    return next(iter(widths), None)


def check_ids(demonstrations: Sequence[Demonstration]) -> None:
    """Raise InputError if a `mention_id` is not unique, or could be that of a card."""
    counts = Counter(demonstration.mention_id for demonstration in demonstrations)
    for mention_id, count in counts.most_common(1):
        if count > 1:
            raise InputError(f"mention_id {mention_id!r} occurs {count} times; give every mention its own")
    for mention_id in counts:
        if mention_id.startswith(CARD_PREFIX):
            raise InputError(f"mention_id {mention_id!r} begins with {CARD_PREFIX!r}, as ids of cards do: rename it")


def check_table(table: pa.Table, metadata: IndexMetadata, path: Path) -> None:
    """Raise ArtifactError if a table does not match its metadata or breaks a rule of the index."""
    schema = _schema(metadata.surface_width, metadata.vision_width)
    if not table.schema.equals(schema):
        raise ArtifactError(f"{path} has the columns {table.schema}, not {schema}; build the index again")
    if len(table) != metadata.num_demonstrations:
        raise ArtifactError(f"{path} has {len(table)} rows, not {metadata.num_demonstrations}; build the index again")
    if not are_demonstrable(table["text"], table["mention"], table["entity_name"]).all():
        raise ArtifactError(f"{path} holds prompt markers, or names of several lines; build the index again")
    forms = table["mention"].to_pylist()
    if forms != sorted(forms):
        raise ArtifactError(f"{path} is not sorted by mention; build the index again")
    if pc.count_distinct(table["mention_id"]).as_py() < len(table):
        raise ArtifactError(f"{path} repeats a mention_id; build the index again")
    if pc.any(pc.starts_with(table["mention_id"], CARD_PREFIX)).as_py():
        raise ArtifactError(f"{path} has a mention_id that begins with {CARD_PREFIX!r}; build the index again")
    for column in table.schema.names[len(TEXT_COLUMNS) :]:
        values = table[column].drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(values) and not are_features(values, len(values)):
            raise ArtifactError(f"{path}: {column} has values that are not finite or huge; build the index again")

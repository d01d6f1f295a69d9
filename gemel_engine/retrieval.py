"""Demonstrations: training mentions chosen by the similarity of their surface forms, and their directory on disk.

    index.json                  counts, widths, checksum and fingerprints; written last
    demonstrations.parquet      one row for each demonstration, sorted by surface form, then by `mention_id`

GEMEL (section 3.3) retrieves by the surface form alone, so mentions with equal surface forms can share their
demonstrations and, in the engine, the key-value cache of that part of the prompt. That needs equal lists for equal
surface forms, in every batch and every process. Three things see to it: the encoder runs on batches of one size,
without padding; each query is searched on its own; similarities are rounded before ties are broken by surface form and
`mention_id`. What remains is a similarity so close to a rounding boundary that another device or thread count moves it
across: it may cost a cache hit, never a wrong answer.

Shapes: B batch, N demonstrations, M distinct surface forms, E width of the mention encoder, C vision width, T tokens.
"""

from __future__ import annotations

import hashlib
import logging
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from pydantic import ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, MentionError
from gemel_engine.image_source import ImagePolicy, fetch_image
from gemel_engine.knowledge_base import tokenizer_fingerprint
from gemel_engine.prefix_trie import file_sha256, read_manifest, write_manifest
from gemel_engine.storage import list_parquet, resolve
from gemel_engine.vision import ImageEncoder, decode_image

FORMAT_VERSION = 1
_METADATA = "index.json"
_TABLE = "demonstrations.parquet"
_TEXT_COLUMNS = ("mention_id", "text", "mention", "entity_id", "entity_name")
_SIMILARITY_DECIMALS = 5
_ENTITIES_PER_READ = 65_536
_MENTIONS_PER_READ = 32  # and so the most pictures that are encoded at once

FloatArray = NDArray[np.float32]
Width = Annotated[int, Field(gt=0, le=1 << 20)]

logger = logging.getLogger(__name__)


class MentionEncoder:
    """Embeds surface forms with a frozen sentence encoder: the mean over its tokens, scaled to length one.

    A surface form's embedding does not depend on what else is in the batch: forms of equal token counts go together, in
    batches filled up to one size, so that every matrix product has the same shape whenever a form takes part in it.
    The bits do depend on that size, on the device and on the number of threads.

    Args:
        name_or_path: Local directory, or name on the model hub; weights must be safetensors.
        device: torch device.
        batch_size: Surface forms in one forward pass.

    Attributes:
        width: E.
        fingerprint: SHA-256 over weights and tokenizer.

    Raises:
        ArtifactError: There is no such model.
        ConfigurationError: Its tokenizer has no fast implementation.
    """

    def __init__(self, name_or_path: str, device: str = "cpu", batch_size: int = 16) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            model = AutoModel.from_pretrained(
                name_or_path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(f"no mention encoder can be loaded from {name_or_path!r}: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigurationError(f"the tokenizer of {name_or_path!r} has no fast implementation, which is needed")
        self.width: int = model.config.hidden_size
        self.fingerprint = _fingerprint(model, tokenizer_fingerprint(tokenizer))
        self._tokenizer = tokenizer
        self._max_tokens = min(tokenizer.model_max_length, model.config.max_position_embeddings)
        self._model = model.to(device).eval().requires_grad_(False)
        self._batch_size = batch_size

    def encode(self, surface_forms: Sequence[str]) -> FloatArray:
        """Embed surface forms, each distinct one once; nothing in them becomes a special token.

        Returns:
            Shape (B, E), rows of length one; a zero row for a form without tokens.
        """
        row_of_form = {form: row for row, form in enumerate(dict.fromkeys(surface_forms))}
        embeddings = np.zeros((len(row_of_form), self.width), np.float32)
        with tqdm(total=len(embeddings), desc="embed surface forms", unit=" forms", delay=5) as progress:
            for rows, token_ids in self._batches(list(row_of_form)):
                filled = token_ids + token_ids[-1:] * (self._batch_size - len(token_ids))
                embeddings[rows] = self._embed(torch.tensor(filled))[: len(rows)]
                progress.update(len(rows))
        return embeddings[np.array([row_of_form[form] for form in surface_forms], dtype=np.intp)]

    def _batches(self, forms: list[str]) -> Iterator[tuple[list[int], list[list[int]]]]:
        """Yield row numbers and token ids, of equal length within a batch."""
        if not forms:
            return
        token_ids = self._tokenizer(forms, split_special_tokens=True, truncation=True, max_length=self._max_tokens)
        rows_of_length = defaultdict(list)
        for row, ids in enumerate(token_ids["input_ids"]):
            rows_of_length[len(ids)].append(row)
        rows_of_length.pop(0, None)
        for rows in rows_of_length.values():
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                yield batch, [token_ids["input_ids"][row] for row in batch]

    @torch.inference_mode()
    def _embed(self, token_ids: torch.Tensor) -> FloatArray:
        token_ids = token_ids.to(self._model.device)  # (B, T)
        hidden = self._model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).last_hidden_state
        embeddings: FloatArray = torch.nn.functional.normalize(hidden.mean(dim=1), dim=-1).cpu().numpy()
        return embeddings


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A training mention with its answer.

    Attributes:
        mention_id: Unique among the demonstrations.
        mention: The surface form.
        name: The entity's name, the target.
        features: Image features of shape (C,), read-only; None without a usable picture.
    """

    mention_id: str
    text: str
    mention: str
    entity_id: str
    name: str
    features: FloatArray | None = None


@pydantic_dataclass(frozen=True, slots=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class IndexMetadata:
    """What an index's table holds; stored beside it as JSON.

    Attributes:
        num_demonstrations: N.
        num_surface_forms: M.
        num_images: Demonstrations with image features.
        surface_width: E.
        vision_width: C; None if the index was built without pictures.
        mention_encoder_fingerprint: `MentionEncoder.fingerprint`; queries must come from the same encoder.
        image_encoder_fingerprint: The image encoder's; None if the index was built without pictures.
        table_sha256: Checksum of the Parquet file.
    """

    num_demonstrations: PositiveInt
    num_surface_forms: PositiveInt
    num_images: int
    surface_width: Width
    vision_width: Width | None
    mention_encoder_fingerprint: str
    image_encoder_fingerprint: str | None
    table_sha256: str
    format_version: int = FORMAT_VERSION


class DemonstrationIndex:
    """Demonstrations and an exact search by inner product over their distinct surface forms.

    A demonstration is known by its row number; rows are in the order of (surface form, `mention_id`).

    Attributes:
        metadata: What the directory says of itself.
    """

    def __init__(self, metadata: IndexMetadata, table: pa.Table) -> None:
        self.metadata = metadata
        self._table = table
        self._mention_ids: list[str] = table["mention_id"].to_pylist()
        forms = np.array(table["mention"].to_pylist(), dtype=object)
        starts = np.flatnonzero(np.concatenate([[True], forms[1:] != forms[:-1]]))
        self._first_row = [*starts.tolist(), len(forms)]  # of each distinct surface form, and the end
        self._search = faiss.IndexFlatIP(metadata.surface_width)
        self._search.add(_matrix(table["surface_embedding"], metadata.surface_width)[starts])
        self._features: FloatArray | None = None
        if metadata.vision_width is not None:
            self._features = _matrix(table["image_features"], metadata.vision_width)

    @classmethod
    def build(
        cls,
        directory: Path,
        demonstrations: Sequence[Demonstration],
        mention_encoder: MentionEncoder,
        *,
        vision_width: int | None = None,
        image_encoder_fingerprint: str | None = None,
    ) -> Self:
        """Write an index, over one that may be there, and open it.

        Args:
            directory: Made if it does not exist.
            demonstrations: In any order.
            mention_encoder: Embeds their surface forms.
            vision_width: C; None for an index without pictures.
            image_encoder_fingerprint: Of the encoder that made the image features.

        Raises:
            InputError: There are no demonstrations, or a `mention_id` is not unique.
        """
        ordered = sorted(demonstrations, key=lambda demonstration: (demonstration.mention, demonstration.mention_id))
        if not ordered:
            raise InputError("there are no demonstrations; give training mentions whose entities have names")
        _check_unique(ordered)
        embeddings = mention_encoder.encode([demonstration.mention for demonstration in ordered])
        table = _table(ordered, embeddings, vision_width)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _METADATA).unlink(missing_ok=True)
        path = directory / _TABLE
        pq.write_table(table, path, compression="zstd", use_dictionary=["mention", "entity_id", "entity_name"])
        metadata = IndexMetadata(
            num_demonstrations=len(ordered),
            num_surface_forms=len({demonstration.mention for demonstration in ordered}),
            num_images=sum(demonstration.features is not None for demonstration in ordered),
            surface_width=mention_encoder.width,
            vision_width=vision_width,
            mention_encoder_fingerprint=mention_encoder.fingerprint,
            image_encoder_fingerprint=image_encoder_fingerprint,
            table_sha256=file_sha256(path),
        )
        write_manifest(directory / _METADATA, asdict(metadata))
        return cls(metadata, table)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Read what `build` wrote.

        Args:
            directory: A local directory.
            verify: Also compare the table with its checksum. Do this once for files from elsewhere.

        Raises:
            ArtifactError: A file is missing, damaged, of another format version, or does not fit the other.
        """
        path = directory / _TABLE
        try:
            metadata = IndexMetadata(**read_manifest(directory / _METADATA, FORMAT_VERSION))
            if verify and file_sha256(path) != metadata.table_sha256:
                raise ArtifactError(f"{path} has another checksum than {_METADATA} gives; build the index again")
            table = pq.read_table(path, partitioning=None).combine_chunks()
        except (OSError, pa.ArrowException, ValidationError) as error:
            raise ArtifactError(f"{directory} holds no readable index ({error}); build it again") from error
        _check(table, metadata, path)
        return cls(metadata, table)

    def __len__(self) -> int:
        return self.metadata.num_demonstrations

    def __getitem__(self, row: int) -> Demonstration:
        mention_id, text, mention, entity_id, name = (self._table[column][row].as_py() for column in _TEXT_COLUMNS)
        has_features = self._features is not None and self._table["image_features"][row].is_valid
        features = self._features[row] if self._features is not None and has_features else None
        return Demonstration(mention_id, text, mention, entity_id, name, features)

    def retrieve(
        self, embeddings: FloatArray, k: int, exclude_mention_ids: Sequence[str | None] | None = None
    ) -> list[list[int]]:
        """Find the `k` demonstrations with the most similar surface forms, exactly.

        Surface forms are taken by falling similarity, rounded to 5 decimals, then by code points; the demonstrations of
        one surface form by their `mention_id`.

        Args:
            embeddings: Of the queries' surface forms, shape (B, E).
            k: Fewer are returned only if there are fewer.
            exclude_mention_ids: For each query a demonstration that it must not get: itself, in training.

        Returns:
            Row numbers for each query, the most similar last.
        """
        excluded = [None] * len(embeddings) if exclude_mention_ids is None else exclude_mention_ids
        distinct, query_of_row = np.unique(embeddings, axis=0, return_inverse=True)
        nearest = [self._nearest_forms(query, k + 1) for query in distinct]
        return [
            self._rows(nearest[query], k, mention_id) for query, mention_id in zip(query_of_row, excluded, strict=True)
        ]

    def sample(self, surface_form: str, k: int, seed: int, exclude_mention_id: str | None = None) -> list[int]:
        """Draw `k` demonstrations at random, the same ones for equal surface forms: the baseline for `retrieve`."""
        drawn = random.Random(f"{seed} {surface_form}").sample(range(len(self)), min(k + 1, len(self)))
        return [row for row in drawn if self._mention_ids[row] != exclude_mention_id][:k]

    def _nearest_forms(self, query: FloatArray, num_forms: int) -> list[int]:
        """Numbers of the most similar surface forms, the most similar first."""
        num_forms = min(num_forms, self._search.ntotal)
        num_searched = min(num_forms + 1, self._search.ntotal)
        while True:
            similarities, forms = self._search.search(query[None], num_searched)
            rounded = np.round(similarities[0], _SIMILARITY_DECIMALS)
            # A tie across the end of the list would leave it to the last bits who is in the list.
            if num_searched == self._search.ntotal or rounded[-1] < rounded[num_forms - 1]:
                nearest: list[int] = forms[0][np.lexsort((forms[0], -rounded))][:num_forms].tolist()
                return nearest
            num_searched = min(2 * num_searched, self._search.ntotal)

    def _rows(self, forms: list[int], k: int, excluded: str | None) -> list[int]:
        rows = (row for form in forms for row in range(self._first_row[form], self._first_row[form + 1]))
        return list(islice((row for row in rows if self._mention_ids[row] != excluded), k))[::-1]


class PictureReader:
    """Image features of pictures given by their bytes or their address; equal bytes are encoded once.

    Attributes:
        encoder: The image encoder.
        num_unusable: Pictures so far that could not be fetched or decoded.
    """

    def __init__(self, encoder: ImageEncoder, policy: ImagePolicy, max_pixels: int) -> None:
        self.encoder = encoder
        self.num_unusable = 0
        self._policy = policy
        self._max_pixels = max_pixels
        self._features: dict[bytes, FloatArray] = {}

    def encode(self, pictures: Sequence[bytes | str | None]) -> list[FloatArray | None]:
        """Return features of shape (C,) for each picture, None where there is none or it is unusable."""
        new: dict[bytes, Image] = {}
        digests = [None if picture is None else self._decode(picture, new) for picture in pictures]
        if new:
            self._features.update(zip(new, self.encoder.encode(list(new.values())), strict=True))
        return [None if digest is None else self._features[digest] for digest in digests]

    def _decode(self, picture: bytes | str, new: dict[bytes, Image]) -> bytes | None:
        """Return the digest of a picture's bytes, None if it is unusable; add the picture to `new` if it is."""
        try:
            data = fetch_image(picture, self._policy) if isinstance(picture, str) else picture
            digest = hashlib.sha256(data).digest()
            if digest not in self._features and digest not in new:
                new[digest] = decode_image(data, self._max_pixels)
        except MentionError as error:
            logger.info("a demonstration goes without its picture: %s", error)
            self.num_unusable += 1
            return None
        return digest


def read_names(entities_uri: str) -> dict[str, str]:
    """Read the names of entities by id, normalised as in a knowledge base.

    Args:
        entities_uri: Parquet file or directory with the columns `entity_id` and `name`.

    Raises:
        InputError: There is no such table, or it lacks a column.
    """
    batches = _read_batches(entities_uri, _ENTITIES_PER_READ, ("entity_id", "name"))
    return {row["entity_id"]: _normalised(row["name"]) for rows in batches for row in rows if row["name"]}


def read_demonstrations(
    mentions_uri: str, names: Mapping[str, str], pictures: PictureReader | None = None
) -> list[Demonstration]:
    """Read a training split; mentions without a surface form, or whose entity has no name, are left out and counted.

    Args:
        mentions_uri: Parquet file or directory with the columns `mention_id`, `text`, `mention`, `entity_id`, and
            optionally `entity_name` (for entities that `names` lacks), `image_bytes` and `image_uri`.
        names: Names of entities by id.
        pictures: Makes the image features; None for demonstrations without pictures.

    Raises:
        InputError: There is no such table, or it lacks a column, a `mention_id` or a text.
    """
    optional = ("entity_name",) if pictures is None else ("entity_name", "image_bytes", "image_uri")
    demonstrations: list[Demonstration] = []
    num_left_out = 0
    required = ("mention_id", "text", "mention", "entity_id")
    batches = _read_batches(mentions_uri, _MENTIONS_PER_READ, required, optional)
    with tqdm(desc="read demonstrations", unit=" mentions", delay=5) as progress:
        for rows in batches:
            for row in rows:
                row["name"] = names.get(row["entity_id"]) or _normalised(row.get("entity_name") or "")
            kept = [row for row in rows if row["entity_id"] and row["name"] and row["mention"]]
            num_left_out += len(rows) - len(kept)
            demonstrations.extend(_demonstrations(kept, pictures))
            progress.update(len(rows))
    if num_left_out:
        logger.warning("left out %d mentions without a surface form, an entity or its name", num_left_out)
    if pictures is not None and pictures.num_unusable:
        logger.warning("%d demonstrations go without their pictures, which are unusable", pictures.num_unusable)
    return demonstrations


def _demonstrations(rows: list[dict[str, Any]], pictures: PictureReader | None) -> Iterator[Demonstration]:
    features: list[FloatArray | None] = [None] * len(rows)
    if pictures is not None:
        features = pictures.encode([row.get("image_bytes") or row.get("image_uri") for row in rows])
    for row, row_features in zip(rows, features, strict=True):
        mention_id, text = row["mention_id"], row["text"]
        if not mention_id or text is None:
            raise InputError(f"mention {mention_id!r} with text {text!r}: give every mention an id and a text")
        yield Demonstration(mention_id, text, row["mention"], row["entity_id"], row["name"], row_features)


def _read_batches(
    uri: str, num_rows: int, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a Parquet table, `num_rows` at a time, all columns but pictures as strings."""
    for file in list_parquet(uri):
        filesystem, path = resolve(file.uri)
        try:
            with pq.ParquetFile(path, filesystem=filesystem) as parquet:
                present = parquet.schema_arrow.names
                missing = [column for column in required if column not in present]
                if missing:
                    raise InputError(f"{file.uri} has no column {missing[0]!r}, only {present}; add it")
                columns = [*required, *(column for column in optional if column in present)]
                for batch in parquet.iter_batches(num_rows, columns=columns):
                    yield [dict(zip(columns, row, strict=True)) for row in zip(*_values(batch, columns), strict=True)]
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file.uri} is not a readable Parquet table ({error}); write it again") from error


def _values(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[list[Any]]:
    for column in columns:
        yield batch[column].cast(pa.binary() if column == "image_bytes" else pa.string()).to_pylist()


def _normalised(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _fingerprint(model: torch.nn.Module, tokenizer: str) -> str:
    digest = hashlib.sha256(tokenizer.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _schema(surface_width: int, vision_width: int | None) -> pa.Schema:
    fields = [pa.field(column, pa.string(), nullable=False) for column in _TEXT_COLUMNS]
    fields.append(pa.field("surface_embedding", pa.list_(pa.float32(), surface_width), nullable=False))
    if vision_width is not None:
        fields.append(pa.field("image_features", pa.list_(pa.float32(), vision_width)))
    return pa.schema(fields)


def _table(demonstrations: Sequence[Demonstration], embeddings: FloatArray, vision_width: int | None) -> pa.Table:
    columns = [
        pa.array([d.mention_id for d in demonstrations]),
        pa.array([d.text for d in demonstrations]),
        pa.array([d.mention for d in demonstrations]),
        pa.array([d.entity_id for d in demonstrations]),
        pa.array([d.name for d in demonstrations]),
        pa.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1]),
    ]
    if vision_width is not None:
        absent = np.zeros(vision_width, np.float32)
        features = [absent if d.features is None else d.features for d in demonstrations]
        mask = pa.array([d.features is None for d in demonstrations])
        columns.append(pa.FixedSizeListArray.from_arrays(np.concatenate(features), vision_width, mask=mask))
    return pa.table(columns, schema=_schema(embeddings.shape[1], vision_width))


def _matrix(column: pa.ChunkedArray, width: int) -> FloatArray:
    """The rows of a column of fixed-size lists, anything in place of a missing one."""
    values: FloatArray = column.combine_chunks().values.to_numpy(zero_copy_only=False)
    return values.reshape(-1, width)


def _check_unique(demonstrations: Sequence[Demonstration]) -> None:
    counts = Counter(demonstration.mention_id for demonstration in demonstrations)
    for mention_id, count in counts.most_common(1):
        if count > 1:
            raise InputError(f"mention_id {mention_id!r} occurs {count} times; give every mention its own")


def _check(table: pa.Table, metadata: IndexMetadata, path: Path) -> None:
    schema = _schema(metadata.surface_width, metadata.vision_width)
    if not table.schema.equals(schema):
        raise ArtifactError(f"{path} has the columns {table.schema}, not {schema}; build the index again")
    if len(table) != metadata.num_demonstrations:
        raise ArtifactError(f"{path} has {len(table)} rows, not {metadata.num_demonstrations}; build the index again")
    keys = zip(table["mention"].to_pylist(), table["mention_id"].to_pylist(), strict=True)
    if not all(before < after for before, after in pairwise(keys)):
        raise ArtifactError(f"{path} is not sorted by mention and mention_id; build the index again")
    for column in table.schema.names[len(_TEXT_COLUMNS) :]:
        values = table[column].drop_null().combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if not np.isfinite(values).all():
            raise ArtifactError(f"{path}: {column} has values that are not finite; build the index again")

"""Training mentions as demonstrations, chosen by surface form, and their directory on disk.

    index.json                  counts, widths, checksum and fingerprints; written last
    demonstrations.parquet      one row for each demonstration, sorted by surface form

GEMEL (section 3.3) retrieves by the surface form alone, so mentions with equal surface forms can
share their demonstrations and, in the engine, the key-value cache of that part of the prompt. That
needs equal lists for equal surface forms, in every batch and every process. Three rules ensure it:
the encoder embeds forms of one length in passes of one size; each query is searched on its own;
similarities are rounded before ties are broken by surface form. One case remains: a similarity so
close to a rounding boundary that another device rounds it differently. It may cost a cache hit,
never a wrong answer.

All demonstrations of one surface form are equally similar. Among them, one of each entity comes
first, then a second one of each: the prompt shows what the surface form can mean, and the text and
the picture decide what it does mean.

Shapes: B queries, N demonstrations, M distinct surface forms, E width of the mention encoder,
C width of image features.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.extras import extra
from gemel_engine.retrieval.pictures import Pictures
from gemel_engine.retrieval.table import (
    SIMILARITY_DECIMALS,
    TEXT_COLUMNS,
    Demonstration,
    FloatArray,
    IndexMetadata,
    as_matrix,
    check_ids,
    check_table,
    make_table,
    shuffled_by_form,
    vision_width_of,
)
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import claimed, file_sha256, parse_manifest, read_manifest, write_manifest

with extra("cpu", "gpu"):
    import faiss

if TYPE_CHECKING:
    from gemel_engine.retrieval.encoder import MentionEncoder

FORMAT_VERSION = 3
MANIFEST = "index.json"
_WITHOUT_CHECKSUM = 2
_TABLE = "demonstrations.parquet"


class DemonstrationIndex:
    """Demonstrations and an exact search by inner product over their distinct surface forms.

    A demonstration is identified by its row number; those of a surface form are adjacent, in a
    fixed random order.

    Attributes:
        metadata: Contents of `index.json`.
    """

    def __init__(self, metadata: IndexMetadata, table: pa.Table) -> None:
        self.metadata = metadata
        self._table = table.drop_columns(["surface_embedding"])
        self._entity_ids: list[str] = table["entity_id"].to_pylist()
        self._groups: list[str] = table["group"].to_pylist()
        self._group_sizes = Counter(self._groups)
        forms = np.array(table["mention"].to_pylist(), dtype=object)
        starts = np.flatnonzero(np.concatenate([[True], forms[1:] != forms[:-1]]))
        self._first_row = [*starts.tolist(), len(forms)]  # of each distinct surface form, and the end
        self._embeddings = as_matrix(table["surface_embedding"], metadata.surface_width)[starts]
        self._last_pictures: tuple[int, list[int], FloatArray] | None = None
        self._pictures: Pictures | None = None
        if metadata.vision_width is not None:
            is_present = table["image_features"].is_valid().to_numpy()
            self._pictures = Pictures(as_matrix(table["image_features"], metadata.vision_width), is_present)

    @classmethod
    def build(
        cls,
        directory: Path,
        demonstrations: Sequence[Demonstration],
        mention_encoder: MentionEncoder,
        *,
        image_encoder_fingerprint: str | None = None,
    ) -> Self:
        """Write an index, replacing an existing one, and open it.

        Args:
            directory: Local directory; created if it does not exist.
            demonstrations: Demonstrations in any order.
            mention_encoder: Encoder of their surface forms.
            image_encoder_fingerprint: Fingerprint of the encoder of the image features; None if
                unknown.

        Raises:
            ConfigurationError: Another command is writing there.
            InputError: There are no demonstrations, a `mention_id` is not unique or begins with
                `CARD_PREFIX`, or image features differ in width.
        """
        ordered = sorted(demonstrations, key=shuffled_by_form)
        if not ordered:
            raise InputError("there are no demonstrations; give training mentions whose entities have names")
        check_ids(ordered)
        vision_width = vision_width_of(ordered)
        embeddings = mention_encoder.encode([demonstration.mention for demonstration in ordered])
        table = make_table(ordered, embeddings, vision_width)
        path = directory / _TABLE
        with claimed(directory, must_be_empty=False):
            (directory / MANIFEST).unlink(missing_ok=True)
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
            write_manifest(directory / MANIFEST, FORMAT_VERSION, asdict(metadata))
        return cls(metadata, table)

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> Self:
        """Open an index that `build` wrote.

        Args:
            directory: Local directory.
            verify: Whether to compare the table with its checksum. Do this once for files from
                elsewhere.

        Raises:
            ArtifactError: A file is missing or damaged, has another format version, or does not
                match the other.
        """
        path, manifest = directory / _TABLE, directory / MANIFEST
        contents = read_manifest(manifest, FORMAT_VERSION, without_checksum=_WITHOUT_CHECKSUM)
        metadata = parse_manifest(contents, IndexMetadata, manifest)
        try:
            if verify and file_sha256(path) != metadata.table_sha256:
                raise ArtifactError(f"{path} has another checksum than {MANIFEST} gives; build the index again")
            with parquet.open_table(str(path)) as file:
                table = file.read().combine_chunks()
            table.validate(full=True)
        except (OSError, pa.ArrowException, InputError) as error:
            raise ArtifactError(f"{directory} holds no readable index ({error}); build it again") from error
        check_table(table, metadata, path)
        return cls(metadata, table)

    def __len__(self) -> int:
        return self.metadata.num_demonstrations

    def __getitem__(self, row: int) -> Demonstration:
        mention_id, text, mention, entity_id, name, group = (
            self._table[column][row].as_py() for column in TEXT_COLUMNS
        )
        features = None if self._pictures is None else self._pictures[row]
        return Demonstration(mention_id, text, mention, entity_id, name, group, features)

    def column(self, name: str) -> list[str]:
        """Return a text column of all demonstrations, a name of `TEXT_COLUMNS`, by row number."""
        values: list[str] = self._table[name].to_pylist()
        return values

    def surface_embeddings(self, rows: Sequence[int]) -> FloatArray:
        """Return the embeddings of the surface forms of n demonstrations, (n, E), by row number."""
        return self._embeddings[np.searchsorted(self._first_row, rows, side="right") - 1]

    def mention_ids(self, rows: Sequence[int]) -> tuple[str, ...]:
        """Return the `mention_id`s of demonstrations, by row number."""
        column = self._table["mention_id"]
        return tuple(column[row].as_py() for row in rows)

    def entity_ids(self, rows: Sequence[int]) -> tuple[str, ...]:
        """Return the `entity_id`s of demonstrations, by row number."""
        column = self._table["entity_id"]
        return tuple(column[row].as_py() for row in rows)

    def rows(self, mention_ids: Sequence[str]) -> list[int]:
        """Return the row numbers of demonstrations, by `mention_id`.

        Raises:
            InputError: A `mention_id` is not in the index.
        """
        found = pc.index_in(pa.array(mention_ids, pa.string()), value_set=self._table["mention_id"])
        if found.null_count:
            missing = mention_ids[found.to_pylist().index(None)]
            raise InputError(f"the index has no demonstration {missing!r}: use the index of the run that had it")
        rows: list[int] = found.to_pylist()
        return rows

    def retrieve(
        self, embeddings: FloatArray, k: int, exclude_groups: Sequence[str | None] | None = None
    ) -> list[list[int]]:
        """Find the `k` demonstrations with the most similar surface forms, exactly.

        Surface forms are ordered by falling similarity, rounded to 5 decimals, then by code points.
        Within a surface form, one demonstration of each entity comes first, then a second one of
        each, and so on; entities with more demonstrations come first.

        Args:
            embeddings: Embeddings of the queries' surface forms, (B, E).
            k: Number of demonstrations; fewer are returned only if there are fewer.
            exclude_groups: Group of each query whose demonstrations are left out: its own, in
                training.

        Returns:
            Row numbers for each query, the most similar last.
        """
        excluded = [None] * len(embeddings) if exclude_groups is None else exclude_groups
        distinct, query_of_row = np.unique(embeddings, axis=0, return_inverse=True)
        asked = list(zip(query_of_row.tolist(), excluded, strict=True))
        unrestricted = [self._retrieve_one(query, k, None) for query in distinct]
        found = {}
        for query, group in dict.fromkeys(asked):
            rows = unrestricted[query]
            if any(self._groups[row] == group for row in rows):  # else leaving the group out changes nothing
                rows = self._retrieve_one(distinct[query], k, group)
            found[query, group] = rows
        return [found[key] for key in asked]

    def similar_pictures(self, row: int, features: FloatArray, k: int, exclude_group: str | None = None) -> list[int]:
        """Find the demonstrations of a surface form with the most similar pictures.

        Similarity is the cosine of features standardised over all demonstrations, rounded to 5
        decimals.

        Args:
            row: Row number of any demonstration of the surface form.
            features: Image features of the given picture, (C,).
            k: Number of demonstrations; fewer are returned only if there are fewer.
            exclude_group: Group whose demonstrations are left out.

        Returns:
            Row numbers, the most similar last.
        """
        if self._pictures is None or not k:
            return []
        rows, pictures = self._pictures_of_form(self._pictures, bisect_right(self._first_row, row) - 1)
        likeness = self._pictures.cosines(pictures, features)
        by_likeness = (rows[place] for place in np.argsort(-likeness, kind="stable"))
        return list(islice((row for row in by_likeness if self._groups[row] != exclude_group), k))[::-1]

    def picture_similarities(self, rows: Sequence[int], features: FloatArray) -> FloatArray:
        """Return the cosines of a picture with those of N demonstrations, as in `similar_pictures`.

        Args:
            rows: Row numbers of the demonstrations.
            features: Image features of the given picture, (C,).

        Returns:
            Cosines (N,), rounded to 5 decimals; NaN for a demonstration without a picture.
        """
        found = np.full(len(rows), np.nan, np.float32)
        if self._pictures is not None and len(rows):
            chosen = np.array(rows)
            is_present = self._pictures.is_present[chosen]
            found[is_present] = self._pictures.cosines(self._pictures.standardised(chosen[is_present]), features)
        return found

    def sample(self, surface_form: str, k: int, seed: int, exclude_group: str | None = None) -> list[int]:
        """Draw `k` demonstrations, or all if there are fewer, in random order.

        Equal surface forms get equal lists. This is the baseline for `retrieve`.
        """
        generator = random.Random(f"{seed} {surface_form}")
        num_drawn = min(k, self._num_allowed(exclude_group))
        drawn: dict[int, None] = {}  # in the order in which they were drawn
        while len(drawn) < num_drawn:
            row = generator.randrange(len(self))
            if self._groups[row] != exclude_group:
                drawn[row] = None
        return list(drawn)

    def _pictures_of_form(self, pictures: Pictures, form: int) -> tuple[list[int], FloatArray]:
        """Return the rows of a surface form that have pictures, and their standardised features.

        The last form's are cached, since mentions come sorted by surface form.
        """
        if self._last_pictures is None or self._last_pictures[0] != form:
            first, end = self._first_row[form : form + 2]
            rows = (first + np.flatnonzero(pictures.is_present[first:end])).tolist()
            self._last_pictures = form, rows, pictures.standardised(rows)
        return self._last_pictures[1:]

    def _retrieve_one(self, query: FloatArray, k: int, excluded: str | None) -> list[int]:
        num_rows, num_forms = min(k, self._num_allowed(excluded)), max(k, 1)
        while True:
            forms = self._nearest_forms(query, num_forms)
            rows = list(islice(chain.from_iterable(self._in_rounds(form, excluded) for form in forms), num_rows))
            if len(rows) == num_rows:
                return rows[::-1]
            num_forms *= 2  # whole surface forms are excluded

    def _num_allowed(self, excluded: str | None) -> int:
        return len(self) - (0 if excluded is None else self._group_sizes[excluded])

    def _in_rounds(self, form: int, excluded: str | None) -> list[int]:
        """Return the rows of a surface form in rounds of one per entity, frequent ones first."""
        rows_of_entity = defaultdict(list)
        for row in range(self._first_row[form], self._first_row[form + 1]):
            rows_of_entity[self._entity_ids[row]].append(row)
        # Frequencies are from before the exclusion: the order must not reveal an excluded mention's
        # entity.
        by_frequency = sorted(rows_of_entity.values(), key=len, reverse=True)
        kept = [[row for row in rows if self._groups[row] != excluded] for rows in by_frequency]
        return [row for row in chain.from_iterable(zip_longest(*kept)) if row is not None]

    def _nearest_forms(self, query: FloatArray, num_forms: int) -> list[int]:
        """Return the numbers of the most similar surface forms, the most similar first."""
        num_known = len(self._embeddings)
        num_forms = min(num_forms, num_known)
        num_searched = min(num_forms + 1, num_known)
        while True:
            similarities, forms = faiss.knn(query[None], self._embeddings, num_searched, faiss.METRIC_INNER_PRODUCT)
            rounded = np.round(similarities[0], SIMILARITY_DECIMALS)
            # With a tie across the end of the list, the last bits would decide which form is in it.
            if num_searched == num_known or rounded[-1] < rounded[num_forms - 1]:
                nearest: list[int] = forms[0][np.lexsort((forms[0], -rounded))][:num_forms].tolist()
                return nearest
            num_searched = min(2 * num_searched, num_known)

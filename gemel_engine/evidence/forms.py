"""Count the entities of surface forms in training, and find similar forms by embedding.

Shapes: D training mentions, M distinct forms, E width of the mention encoder, C vision width, B
queries.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from gemel_engine.evidence.normal_form import normal_form
from gemel_engine.extras import extra
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import SIMILARITY_DECIMALS, FloatArray
from gemel_engine.types import Features

with extra("cpu", "gpu"):
    import faiss


class FormStatistics:
    """Counts training mentions by normal form, entity and group.

    A query may exclude the mentions of one group, such as its own, so that a training mention gets
    the result of an unseen mention.

    Args:
        forms: Surface form of each training mention.
        rows: Entity of each training mention.
        groups: Group of each training mention.
        embeddings: Embedding of each surface form, shape (D, E); None: `nearest` finds nothing.
        similarities: Function from numbers of training mentions and the features (C,) of a picture
            to the cosines with their pictures, NaN where there is none; None: there are no
            pictures.
    """

    def __init__(
        self,
        forms: Sequence[str],
        rows: Sequence[int],
        groups: Sequence[str],
        embeddings: FloatArray | None = None,
        similarities: Callable[[Sequence[int], Features], FloatArray] | None = None,
    ) -> None:
        self._similarities = similarities
        self._mentions: defaultdict[str, list[tuple[int, int, str]]] = defaultdict(list)  # number, entity, group
        self._groups_of: defaultdict[str, dict[int, Counter[str]]] = defaultdict(dict)
        self._frequency: Counter[int] = Counter(rows)
        self._frequency_in_group: Counter[tuple[int, str]] = Counter(zip(rows, groups, strict=True))
        first: dict[str, int] = {}  # first mention of each form
        for number, (surface_form, row, group) in enumerate(zip(forms, rows, groups, strict=True)):
            form = normal_form(surface_form)
            first.setdefault(form, number)
            if similarities is not None:
                self._mentions[form].append((number, row, group))
            self._groups_of[form].setdefault(row, Counter())[group] += 1
        self._forms = sorted(first)
        order = [first[form] for form in self._forms]
        self._embeddings = None if embeddings is None else np.ascontiguousarray(embeddings[order])

    @classmethod
    def of_index(cls, index: DemonstrationIndex, knowledge_base: KnowledgeBase) -> Self:
        """Count the demonstrations of an index whose entities are in a knowledge base."""
        row_of = {entity_id: knowledge_base.row_of_entity(entity_id) for entity_id in {*index.column("entity_id")}}
        found = [row_of[entity_id] for entity_id in index.column("entity_id")]
        kept = [number for number, row in enumerate(found) if row is not None]
        forms, groups = index.column("mention"), index.column("group")

        def similarities(numbers: Sequence[int], features: Features) -> FloatArray:
            return index.picture_similarities([kept[number] for number in numbers], features)

        return cls(
            [forms[number] for number in kept],
            [row for row in found if row is not None],
            [groups[number] for number in kept],
            index.surface_embeddings(kept),
            similarities if index.metadata.vision_width is not None else None,
        )

    def __len__(self) -> int:
        return len(self._forms)

    def frequency(self, row: int, excluded: str | None = None) -> int:
        """Return the number of training mentions of an entity."""
        own = 0 if excluded is None else self._frequency_in_group[row, excluded]
        return self._frequency[row] - own

    def entities(self, form: str, excluded: str | None = None) -> list[tuple[int, int]]:
        """Return (entity, count) pairs of a normal form, by falling count, then by row."""
        counts = {
            row: groups.total() - (0 if excluded is None else groups[excluded])
            for row, groups in self._groups_of.get(form, {}).items()
        }
        return sorted(((row, n) for row, n in counts.items() if n), key=lambda item: (-item[1], item[0]))

    def similar_pictures(self, form: str, features: Features, excluded: str | None = None) -> list[tuple[int, float]]:
        """Return (entity, cosine) pairs of the training pictures of a normal form most like a picture.

        Each entity has its most similar picture, the most similar first.
        """
        mentions = [mention for mention in self._mentions.get(form, ()) if mention[2] != excluded]
        if self._similarities is None or not mentions:
            return []
        cosines = self._similarities([number for number, _, _ in mentions], features).tolist()
        best: dict[int, float] = {}
        for (_, row, _), cosine in zip(mentions, cosines, strict=True):
            if not math.isnan(cosine):
                best[row] = max(cosine, best.get(row, -1.0))
        return sorted(best.items(), key=lambda item: (-item[1], item[0]))

    def nearest(
        self, embeddings: FloatArray, limit: int, excluded: Sequence[str | None] | None = None
    ) -> list[list[tuple[int, float]]]:
        """Return (entity, similarity) pairs of the forms most similar to each query.

        Args:
            embeddings: Embeddings of the queries' surface forms, shape (B, E); a zero row finds
                nothing.
            limit: Number of nearest forms per query.
            excluded: Group whose mentions are excluded, for each query; None: no group.
        """
        if self._embeddings is None or not len(self):
            return [[] for _ in embeddings]
        groups = [None] * len(embeddings) if excluded is None else excluded
        return [
            self._nearest(query[None], self._embeddings, min(limit, len(self)), group) if query.any() else []
            for query, group in zip(embeddings, groups, strict=True)
        ]

    def _nearest(
        self, query: FloatArray, known: FloatArray, limit: int, excluded: str | None
    ) -> list[tuple[int, float]]:
        similarities, numbers = faiss.knn(query, known, limit, metric=faiss.METRIC_INNER_PRODUCT)
        rounded = np.round(similarities[0], SIMILARITY_DECIMALS)
        best: dict[int, float] = {}
        for place in np.lexsort((numbers[0], -rounded)).tolist():
            for row, _ in self.entities(self._forms[numbers[0, place]], excluded):
                best.setdefault(row, float(rounded[place]))
        return list(best.items())

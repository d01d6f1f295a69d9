"""Finds the demonstrations of mentions by their surface forms and pictures."""

from __future__ import annotations

from collections.abc import Sequence

from gemel_engine.config.components import RetrievalSettings
from gemel_engine.errors import InputError
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.table import FloatArray
from gemel_engine.types import Features, Mention, are_features


class DemonstrationRetriever:
    """Finds rows of the demonstration index for mentions."""

    def __init__(self, settings: RetrievalSettings, index: DemonstrationIndex, encoder: MentionEncoder) -> None:
        self._settings = settings
        self._index = index
        self.encoder = encoder

    def retrieve(
        self,
        mentions: Sequence[Mention],
        features: Sequence[Features | None],
        embeddings: FloatArray | None = None,
    ) -> list[list[int]]:
        """Return row numbers for each of B mentions, the most similar last.

        Demonstrations chosen for their similar pictures come after all others.

        Args:
            mentions: Mentions to find demonstrations for.
            features: Image features (C,) of each mention; None without a picture.
            embeddings: Embeddings (B, E) of the surface forms; None computes them.

        Raises:
            InputError: A mention would be its own demonstration although its group is left out.
        """
        settings, index = self._settings, self._index
        excluded = [mention.group or mention.mention_id if settings.exclude_group else None for mention in mentions]
        if embeddings is None:
            embeddings = self.encoder.encode([mention.mention for mention in mentions])
        num_similar = settings.num_demonstrations if settings.policy == "similar" else 0
        # At least one where pictures need the most similar surface form.
        similar = index.retrieve(embeddings, max(num_similar, min(1, settings.num_similar_pictures)), excluded)
        if settings.policy == "random":
            found = [
                index.sample(mention.mention, settings.num_demonstrations, settings.seed, group)
                for mention, group in zip(mentions, excluded, strict=True)
            ]
        else:
            found = [rows if num_similar else [] for rows in similar]
        found = [
            [*rows, *self._similar_pictures(nearest, item, group)]
            for rows, nearest, item, group in zip(found, similar, features, excluded, strict=True)
        ]
        if settings.exclude_group:
            for mention, rows in zip(mentions, found, strict=True):
                if mention.mention_id in index.mention_ids(rows):
                    raise InputError(
                        f"mention {mention.mention_id!r} of group {mention.group!r} has another group in the index of "
                        "demonstrations: build the index again from the same table"
                    )
        return found

    def similarities(self, surface_form: str, rows: Sequence[int]) -> list[float]:
        """Return the cosine similarity of a surface form to that of each of K demonstrations."""
        embeddings = self.encoder.encode([surface_form, *(self._index[row].mention for row in rows)])  # (1 + K, E)
        cosines: list[float] = (embeddings[1:] @ embeddings[0]).tolist()
        return cosines

    def _similar_pictures(self, rows: list[int], features: Features | None, excluded: str | None) -> list[int]:
        width = self._index.metadata.vision_width
        if not rows or features is None or width is None or not are_features(features, width):
            return []  # features that don't fit are an error of the mention, which generation reports
        return self._index.similar_pictures(rows[-1], features, self._settings.num_similar_pictures, excluded)

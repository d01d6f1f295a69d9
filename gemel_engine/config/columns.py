"""Names of columns."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnNames:
    """Names of the columns of the input, where they differ from the engine's own.

    Attributes:
        mention_id: Name of `mention_id`, such as `id`.
        document_id: Name of `document_id`, where the input has documents and not mentions.
        text: Name of `text`, the sentence or caption.
        mention: Name of `mention`, the surface form.
        mention_start: Name of `mention_start`, the character offset of the surface form.
        candidate_ids: Name of `candidate_ids`, the only entities to consider.
        group: Name of `group`, such as the document.
        image_uri: Name of `image_uri`, the picture's address.
        image_bytes: Name of `image_bytes`, the picture's file.
        image_features: Name of `image_features`, the picture's features.
        entity_id: Name of `entity_id`, the gold label.
    """

    mention_id: str | None = None
    document_id: str | None = None
    text: str | None = None
    mention: str | None = None
    mention_start: str | None = None
    candidate_ids: str | None = None
    group: str | None = None
    image_uri: str | None = None
    image_bytes: str | None = None
    image_features: str | None = None
    entity_id: str | None = None

    def given(self) -> dict[str, str]:
        """Return the names that differ, by the engine's own."""
        return {name: theirs for name, theirs in asdict(self).items() if theirs and theirs != name}

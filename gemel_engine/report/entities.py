"""Look up the entities that a report shows, with their pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemel_engine.config.components import ImagePolicy
from gemel_engine.display import on_one_line
from gemel_engine.knowledge_base.columns import ENTITY_COLUMNS
from gemel_engine.knowledge_base.store import Entity, KnowledgeBase
from gemel_engine.report.pictures import SMALL_EDGE, Thumbnail, read_rows, thumbnails

_COLUMNS = {name: ENTITY_COLUMNS[name] for name in ("entity_id", "image_bytes", "image_uri")}
_MAX_DESCRIPTION = 160


@dataclass(frozen=True, slots=True)
class ShownEntity:
    """An entity and its picture.

    Attributes:
        entity_id: Identifier.
        entity: Its record; None if the knowledge base has none.
        picture: Its first picture.
    """

    entity_id: str
    entity: Entity | None = None
    picture: Thumbnail = field(default_factory=Thumbnail)

    @property
    def name(self) -> str:
        """Name of the entity, or its identifier if the name is unknown."""
        return self.entity_id if self.entity is None else self.entity.name

    @property
    def description(self) -> str:
        """Description on one line, shortened; empty if there is none."""
        return on_one_line((self.entity and self.entity.description) or "", _MAX_DESCRIPTION)


def shown_entities(
    knowledge_base: KnowledgeBase,
    entity_ids: Iterable[str],
    pictured: Collection[str],
    *,
    table: str | None = None,
    image_source: ImagePolicy | None = None,
) -> dict[str, ShownEntity]:
    """Look up entities.

    Args:
        knowledge_base: Knowledge base of the run.
        entity_ids: Identifiers of the entities; unknown ones are left out.
        pictured: Those whose pictures are looked for.
        table: Table file or directory with the pictures of entities; None: the addresses in the
            knowledge base alone.
        image_source: Policy for reading image addresses; None: no address is read.

    Raises:
        InputError: The table can't be read.
    """
    rows = {entity_id: knowledge_base.row_of_entity(entity_id) for entity_id in entity_ids}
    entities = {entity_id: knowledge_base.entity(row) for entity_id, row in rows.items() if row is not None}
    stored = {} if table is None else read_rows(table, _COLUMNS, pictured)
    files = {name: _picture_of(entities[name], stored.get(name, {})) for name in pictured if name in entities}
    reads_addresses = image_source is not None and image_source.allowed_prefixes
    pictures = thumbnails(files, image_source if reads_addresses else None, SMALL_EDGE)
    return {
        entity_id: ShownEntity(entity_id, entity, pictures.get(entity_id, Thumbnail()))
        for entity_id, entity in entities.items()
    }


def _picture_of(entity: Entity, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the file or the address of an entity's first picture; `row` precedes the record."""
    file, address = (next(filter(None, row.get(name) or ()), None) for name in ("image_bytes", "image_uri"))
    return {"image_bytes": file, "image_uri": address or next(iter(entity.image_uris), None)}

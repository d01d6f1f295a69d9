"""Turn entities into cards: demonstrations that nobody has annotated.

A card asks for the surface form of a mention, as if it meant the entity, and answers with the name of
the entity: the text is its description or its name, the picture is its first one.

Shapes: C vision width.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from gemel_engine.config.components import CardText
from gemel_engine.evidence.pictures import PictureIndex
from gemel_engine.knowledge_base.names import are_demonstrable
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.types import Features

_MAX_DESCRIPTION = 160  # number of characters; a longer one ends at a word before


@dataclass(frozen=True, slots=True, eq=False)
class Card:
    """An entity as a demonstration.

    Attributes:
        text: Text of the card.
        mention: Surface form.
        name: Name of the entity, the answer.
        features: Features (C,) of its picture; None without one.
    """

    text: str
    mention: str
    name: str
    features: Features | None


class EntityCards:
    """Makes the cards of the entities of a knowledge base.

    Args:
        knowledge_base: Names and descriptions.
        pictures: Features of the entities' pictures; None: cards without pictures.
        text: What the text of a card is.
    """

    def __init__(self, knowledge_base: KnowledgeBase, pictures: PictureIndex | None, text: CardText) -> None:
        self._knowledge_base = knowledge_base
        self._pictures = pictures
        self._text = text

    def card(self, row: int, surface_form: str) -> Card:
        """Return the card of an entity for mentions of a surface form.

        Args:
            row: Row of the entity in the knowledge base.
            surface_form: Surface form of the mention.
        """
        entity = self._knowledge_base.entity(row)
        name = text = entity.name
        if self._text == "description" and entity.description:
            description = _shortened(entity.description)
            if _is_usable(description, name):
                text = description
        features = None if self._pictures is None else self._pictures.features_of(row)
        return Card(text, surface_form, name, features)


def _shortened(description: str) -> str:
    """Return a description on one line, cut to `_MAX_DESCRIPTION` characters at a word."""
    line = " ".join(description[: 4 * _MAX_DESCRIPTION].split())
    cut = line[:_MAX_DESCRIPTION]
    return line if line == cut else cut.rpartition(" ")[0] or cut


def _is_usable(text: str, name: str) -> bool:
    """Return whether a text can stand in a demonstration; a description may be anything."""
    return bool(text) and bool(are_demonstrable(*(pa.array([item], pa.string()) for item in (text, text, name)))[0])

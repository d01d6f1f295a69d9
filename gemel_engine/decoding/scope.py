"""The names that a mention may be linked to: all of the knowledge base, or those of its candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from gemel_engine.errors import InvalidMentionError
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.types import Mention


@dataclass(frozen=True, slots=True)
class Scope:
    """The names that a mention may be linked to.

    Attributes:
        knowledge_base: Knowledge base of the entities.
        trie: Prefix trie of the names.
        names: Number in the knowledge base of each name of the trie; None: they are the same.
        rows: Rows of the allowed entities; None: all.
    """

    knowledge_base: KnowledgeBase
    trie: PrefixTrie
    names: tuple[int, ...] | None = None
    rows: frozenset[int] | None = None

    @classmethod
    def of(cls, knowledge_base: KnowledgeBase, mention: Mention) -> Self:
        """Return the names that a mention may be linked to.

        Raises:
            InvalidMentionError: A candidate is not in the knowledge base, or the list is empty.
        """
        if mention.candidate_ids is None:
            return cls(knowledge_base, knowledge_base.trie)
        known = {entity_id: knowledge_base.row_of_entity(entity_id) for entity_id in mention.candidate_ids}
        unknown = [entity_id[:50] for entity_id, row in known.items() if row is None]
        if unknown or not known:
            raise InvalidMentionError(
                f"candidate_ids {unknown[:3]} are not in the knowledge base: remove them"
                if unknown
                else "candidate_ids is empty: list at least one entity, or leave it null to search the knowledge base"
            )
        rows = frozenset(row for row in known.values() if row is not None)
        names = sorted({name for row in rows for name in knowledge_base.names_of_row(row)})
        trie, numbers = PrefixTrie.from_sequences([knowledge_base.name_tokens(name) for name in names])
        in_order = sorted(zip(numbers, names, strict=True))
        return cls(knowledge_base, trie, tuple(name for _, name in in_order), rows)

    def entities(self, number: int) -> list[int]:
        """Return the rows of the allowed entities of a name of the trie."""
        found = self.knowledge_base.entities_of_name(number if self.names is None else self.names[number])
        return [row for row in found if self.rows is None or row in self.rows]

    def numbers(self, row: int) -> tuple[int, ...]:
        """Return the numbers in the trie of an entity's names; none if it is not allowed."""
        if self.rows is not None and row not in self.rows:
            return ()
        names = self.knowledge_base.names_of_row(row)
        return tuple(names if self.names is None else map(self.names.index, names))

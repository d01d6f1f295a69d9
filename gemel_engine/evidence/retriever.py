"""Find what a prompt shows before its question: demonstrations, and cards of candidate entities.

What depends on the surface form alone comes first, so that mentions of one surface form share the
beginning of their prompts; what the text and the picture of a mention select comes last.

Shapes: B mentions, C vision width.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemel_engine.config.components import RetrievalSettings
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import EvidenceIndex
from gemel_engine.evidence.pool import CandidatePool, Pool, text_around
from gemel_engine.evidence.retrieved import PoolCandidate, PromptItem, Retrieved
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.retriever import DemonstrationRetriever
from gemel_engine.retrieval.table import FloatArray
from gemel_engine.types import Features, Mention, are_features


class Retriever:
    """Finds demonstrations, candidates and cards for mentions.

    Args:
        settings: How many of each there are.
        knowledge_base: Knowledge base of the run.
        index: Demonstration index; None without demonstrations.
        evidence: Evidence index of the knowledge base; None: no candidates and no cards.
        device: torch device of the mention encoder; on a GPU, candidates are searched there too.

    Attributes:
        encoder: Mention encoder; None if nothing needs it.
        demonstrations: Retriever of demonstrations; None without demonstrations.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        knowledge_base: KnowledgeBase,
        index: DemonstrationIndex | None,
        evidence: EvidenceIndex | None,
        device: str = "cpu",
    ) -> None:
        self._settings = settings
        self._embeds_texts = evidence is not None and evidence.names is not None
        self.encoder: MentionEncoder | None = None
        if settings.mention_encoder is not None and (index is not None or self._embeds_texts):
            self.encoder = MentionEncoder(settings.mention_encoder, device)
        self.demonstrations: DemonstrationRetriever | None = None
        if index is not None and self.encoder is not None:
            self.demonstrations = DemonstrationRetriever(settings, index, self.encoder)
        self._knowledge_base = knowledge_base
        self._weights = ScoreWeights.open()  # a run's own are fitted on its prompts, and so can't decide these
        self._pool: CandidatePool | None = None
        self._vision_width: int | None = None
        if evidence is not None and settings.num_candidates:
            if device == "cuda":
                evidence.move_to_gpu()
            forms = None if index is None else FormStatistics.of_index(index, knowledge_base)
            self._pool = CandidatePool(evidence, forms, size=settings.num_candidates)
            of_index = None if index is None else index.metadata.vision_width
            self._vision_width = of_index if evidence.pictures is None else evidence.pictures.width

    def retrieve(self, mentions: Sequence[Mention], features: Sequence[Features | None]) -> list[Retrieved]:
        """Return what is found for each of B mentions.

        Args:
            mentions: Mentions without faults.
            features: Image features (C,) of each mention; None without a picture.

        Raises:
            InputError: A mention would be its own demonstration although its group is left out.
        """
        of_forms = None if self.encoder is None else self.encoder.encode([mention.mention for mention in mentions])
        rows: list[list[int]] = [[] for _ in mentions]
        if self.demonstrations is not None and (
            self._settings.num_demonstrations or self._settings.num_similar_pictures
        ):
            rows = self.demonstrations.retrieve(mentions, features, of_forms)
        pools = self._pools(mentions, features, of_forms)
        return [self._arranged(*of_mention) for of_mention in zip(mentions, rows, pools, strict=True)]

    def _pools(
        self, mentions: Sequence[Mention], features: Sequence[Features | None], of_forms: FloatArray | None
    ) -> list[Pool]:
        if self._pool is None:
            return [Pool()] * len(mentions)
        of_texts = None
        if self.encoder is not None and self._embeds_texts:
            of_texts = self.encoder.encode([self.encoder.readable(*text_around(mention)) for mention in mentions])
        width = self._vision_width
        usable = [
            item if width is not None and item is not None and are_features(item, width) else None for item in features
        ]
        allowed = [self._rows_of(mention.candidate_ids) for mention in mentions]
        group = self._settings.exclude_group
        return self._pool.pool(mentions, of_forms, of_texts, usable, allowed=allowed, leave_out_own_group=group)

    def _rows_of(self, entity_ids: Sequence[str] | None) -> frozenset[int] | None:
        """Return the rows of entities; an unknown one is an error of the mention, which generation reports."""
        if entity_ids is None:
            return None
        rows = map(self._knowledge_base.row_of_entity, entity_ids)
        return frozenset(row for row in rows if row is not None)

    def _arranged(self, mention: Mention, demonstrations: Sequence[int], pool: Pool) -> Retrieved:
        """Return the items of a prompt: demonstrations, then cards; in each part the best one is the last.

        The best candidate by all evidence stands next to the question even if it is among the
        shared cards: a language model prefers what it read last.
        """
        num_shared = self._settings.num_demonstrations
        shared = _items(demonstrations[:num_shared], pool.of_form[: self._settings.num_cards])
        own = _items(demonstrations[num_shared:], self._best(mention, pool.candidates))
        return Retrieved(shared, own, pool.candidates)

    def _best(self, mention: Mention, candidates: Sequence[PoolCandidate]) -> list[int]:
        """Return the rows of the candidates with the highest bonus, at most `num_own_cards`, the best first."""
        if not self._settings.num_own_cards:
            return []
        rows, reasons = [item.row for item in candidates], [item.reasons for item in candidates]
        bonuses = bonuses_of(mention.mention, rows, reasons, self._weights, self._knowledge_base)
        return list(bonuses)[: self._settings.num_own_cards]


def _items(demonstrations: Sequence[int], cards: Sequence[int]) -> tuple[PromptItem, ...]:
    """Join demonstrations, the best last, and cards, the best first."""
    return (*map(PromptItem, demonstrations), *(PromptItem(row, is_card=True) for row in reversed(cards)))

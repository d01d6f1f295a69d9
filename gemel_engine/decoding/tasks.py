"""The work for one mention: its prompt and search, then its prediction.

A mention is ranked by the language model alone (`NameTask`), or with evidence (`ScoreTask`).
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gemel_engine.decoding.entity_search import EntitySearch, EntitySearchResult
from gemel_engine.decoding.entity_search import PoolEntity as BonusEntity
from gemel_engine.decoding.frontier import share_of_mass
from gemel_engine.decoding.prompt import Prompt
from gemel_engine.decoding.ranking import Heard, ranked_again, ranking_of
from gemel_engine.decoding.resume import margin_of, merge_results, numbered_in, result_of
from gemel_engine.decoding.scheduler import Search
from gemel_engine.decoding.scope import Scope
from gemel_engine.decoding.search import FoundName, NameSearch, SearchResult
from gemel_engine.errors import MentionError
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.evidence.weights import ScoreWeights, bonuses_of
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.types import Candidate, Features, Mention, PoolEntity, Prediction

if TYPE_CHECKING:
    from gemel_engine.decoding.generator import EntityNameGenerator

Result = TypeVar("Result", SearchResult, EntitySearchResult)

_PROMPT_FIELDS = (
    "demonstration_ids",
    "demonstration_entity_ids",
    "num_demonstrations_dropped",
    "num_characters_dropped",
)


class MentionTask(ABC, Generic[Result]):
    """The work for one mention.

    Args:
        generator: The parts of the run.
        mention: The mention to link.
        features: Its image features (C,), None without a picture.
        retrieved: Its demonstrations, cards and candidates.

    Attributes:
        prediction: Set by `prepare` if it returns None, otherwise by `finish`.
    """

    prediction: Prediction

    def __init__(
        self, generator: EntityNameGenerator, mention: Mention, features: Features | None, retrieved: Retrieved
    ) -> None:
        self._generator = generator
        self._mention = mention
        self._features = features
        self._retrieved = retrieved
        self._used: tuple[PromptItem, ...] = ()
        self._num_characters_dropped = 0

    @abstractmethod
    def prepare(self) -> tuple[Prompt, Search[Result]] | None:
        """Return prompt and search; None if no search is needed."""

    def can_continue(self) -> bool:
        """Return whether the earlier prediction is enough to begin from."""
        return True

    @abstractmethod
    def finish(self, result: Result) -> None:
        """Turn the result of the search into the prediction."""

    def _fail(self, error: MentionError) -> None:
        self.prediction = Prediction(self._mention.mention_id, error=str(error))

    def _prompt(self) -> Prompt:
        """Return the prompt, and note what it has and what it lacks."""
        prompt, self._used = self._generator.prompt(self._mention, self._features, self._retrieved)
        self._num_characters_dropped = prompt.num_characters_dropped
        return prompt

    def _prompt_fields(self) -> dict[str, Any]:
        """Return the fields about the prompt."""
        num_dropped = len(self._retrieved.items) - len(self._used)
        values = (*self._generator.ids(self._used), num_dropped, self._num_characters_dropped)
        return dict(zip(_PROMPT_FIELDS, values, strict=True))

    def _candidate(
        self, row: int, log_prob: float | None, bonus: float | None = None, score: float | None = None
    ) -> Candidate:
        entity = self._generator.artifacts.knowledge_base.entity(row)
        return Candidate(entity.entity_id, entity.name, log_prob, bonus, score)

    def _pool(self) -> tuple[PoolEntity, ...]:
        entity_id = self._generator.artifacts.knowledge_base.entity_id
        return tuple(
            PoolEntity(entity_id(candidate.row), candidate.score, candidate.reasons)
            for candidate in self._retrieved.candidates
        )


class NameTask(MentionTask[SearchResult]):
    """Ranks names by the language model alone.

    Args:
        generator: The parts of the run.
        mention: The mention to link.
        features: Its image features (C,), None without a picture.
        retrieved: Its demonstrations, cards and candidates.
        earlier: Its prediction before names were added; see `EntityNameGenerator.generate`.
    """

    def __init__(
        self,
        generator: EntityNameGenerator,
        mention: Mention,
        features: Features | None,
        retrieved: Retrieved,
        earlier: Prediction | None,
    ) -> None:
        super().__init__(generator, mention, features, retrieved)
        self._earlier = earlier
        self._found_before: SearchResult | None = None
        self._trie: PrefixTrie | None = None

    def prepare(self) -> tuple[Prompt, NameSearch] | None:
        """Return prompt and search; None if no search is needed."""
        search: NameSearch | None = None
        if self._earlier is not None:
            knowledge_base = self._generator.artifacts.knowledge_base
            objective = self._generator.search_settings.objective
            self._found_before = found = result_of(self._earlier, knowledge_base, objective)
            search, self._trie = self._search_added(found), self._generator.added_names
            if search is None:
                self.prediction = self._predict(found)
                return None
        try:
            prompt = self._prompt()
            if search is None:
                scope = Scope.of(self._generator.artifacts.knowledge_base, self._mention)
                self._trie = None if scope.names is None else scope.trie
                search = self._generator.search_of(scope.trie)
        except MentionError as error:
            self._fail(error)
            return None
        return prompt, search

    def finish(self, result: SearchResult) -> None:
        """Turn the result of the search into the prediction."""
        if self._trie is not None:
            result = numbered_in(self._generator.artifacts.knowledge_base.trie, result, self._trie)
        if self._found_before is not None:
            result = merge_results(self._found_before, result, self._generator.search_settings.num_candidates)
        self._trie = self._found_before = None  # a call may have many mentions
        self.prediction = self._predict(result)

    def _search_added(self, found: SearchResult) -> NameSearch | None:
        """Return the search for added names that score higher than `found`; None if none can."""
        added = self._generator.added_names
        if added is None or self._mention.candidate_ids is not None:
            return None
        search = self._generator.search_of(added, [name.score for name in found.names])
        return None if search.is_done else search

    def _predict(self, result: SearchResult) -> Prediction:
        """Return the prediction for a result whose names are numbered as in the knowledge base."""
        names, places = result.names, self._places(result.names)
        candidates = tuple(self._candidate(row, names[place].log_prob) for row, place in places.items())
        return Prediction(
            mention_id=self._mention.mention_id,
            entity_id=candidates[0].entity_id,
            entity_name=candidates[0].entity_name,
            log_prob=names[0].log_prob,
            decided_by="language_model",
            probability=share_of_mass(names[0].log_prob, result.log_explored_mass, result.unexplored_mass),
            unexplored_mass=result.unexplored_mass,
            margin=margin_of(names, self._earlier),
            certified=result.num_certified > 0,
            num_certified=sum(place < result.num_certified for place in places.values()),
            candidates=candidates,
            **self._prompt_fields(),
            pool=self._pool(),
            num_rollouts=result.num_rollouts,
        )

    def _places(self, names: Sequence[FoundName]) -> dict[int, int]:
        """Return the best entities and the place of each one's best name among `names`, by row.

        They are `num_candidates` at most, of the mention's own candidates if it has any. Entities of
        one name are ordered by the candidate pool, then as in the knowledge base.
        """
        knowledge_base, own = self._generator.artifacts.knowledge_base, set(self._mention.candidate_ids or ())
        score = {candidate.row: candidate.score for candidate in self._retrieved.candidates}
        places: dict[int, int] = {}
        for place, name in enumerate(names):
            rows = (
                row
                for row in knowledge_base.entities_of_name(name.name_index)
                if row not in places and (not own or knowledge_base.entity_id(row) in own)
            )
            num_left = self._generator.search_settings.num_candidates - len(places)
            places |= dict.fromkeys(heapq.nsmallest(num_left, rows, key=lambda row: -score.get(row, -math.inf)), place)
        return places

    def _prompt_fields(self) -> dict[str, Any]:
        if self._earlier is not None:  # which had the same prompt
            return {name: getattr(self._earlier, name) for name in _PROMPT_FIELDS}
        return super()._prompt_fields()


class ScoreTask(MentionTask[EntitySearchResult]):
    """Ranks entities by the score of language model and evidence, or by evidence alone.

    Args:
        generator: The parts of the run.
        mention: The mention to link.
        features: Its image features (C,), None without a picture.
        retrieved: Its demonstrations, cards and candidates; at least one candidate.
        weights: Weights of the score.
        threshold: Lowest probability by evidence alone at which the language model is not asked;
            None: it is always asked.
        earlier: Its prediction by another score; see `EntityNameGenerator.generate`.
    """

    def __init__(
        self,
        generator: EntityNameGenerator,
        mention: Mention,
        features: Features | None,
        retrieved: Retrieved,
        weights: ScoreWeights,
        threshold: float | None,
        earlier: Prediction | None = None,
    ) -> None:
        super().__init__(generator, mention, features, retrieved)
        self._earlier = earlier
        self._weights = weights
        self._threshold = threshold
        self._scope = Scope(generator.artifacts.knowledge_base, generator.artifacts.knowledge_base.trie)
        self._bonuses: dict[int, float] = {}  # of the allowed candidates, by row, the highest first

    def prepare(self) -> tuple[Prompt, EntitySearch] | None:
        """Return prompt and search; None if evidence decides alone, or the earlier search is enough."""
        generator = self._generator
        try:
            generator.check_picture(self._features)
            self._hear_evidence()
            if self._is_plain():
                self.prediction = self._ranked(Prediction(self._mention.mention_id, pool=self._pool()), None)
                return None
            if (again := self._again()) is not None:
                self.prediction = again
                return None
            prompt = self._prompt()
        except MentionError as error:
            self._fail(error)
            return None
        scope = self._scope
        pool = [BonusEntity(row, bonus, scope.numbers(row)) for row, bonus in self._bonuses.items()]
        search = EntitySearch(
            scope.trie,
            scope.entities,
            pool,
            self._weights.language_model,
            generator.terminator,
            generator.search_settings,
            are_candidates=scope.names is not None,
        )
        return prompt, search

    def finish(self, result: EntitySearchResult) -> None:
        """Turn the result of the search into the prediction."""
        best, *others = result.entities
        candidates = [
            self._candidate(found.row, found.log_prob, self._bonuses.get(found.row, 0.0), found.score)
            for found in result.entities
        ]
        found_rows = {found.row for found in result.entities}
        rest = [row for row in self._bonuses if row not in found_rows]
        num_left = self._generator.search_settings.num_candidates - len(candidates)
        candidates += [self._candidate(row, None, self._bonuses[row], None) for row in rest[: max(0, num_left)]]
        prediction = Prediction(
            mention_id=self._mention.mention_id,
            entity_id=candidates[0].entity_id,
            entity_name=candidates[0].entity_name,
            log_prob=best.log_prob,
            score=best.score,
            decided_by="score",
            probability=share_of_mass(best.log_prob, result.log_explored_mass, result.unexplored_mass),
            unexplored_mass=result.unexplored_mass,
            margin=best.score - others[0].score if others else None,
            certified=result.num_certified > 0,
            num_certified=result.num_certified,
            candidates=tuple(candidates),
            **self._prompt_fields(),
            pool=self._pool(),
            num_rollouts=result.num_rollouts,
        )
        # Of what the row says alone, as when a calibration is fitted to rows.
        ranking = ranking_of(self._bonuses, Heard.of(prediction, self._scope), self._weights.language_model)
        self.prediction = replace(prediction, confidence=ranking.certainty)

    def can_continue(self) -> bool:
        """Return whether the earlier prediction proves the new ranking, and the question is still asked."""
        try:
            self._hear_evidence()
        except MentionError:
            return False
        return not self._is_plain() and self._again() is not None

    def _hear_evidence(self) -> None:
        """Set the allowed names, and the bonuses of the allowed candidates.

        Raises:
            InvalidMentionError: The mention's own candidates are not in the knowledge base.
        """
        self._scope = scope = Scope.of(self._generator.artifacts.knowledge_base, self._mention)
        pool = self._retrieved.candidates  # in full: what a feature says depends on the other candidates
        rows, reasons = [item.row for item in pool], [item.reasons for item in pool]
        bonuses = bonuses_of(self._mention.mention, rows, reasons, self._weights, scope.knowledge_base)
        self._bonuses = {row: bonus for row, bonus in bonuses.items() if scope.numbers(row)}

    def _again(self) -> Prediction | None:
        """Return the earlier prediction in its new order; None if the order is not proved."""
        heard = None if self._earlier is None else Heard.of(self._earlier, self._scope)
        if self._earlier is None or heard is None or not heard.log_probs:
            return None
        again = self._ranked(replace(self._earlier, pool=self._pool()), heard)
        is_proved = (again.num_certified or 0) >= self._generator.search_settings.num_to_certify
        return again if is_proved else None

    def _is_plain(self) -> bool:
        """Return whether evidence is certain enough to decide alone.

        Never among a mention's own candidates: risks are measured on whole pools.
        """
        if self._threshold is None or self._mention.candidate_ids is not None:
            return False
        return ranking_of(self._bonuses, None, self._weights.language_model).certainty >= self._threshold

    def _ranked(self, prediction: Prediction, heard: Heard | None) -> Prediction:
        size = self._generator.search_settings.num_candidates
        return ranked_again(prediction, self._scope, self._bonuses, heard, self._weights.language_model, size)

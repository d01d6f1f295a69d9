"""Propose candidate entities for a mention from all sources of evidence.

Each source ranks entities for a mention: entities of its surface form in training, equal names and
aliases, names that share words, initials or beginnings with it, names in its text, the nearest
names and descriptions by embedding, the nearest pictures. Reciprocal rank fusion (Cormack, Clarke
and Büttcher, SIGIR 2009) combines the rankings: scores of different sources need not be comparable,
and an entity that several sources propose ranks higher.

Shapes: B mentions, E width of the mention encoder, C vision width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import EvidenceIndex
from gemel_engine.evidence.normal_form import normal_form
from gemel_engine.evidence.pictures import PictureIndex
from gemel_engine.evidence.retrieved import PoolCandidate
from gemel_engine.retrieval.table import FloatArray
from gemel_engine.retrieval.window import first_near, place_of
from gemel_engine.types import Features, Mention

Ranking = list[tuple[int, float]]
Allowed = frozenset[int] | None  # rows of the only entities that may be candidates; None: all

# Sources that depend on more than the surface form: on the text or the picture.
_OF_CONTEXT = frozenset({"context", "in_text", "text_name", "description", "picture", "training_picture"})

_MAX_TEXT = 1 << 16  # number of characters around a mention that are searched
_LONGEST_NAME = 6  # greatest number of words of a name that is looked up in a text
_MAX_TEXT_WORDS = 64  # number of words around a mention in which names are looked up
_DEPTH_OF_ALLOWED = 4096  # number of names of one source among which allowed entities are looked for

_SMOOTHING = 1.0  # added to each rank; a larger one gives first ranks less advantage
# Weight of each source, chosen on WikiDiverse dev.
WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "form": 3.0,
        "name": 3.0,
        "alias": 2.0,
        "base_name": 1.0,
        "initials": 1.0,
        "words": 1.0,
        "context": 1.0,
        "beginnings": 1.0,
        "in_text": 1.0,
        "similar_form": 1.0,
        "similar_name": 1.0,
        "text_name": 1.0,
        "description": 1.0,
        "picture": 1.0,
        "training_picture": 2.0,
        "frequency": 0.3,
        "popularity": 1.0,
    }
)


def text_around(mention: Mention) -> tuple[str, int, int]:
    """Return the text of a mention, of a very long one a part, and start and end of the surface form in it."""
    start, end = place_of(mention.text, mention.mention, mention.mention_start)
    first = first_near(start, len(mention.text), _MAX_TEXT)
    return mention.text[first : first + _MAX_TEXT], start - first, end - first


@dataclass(frozen=True, slots=True)
class Pool:
    """The candidates of a mention.

    Attributes:
        candidates: Candidates by all sources, the best first; empty if there are none.
        of_form: Rows of the candidates by the sources that depend on the surface form alone, the
            best first; equal for all mentions of a surface form, unless their groups are left out.
    """

    candidates: tuple[PoolCandidate, ...] = ()
    of_form: tuple[int, ...] = ()


class CandidatePool:
    """Proposes candidates for mentions; equal mentions get equal candidates in any batch.

    Args:
        evidence: Evidence index of the knowledge base.
        forms: Statistics of the training mentions, with rows of that knowledge base; None: without.
        size: Maximum number of candidates of a mention.
        depth: Maximum number of entities that a source proposes, where all entities are allowed.
    """

    def __init__(
        self, evidence: EvidenceIndex, forms: FormStatistics | None = None, *, size: int = 32, depth: int = 64
    ) -> None:
        self._evidence = evidence
        self._forms = forms or FormStatistics([], [], [])
        self._size, self._depth = size, depth

    def pool(
        self,
        mentions: Sequence[Mention],
        form_embeddings: FloatArray | None = None,
        text_embeddings: FloatArray | None = None,
        features: Sequence[Features | None] | None = None,
        *,
        allowed: Sequence[Allowed] | None = None,
        leave_out_own_group: bool = False,
    ) -> list[Pool]:
        """Return the candidates of each mention.

        Args:
            mentions: B mentions.
            form_embeddings: Embeddings of their surface forms, shape (B, E); None: not used.
            text_embeddings: Embeddings of their texts, shape (B, E); None: not used.
            features: Features of their pictures, each of shape (C,); None: not used.
            allowed: For each mention the rows of the only entities that may be candidates, which
                then need no other reason; None: all.
            leave_out_own_group: Whether to exclude the training mentions of each mention's own
                group, as if the mention was unseen.
        """
        groups = [mention.group or mention.mention_id if leave_out_own_group else None for mention in mentions]
        allowed = allowed or [None] * len(mentions)
        rankings = [self._by_words(*of_mention) for of_mention in zip(mentions, groups, allowed, strict=True)]
        for number, (mention, group) in enumerate(zip(mentions, groups, strict=True)):
            if features is not None and (picture := features[number]) is not None:
                similar = self._forms.similar_pictures(normal_form(mention.mention), picture, group)
                rankings[number]["training_picture"] = self._first(similar, allowed[number])
        for source, found in self._by_vectors(form_embeddings, text_embeddings, features, groups, allowed):
            for ranking, entities in zip(rankings, found, strict=True):
                ranking[source] = entities
        pools = [self._pool(*of_mention) for of_mention in zip(rankings, groups, allowed, strict=True)]
        for number, pool in enumerate(pools):
            form, text = (None if values is None else values[number] for values in (form_embeddings, text_embeddings))
            self._compare(pool, form, text, None if features is None else features[number])
        return pools

    def _compare(self, pool: Pool, form: FloatArray | None, text: FloatArray | None, picture: Features | None) -> None:
        """Add the similarities of all candidates, also of those that are not among the nearest."""
        rows = [candidate.row for candidate in pool.candidates]
        names, descriptions, pictures = self._evidence.names, self._evidence.descriptions, self._evidence.pictures
        found: dict[str, dict[int, float]] = {}
        for source, index, query in (
            ("similar_name", names, form),
            ("text_name", names, text),
            ("description", descriptions, text),
        ):
            if index is not None and query is not None and query.any():
                found[source] = index.similarities(query, rows)
        if pictures is not None and picture is not None:
            found["picture"] = pictures.similarities(picture, rows)
        for candidate in pool.candidates:
            for source, similarities in found.items():
                if (similarity := similarities.get(candidate.row, 0.0)) > 0:
                    candidate.reasons.setdefault(source, similarity)

    def _pool(self, rankings: dict[str, Ranking], group: str | None, allowed: Allowed) -> Pool:
        of_form = {source: ranking for source, ranking in rankings.items() if source not in _OF_CONTEXT}
        return Pool(
            tuple(self._fuse(rankings, group, allowed or ())),
            tuple(candidate.row for candidate in self._fuse(of_form, group)),
        )

    def _first(self, ranking: Iterable[tuple[int, float]], allowed: Allowed) -> Ranking:
        """Return the first entities of a ranking; of allowed ones all."""
        if allowed is None:
            return list(islice(ranking, self._depth))
        return [pair for pair in ranking if pair[0] in allowed]

    def _by_words(self, mention: Mention, group: str | None, allowed: Allowed) -> dict[str, Ranking]:
        form, (text, start, _) = normal_form(mention.mention), text_around(mention)
        words = normal_form(text).split()
        place = len(normal_form(text[:start]).split()) if len(words) > _MAX_TEXT_WORDS else 0
        first = first_near(place, len(words), _MAX_TEXT_WORDS)
        depth = self._depth if allowed is None else _DEPTH_OF_ALLOWED
        rankings: dict[str, Ranking] = defaultdict(list)
        of_form = ((row, float(count)) for row, count in self._forms.entities(form, group))
        rankings["form"] = self._first(of_form, allowed)
        for spelling in dict.fromkeys([form, form.removesuffix("s")]):
            for row, kind in self._evidence.dictionary.find(spelling, depth, allowed):
                rankings[kind].append((row, 1.0 if spelling == form else 0.5))
        rankings["in_text"] = self._named_in(words[first : first + _MAX_TEXT_WORDS], allowed)
        lexical = self._evidence.lexical
        rankings["words"] = self._first(lexical.similar(form, depth), allowed)
        rankings["context"] = self._first(lexical.holding(form, " ".join(words), depth, place), allowed)
        rankings["beginnings"] = self._first(lexical.beginning_alike(form, depth), allowed)
        rankings["initials"] = self._first(lexical.abbreviated(form, depth), allowed)
        return rankings

    def _named_in(self, words: Sequence[str], allowed: Allowed) -> Ranking:
        """Return the entities whose full names occur in a text, scored by their number of words."""
        found: dict[int, float] = {}
        for length in range(min(_LONGEST_NAME, len(words)), 0, -1):
            for start in range(len(words) - length + 1):
                name = " ".join(words[start : start + length])
                for row, kind in self._evidence.dictionary.find(name, 2, allowed):
                    if kind != "base_name":
                        found.setdefault(row, float(length))
        return list(found.items())[: self._depth]

    def _by_vectors(
        self,
        form_embeddings: FloatArray | None,
        text_embeddings: FloatArray | None,
        features: Sequence[Features | None] | None,
        groups: Sequence[str | None],
        allowed: Sequence[Allowed],
    ) -> Iterable[tuple[str, list[Ranking]]]:
        evidence = self._evidence
        names, descriptions, pictures = evidence.names, evidence.descriptions, evidence.pictures
        if form_embeddings is not None:
            found = self._forms.nearest(form_embeddings, self._depth, groups)
            yield "similar_form", [self._first(*of_mention) for of_mention in zip(found, allowed, strict=True)]
        if names is not None and form_embeddings is not None:
            yield "similar_name", self._nearest(names, form_embeddings, allowed)
        if names is not None and text_embeddings is not None:
            yield "text_name", self._nearest(names, text_embeddings, allowed)
        if descriptions is not None and text_embeddings is not None:
            yield "description", self._nearest(descriptions, text_embeddings, allowed)
        if pictures is not None and features is not None:
            yield "picture", self._nearest(pictures, features, allowed)

    def _nearest(self, index: DenseIndex | PictureIndex, queries: Any, allowed: Sequence[Allowed]) -> list[Ranking]:
        """Return the entities most similar to each of B queries; allowed ones are all compared with it."""
        found: list[Ranking] = []
        for number, rows in enumerate(allowed):
            if rows is None:
                found += index.nearest(queries[number : number + 1], self._depth)
                continue
            query = queries[number]
            known = {} if query is None or not query.any() else index.similarities(query, sorted(rows))
            similar = (pair for pair in known.items() if pair[1] > 0)
            found.append(sorted(similar, key=lambda pair: (-pair[1], pair[0])))
        return found

    def _fuse(self, rankings: dict[str, Ranking], group: str | None, more: Iterable[int] = ()) -> list[PoolCandidate]:
        proposed = sorted({row for ranking in rankings.values() for row, _ in ranking}.union(more))
        popularity = self._evidence.popularity
        priors = {
            "frequency": [(row, float(self._forms.frequency(row, group))) for row in proposed],
            "popularity": [] if popularity is None else [(row, float(popularity[row])) for row in proposed],
        }
        for source, pairs in priors.items():
            known = (pair for pair in pairs if pair[1] > 0)
            rankings = {**rankings, source: sorted(known, key=lambda pair: (-pair[1], pair[0]))}
        scores = dict.fromkeys(proposed, 0.0)
        reasons: dict[int, dict[str, float]] = {row: {} for row in proposed}
        for source, weight in WEIGHTS.items():
            for rank, (row, score) in enumerate(rankings.get(source, [])):
                if source not in reasons[row]:  # a second spelling may find the same entity
                    scores[row] += weight / (_SMOOTHING + rank + 1)
                    reasons[row][source] = score
        best = sorted(proposed, key=lambda row: (-scores[row], row))[: self._size]
        return [PoolCandidate(row, scores[row], reasons[row]) for row in best]

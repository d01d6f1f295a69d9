"""Find entities whose names share words with a form, in a memory-mapped inverted index of tantivy.

A document is a name or an alias, with three fields: its stemmed words; the beginnings of its long
words, to find other inflections and adjectives of places; the initials of its words, to find
acronyms. It stores no text, only the row of its entity.

Documents are scored by BM25. Frequent words, such as "the", are cheap: tantivy skips documents that
cannot be among the best, and frequent words of a context are left out of the query.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import tantivy

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.normal_form import normal_form
from gemel_engine.retrieval.window import first_near

_BEGINNING = 5  # number of characters
_MAX_WORDS = 24  # number of words of a form that are used
_MAX_CONTEXT = 64  # number of words of a context that are used
_MAX_COMMON = 0.01  # share of documents with a word, above which it is left out of a context
_MAX_INITIALS = 8
# Memory for millions of names in one segment; `build` uses one thread, for a reproducible index.
_WRITER_BYTES = 1 << 30

_STEMMER = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).filter(tantivy.Filter.stemmer("english")).build()


class LexicalIndex:
    """Finds entities by the words of their names and aliases.

    Attributes:
        num_documents: Number of names and aliases.

    Raises:
        ArtifactError: A search finds its files damaged.
    """

    def __init__(self, index: tantivy.Index, directory: Path) -> None:
        self._directory = directory
        self._schema = index.schema
        self._searcher = index.searcher()
        self.num_documents: int = self._searcher.num_docs

    @classmethod
    def build(cls, directory: Path, names: Iterable[tuple[int, str]]) -> Self:
        """Write the index of some names and open it.

        Args:
            directory: Empty output directory, created if it does not exist.
            names: Row of an entity with a name or an alias; their order breaks ties of scores.
        """
        directory.mkdir(parents=True, exist_ok=True)
        index = tantivy.Index(_schema(), path=str(directory.absolute()))
        writer = index.writer(heap_size=_WRITER_BYTES, num_threads=1)
        for row, name in names:
            writer.add_document(_document(row, normal_form(name).split()))
        writer.commit()
        writer.wait_merging_threads()
        for lock in directory.glob(".*.lock"):
            lock.unlink()
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map what `build` wrote.

        Raises:
            ArtifactError: The directory contains no index that this release can read.
        """
        # tantivy locks the directory, which may be read-only: open a temporary directory of links.
        with (
            _reading(directory),
            tempfile.TemporaryDirectory(prefix="gemel-lexical-", ignore_cleanup_errors=True) as links,
        ):
            for path in directory.iterdir():
                Path(links, path.name).symlink_to(path.absolute())
            index = tantivy.Index.open(links)
            index.config_reader(reload_policy="manual")
            return cls(index, directory)  # maps all files now

    def similar(self, form: str, limit: int) -> list[tuple[int, float]]:
        """Return the entities whose names match the words of a normal form best, by BM25."""
        return self._search([self._optional("words", word) for word in _words(form)], limit)

    def beginning_alike(self, form: str, limit: int) -> list[tuple[int, float]]:
        """Return the entities with words that begin like those of a normal form."""
        words = _words(form)
        clauses = [self._optional("words", word) for word in words if len(word) <= _BEGINNING]
        clauses += [self._optional("beginnings", word[:_BEGINNING]) for word in words if len(word) > _BEGINNING]
        return self._search(clauses, limit)

    def holding(self, form: str, context: str, limit: int, place: int = 0) -> list[tuple[int, float]]:
        """Return the entities with all words of a form, ranked by the words of its context too.

        Args:
            form: Normal form.
            context: Normal form of its text.
            limit: Maximum number of names.
            place: Number of words before it; of a long context only words around it are used.
        """
        words = _words(form)
        clauses = [(tantivy.Occur.Must, self._term("words", word)) for word in words]
        clauses += [self._optional("words", word) for word in self._distinctive(context, place) if word not in words]
        return self._search(clauses, limit) if words else []

    def abbreviated(self, form: str, limit: int) -> list[tuple[int, float]]:
        """Return the entities whose words have the letters of a normal form as initials."""
        initials = form.replace(" ", "")
        if not 2 <= len(initials) <= _MAX_INITIALS:
            return []
        spellings = {initials, initials.removesuffix("s")} if len(initials) > 2 else {initials}
        return self._search([self._optional("initials", spelling) for spelling in sorted(spellings)], limit)

    def _distinctive(self, context: str, place: int) -> list[str]:
        """Return the words of a context that occur in few documents."""
        most = max(1, int(_MAX_COMMON * self.num_documents))
        stems = _STEMMER.analyze(context)
        words = list(dict.fromkeys(stems))
        if len(words) > _MAX_CONTEXT:
            first = first_near(place, len(stems), _MAX_CONTEXT)
            words = list(dict.fromkeys(stems[first : first + _MAX_CONTEXT]))
        with _reading(self._directory):
            return [word for word in words if 0 < self._searcher.doc_freq("words", word) <= most]

    def _optional(self, field: str, word: str) -> tuple[tantivy.Occur, tantivy.Query]:
        return tantivy.Occur.Should, self._term(field, word)

    def _term(self, field: str, word: str) -> tantivy.Query:
        return tantivy.Query.term_query(self._schema, field, word, "freq" if field == "words" else "basic")

    def _search(self, clauses: Sequence[tuple[tantivy.Occur, tantivy.Query]], limit: int) -> list[tuple[int, float]]:
        """Return the entities of the best documents, each once with its best score."""
        with _reading(self._directory):
            hits = self._searcher.search(tantivy.Query.boolean_query(list(clauses)), limit, count=False).hits
            rows = self._searcher.fast_field_values("row", [address for _, address in hits])
        best: dict[int, float] = {}
        for row, (score, _) in zip(rows, hits, strict=True):
            assert isinstance(row, int)  # every document has one
            assert isinstance(score, float)  # nothing but BM25 is sorted by
            best.setdefault(row, score)
        return list(best.items())


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Raise ArtifactError where tantivy can't read its files."""
    try:
        yield
    except BaseException as error:
        # A panic of tantivy, which trusts its files, is no Exception, and its class has no name to import.
        if not isinstance(error, OSError | ValueError) and type(error).__name__ != "PanicException":
            raise
        raise ArtifactError(f"{directory} is no readable lexical index ({error}); build it again") from error


def _words(form: str) -> list[str]:
    """Return the distinct stems of a normal form."""
    return list(dict.fromkeys(_STEMMER.analyze(form)))[:_MAX_WORDS]


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("words", tokenizer_name="whitespace", index_option="freq")
    builder.add_text_field("beginnings", tokenizer_name="whitespace", index_option="basic")
    builder.add_text_field("initials", tokenizer_name="whitespace", index_option="basic")
    builder.add_unsigned_field("row", fast=True)
    return builder.build()


def _document(row: int, words: Sequence[str]) -> tantivy.Document:
    stems = _STEMMER.analyze(" ".join(words))
    document = tantivy.Document()
    document.add_text("words", " ".join(stems))
    document.add_text("beginnings", " ".join(stem[:_BEGINNING] for stem in stems if len(stem) > _BEGINNING))
    document.add_text("initials", " ".join(_initials(words)))
    document.add_unsigned("row", row)
    return document


def _initials(words: Sequence[str]) -> list[str]:
    """Return the initials of all words, and of those with more than three letters."""
    spellings = {"".join(word[0] for word in words), "".join(word[0] for word in words if len(word) > 3)}
    return sorted(spelling for spelling in spellings if 2 <= len(spelling) <= _MAX_INITIALS)

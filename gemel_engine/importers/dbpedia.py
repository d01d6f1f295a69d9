"""Reads entities from dumps of DBpedia.

Format: one triple on each line, as N-Triples. What a line gives to an entity depends on its
predicate, not on the name of its file. The data of one entity lies far apart, so it is first
collected and then sorted in a temporary SQLite database: memory stays below 1 GiB, and the
directory for temporary files (TMPDIR) needs about twice the unpacked size of the lines in use.
Of page links, only their number for each page is stored.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from enum import IntEnum
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from urllib.parse import unquote

from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.importers.commons import ThumbnailWidth, resized
from gemel_engine.importers.entities import ImportedEntity, ImportReport, other_names
from gemel_engine.storage.lines import read_lines

_RDFS, _ONTOLOGY = "http://www.w3.org/2000/01/rdf-schema#", "http://dbpedia.org/ontology/"
_TRIPLE = re.compile(
    r"<(?P<subject>[^<>\"]+)>\s+<(?P<predicate>[^<>\"]+)>\s+"
    r"(?:<(?P<object>[^<>\"]*)>|\"(?P<text>(?:[^\"\\]|\\.)*)\"(?:@(?P<language>[\w-]+)|\^\^<[^<>\"]+>)?)"
    r"\s*(?:<[^<>\"]*>\s*)?\."  # the graph, in N-Quads
)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))")
_ESCAPED = {"t": "\t", "b": "\b", "n": "\n", "r": "\r", "f": "\f", '"': '"', "'": "'", "\\": "\\"}
_RESOURCE = re.compile(r"http://(?:[a-z-]+\.)?dbpedia\.org/resource/")
_ROWS_PER_INSERT = 1 << 14
_PAGES_PER_INSERT = 1 << 19
_MAX_REDIRECT_DOUBLINGS = 6  # chains of up to 64 pages; Wikipedia's robots shorten all chains to one
_CACHE_KIB = 64 << 10


class _Kind(IntEnum):
    LABEL = 0
    DESCRIPTION = 1
    ALIAS = 2
    IMAGE = 3
    LINKS = 4
    DISAMBIGUATION = 5


_Values = dict[_Kind, list[tuple[int, object]]]  # rank of the language or of the kind of picture, value

_TEXTS = {f"{_RDFS}label": _Kind.LABEL, f"{_RDFS}comment": _Kind.DESCRIPTION}
_IMAGES = ("http://xmlns.com/foaf/0.1/depiction", f"{_ONTOLOGY}thumbnail")
_REDIRECT, _LINK = f"{_ONTOLOGY}wikiPageRedirects", f"{_ONTOLOGY}wikiPageWikiLink"
_DISAMBIGUATION, _SAME = f"{_ONTOLOGY}wikiPageDisambiguates", "http://www.w3.org/2002/07/owl#sameAs"

_SCHEMA = f"""
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{_CACHE_KIB};
CREATE TABLE facts (page TEXT, kind INTEGER, rank INTEGER, value);
CREATE TABLE moves (page TEXT PRIMARY KEY, target TEXT, is_redirect INTEGER) WITHOUT ROWID;
"""
_FOLLOW = """
UPDATE moves SET target = next.target, is_redirect = moves.is_redirect OR next.is_redirect
FROM moves AS next WHERE next.page = moves.target AND next.target != moves.page
"""
# A label of a redirect is an alias of its target; a label of the same page in another language stays a label.
_FACTS_BY_ENTITY = f"""
SELECT coalesce(target, facts.page) AS entity,
       CASE WHEN is_redirect AND kind = {_Kind.LABEL} THEN {_Kind.ALIAS} ELSE kind END AS kind, rank, value
FROM facts LEFT JOIN moves ON moves.page = facts.page
WHERE NOT (coalesce(is_redirect, 0) AND kind IN ({_Kind.DESCRIPTION}, {_Kind.DISAMBIGUATION}))
ORDER BY entity, kind, rank, facts.rowid
"""


def read_dbpedia(
    dumps: Sequence[str],
    report: ImportReport,
    *,
    languages: Sequence[str],
    image_width: ThumbnailWidth,
    with_other_names: bool = False,
) -> Iterator[ImportedEntity]:
    """Yield the resources that have a label in one of the languages, sorted by address.

    The first language with a label gives name and description. Labels in other languages and
    titles of redirects are aliases. The popularity is the number of page links, if any are given.
    Redirects and disambiguation pages are not entities.

    An entity's identifier is its title if it is a resource of the first language's DBpedia,
    otherwise its whole address; escapes of both are decoded.

    Args:
        dumps: Addresses of the dumps, plain or compressed: labels, and any of short abstracts,
            redirects, disambiguations, images, page links, and the interlanguage links of the first
            language, without which resources of other languages are entities of their own.
        report: Receives the numbers of resources left out and of malformed lines.
        languages: Language codes, the most wanted first.
        image_width: Width of the pictures in pixels.
        with_other_names: Whether labels in the other languages are `other_names`, too.

    Raises:
        ConfigurationError: The directory for temporary files has no room.
        InputError: A dump cannot be read, or contains no line of a known kind.
    """
    home = f"http://{'' if languages[0] == 'en' else f'{languages[0]}.'}dbpedia.org/resource/"
    with (
        tempfile.TemporaryDirectory(prefix="gemel-import-") as directory,
        closing(sqlite3.connect(Path(directory) / "facts.sqlite", isolation_level=None)) as database,
        _explain_full_disk(directory),
    ):
        database.executescript(_SCHEMA)
        store = _Store(database, languages, home)
        for dump in dumps:
            _read(dump, store, report)
        for page, values in _facts_by_entity(database):
            entity = _entity(page.removeprefix(home), values, languages, image_width, store.has_links, with_other_names)
            if isinstance(entity, ImportedEntity):
                yield entity
            else:
                report.num_left_out[entity] += 1


@contextmanager
def _explain_full_disk(directory: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise ConfigurationError(
            f"the temporary database in {shown(directory)} cannot be written or sorted ({error}): make room, or set "
            "TMPDIR to a directory with more"
        ) from error


class _Store:
    """Collects triples in two tables: facts, and pages that are aliases of another page.

    Attributes:
        has_links: Whether any page link was added.
    """

    def __init__(self, database: sqlite3.Connection, languages: Sequence[str], home: str) -> None:
        self.has_links = False
        self._database = database
        self._rank_of = {language: rank for rank, language in enumerate(languages)}
        self._home = home
        self._facts: list[tuple[str, int, int, object]] = []
        self._moves: list[tuple[str, str, bool]] = []
        self._num_links: Counter[str] = Counter()

    def add(self, triple: re.Match[str]) -> bool:
        """Add a triple; return whether it is of a known kind.

        Raises:
            ValueError: An escape in it is malformed.
        """
        predicate, language = triple["predicate"], triple["language"]
        page, target = _address(triple["subject"]), _address(triple["object"] or "")
        if not _RESOURCE.match(page):
            return False
        if predicate in _TEXTS and language in self._rank_of:
            self._facts.append((page, _TEXTS[predicate], self._rank_of[language], _unescaped(triple["text"])))
        elif predicate in _IMAGES and target:
            self._facts.append((page, _Kind.IMAGE, _IMAGES.index(predicate), _unescaped(triple["object"])))
        elif predicate == _REDIRECT and target:
            self._moves.append((page, target, True))
            self._facts.append((page, _Kind.ALIAS, 0, _title(page)))
        elif predicate == _SAME and page.startswith(self._home) and _RESOURCE.match(target):
            self._moves.append((target, page, False))
        elif predicate == _DISAMBIGUATION and target:
            self._facts.append((page, _Kind.DISAMBIGUATION, 0, None))
        elif predicate == _LINK and target:
            self._num_links[target] += 1
            self.has_links = True
        else:
            return False
        if len(self._facts) + len(self._moves) >= _ROWS_PER_INSERT or len(self._num_links) >= _PAGES_PER_INSERT:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what was added to the database."""
        self._facts += [(page, _Kind.LINKS, 0, number) for page, number in self._num_links.items()]
        self._database.execute("BEGIN")
        self._database.executemany("INSERT INTO facts VALUES (?, ?, ?, ?)", self._facts)
        self._database.executemany("INSERT OR IGNORE INTO moves VALUES (?, ?, ?)", self._moves)
        self._database.execute("COMMIT")
        self._facts, self._moves, self._num_links = [], [], Counter()


def _read(dump: str, store: _Store, report: ImportReport) -> None:
    num_known = 0
    for number, line in read_lines(dump):
        if not line.strip() or line.startswith(b"#"):
            continue
        try:
            triple = _TRIPLE.fullmatch(line.decode().strip())
            if triple is None:
                raise ValueError("not a triple")
            num_known += store.add(triple)
        except ValueError as error:
            report.add_unusable(f"{shown(dump)}, line {number}", error)
    store.flush()
    if not num_known:
        raise InputError(
            f"{shown(dump)} has no label or short abstract in these languages, and no redirect, disambiguation, image, "
            f"page link or interlanguage link of the first: leave it out, or name its language"
        )


def _facts_by_entity(database: sqlite3.Connection) -> Iterator[tuple[str, _Values]]:
    """Yield each page that is no alias, with its facts and those of its aliases."""
    database.execute("DELETE FROM moves WHERE page = target")
    for _ in range(_MAX_REDIRECT_DOUBLINGS):
        if not database.execute(_FOLLOW).rowcount:
            break
    for page, group in groupby(database.execute(_FACTS_BY_ENTITY), key=itemgetter(0)):
        values: _Values = {kind: [] for kind in _Kind}
        for _, kind, rank, value in group:
            values[_Kind(kind)].append((rank, value))
        yield page, values


def _entity(
    entity_id: str,
    values: _Values,
    languages: Sequence[str],
    image_width: ThumbnailWidth,
    has_links: bool,
    with_other_names: bool,
) -> ImportedEntity | str:
    """Return the entity with these facts, or the reason why it is none."""
    labels = [(rank, str(label)) for rank, label in values[_Kind.LABEL] if str(label).strip()]
    if values[_Kind.DISAMBIGUATION]:
        return "disambiguation page"
    if not labels:
        return "no label in these languages"
    rank, name = labels[0]
    descriptions = [str(text) for place, text in values[_Kind.DESCRIPTION] if place == rank]
    aliases = [*(label for _, label in labels), *(str(alias) for _, alias in values[_Kind.ALIAS])]
    pictures = [resized(str(address), image_width) for _, address in values[_Kind.IMAGE]]
    return ImportedEntity(
        entity_id=entity_id,
        name=name,
        description=descriptions[0] if descriptions else None,
        popularity=float(sum(int(str(number)) for _, number in values[_Kind.LINKS])) if has_links else None,
        aliases=list(other_names(name, aliases)),
        image_uri=list(dict.fromkeys(pictures)),
        language=languages[rank],
        other_names=tuple(other_names(name, (label for _, label in labels))) if with_other_names else (),
    )


def _address(escaped: str) -> str:
    """Return an address as it is compared: `Caf%C3%A9` and `Café` are one page."""
    return unquote(_unescaped(escaped), errors="strict")


def _title(page: str) -> str:
    return _RESOURCE.sub("", page, count=1).replace("_", " ")


def _unescaped(text: str) -> str:
    """Return the text of an N-Triples literal or address.

    Raises:
        ValueError: It has an unknown escape, or one for half of a surrogate pair.
    """
    if "\\" in text:
        text = _ESCAPE.sub(_character, text)
        text.encode()
    return text


def _character(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2]
    if code is None and escape[3] not in _ESCAPED:
        raise ValueError(f"unknown escape {escape[0]}")
    return _ESCAPED[escape[3]] if code is None else chr(int(code, 16))

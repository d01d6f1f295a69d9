"""Documents with their linked mentions, as NIF, ELEVANT's and BLINK's formats.

A document is a text: rows with the same `group` and the same `text` are its mentions. Offsets are
counted in Unicode characters. They are `mention_start` or, without it, the first place of the
surface form in the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from gemel_engine.export.joined import JoinedRun, StoredRows

DOCUMENT_COLUMNS = ("mention_id", "group", "text", "mention", "mention_start", "entity_id", "entity_name")
_ROWS_AT_ONCE = 1 << 14
_LINKER = "GEMEL engine"
_NIF_PREFIXES = """@prefix itsrdf: <http://www.w3.org/2005/11/its/rdf#> .
@prefix nif: <http://persistence.uni-leipzig.org/nlp2rdf/ontologies/nif-core#> .
@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .
"""
_IRI_CHARACTERS = "!#$%&'()*+,-./:;=?@_~"  # that stay as they are


@dataclass(slots=True)
class Document:
    """A text with its mentions.

    Attributes:
        document_id: Its `group`, with a number where a group has several texts; without a group the
            `mention_id` of its first mention.
        text: The text.
        rows: Joined rows of its mentions, each with `start`, in the order of the input.
    """

    document_id: str
    text: str
    rows: list[dict[str, Any]] = field(default_factory=list)


class Documents:
    """The documents of a run, one after the other.

    Args:
        run: The run, joined with `DOCUMENT_COLUMNS`.
        scratch: Local directory for temporary files.

    Attributes:
        num_left_out: Number of mentions that are not in their text; counted while iterating.
    """

    def __init__(self, run: JoinedRun, scratch: Path) -> None:
        self.num_left_out = 0
        self._groups: list[bytes] = []
        self._texts: list[bytes] = []
        self._rows = StoredRows.store(scratch / "rows.arrow", run.schema, self._with_keys(run))

    def __iter__(self) -> Iterator[Document]:
        """Yield each document; those of a group follow each other, in the order of the input."""
        groups, texts = (_first_places(keys) for keys in (self._groups, self._texts))
        order = np.lexsort((np.arange(len(groups)), texts, groups))
        document, of_document, number = None, (-1, -1), 0
        for start in range(0, len(order), _ROWS_AT_ONCE):
            places = order[start : start + _ROWS_AT_ONCE]
            for place, row in zip(places, self._rows.take(places).to_pylist(), strict=True):
                if (found := (int(groups[place]), int(texts[place]))) != of_document:
                    if document is not None:
                        yield document
                    number = number + 1 if found[0] == of_document[0] else 1
                    name = row.get("group") or row["mention_id"]
                    document = Document(name if number == 1 else f"{name}-{number}", row["text"] or "")
                    of_document = found
                assert document is not None, "the first row begins one"
                if (offset := _start(row)) is None:
                    self.num_left_out += 1
                else:
                    document.rows.append(row | {"start": offset})
        if document is not None:
            yield document

    def _with_keys(self, run: JoinedRun) -> Iterator[pa.Table]:
        for piece in run.pieces():
            texts = piece["text"].to_pylist()
            groups = piece["group"].to_pylist() if "group" in piece.column_names else [None] * len(texts)
            for group, text in zip(groups, texts, strict=True):
                of_text = _digest(f"{group or ''}\0{text or ''}")
                self._texts.append(of_text)
                self._groups.append(of_text if group is None else _digest(group))
            yield piece


def nif_lines(documents: Documents, entity_prefix: str) -> Iterator[str]:
    """Yield the NIF of documents in Turtle, as GERBIL reads it.

    Args:
        documents: The documents.
        entity_prefix: Beginning of the addresses of entities, for ids that are none themselves.
    """
    yield _NIF_PREFIXES
    for document in documents:
        text, base = document.text, _iri(document.document_id, "urn:document:")
        context = f"<{base}#char=0,{len(text)}>"
        yield (
            f"\n{context} a nif:Context, nif:RFC5147String ;\n{_nif_range(0, len(text))} ;\n"
            f"    nif:isString {json.dumps(text, ensure_ascii=False)} .\n"
        )
        for row in document.rows:
            start, end = row["start"], row["start"] + len(row["mention"])
            properties = [f"    nif:anchorOf {json.dumps(row['mention'], ensure_ascii=False)}", _nif_range(start, end)]
            if (entity_id := _answer(row)) is not None:
                properties.append(f"    itsrdf:taIdentRef <{_iri(entity_id, entity_prefix)}>")
                if row["confidence"] is not None:
                    properties.append(f'    itsrdf:taConfidence "{row["confidence"]!r}"^^xsd:double')
            properties.append(f"    nif:referenceContext {context}")
            yield (
                f"\n<{base}#char={start},{end}> a nif:Phrase, nif:RFC5147String ;\n" + " ;\n".join(properties) + " .\n"
            )


def elevant_lines(documents: Documents) -> Iterator[str]:
    """Yield a line of ELEVANT's linked articles for each document, with gold labels if there are any."""
    for number, document in enumerate(documents):
        article: dict[str, Any] = {
            "id": number,
            "title": document.document_id,
            "text": document.text,
            "hyperlinks": [],
            "title_synonyms": [],
            "entity_mentions": [
                {
                    "span": _span(row),
                    "recognized_by": "input",
                    "id": _answer(row),
                    "linked_by": _LINKER,
                    "candidates": [candidate["entity_id"] for candidate in row["candidates"] or ()],
                }
                for row in document.rows
            ],
            "evaluation_span": [0, len(document.text)],
        }
        if any("gold_entity_id" in row for row in document.rows):
            labelled = [row for row in document.rows if row["gold_entity_id"] is not None]
            article["labels"] = [_elevant_label(place, row) for place, row in enumerate(labelled)]
        yield json.dumps(article, ensure_ascii=False) + "\n"


def blink_lines(documents: Documents) -> Iterator[str]:
    """Yield a line of BLINK's mentions for each mention; the label is the answer."""
    for document in documents:
        for row in document.rows:
            start, end = _span(row)
            line = {
                "context_left": document.text[:start],
                "mention": row["mention"],
                "context_right": document.text[end:],
                "query_id": row["mention_id"],
                "label_id": _answer(row),
                "label_title": row["entity_name"],
                "label": row["entity_name"],
            }
            gold = {"gold_label_id": row["gold_entity_id"]} if "gold_entity_id" in row else {}
            yield json.dumps(line | gold, ensure_ascii=False) + "\n"


def _elevant_label(number: int, row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": number,
        "span": _span(row),
        "entity_id": row["gold_entity_id"],
        "name": row.get("gold_entity_name") or row["gold_entity_id"],
        "parent": None,
        "children": [],
        "optional": False,
        "type": "OTHER",
    }


def _answer(row: dict[str, Any]) -> str | None:
    """Return the entity of a row; None if it has none, or if the mention refers to none."""
    answer: str | None = None if row["is_nil"] else row["entity_id"]
    return answer


def _start(row: dict[str, Any]) -> int | None:
    """Return the offset of a mention; None if it is not in its text."""
    text, mention, start = row["text"] or "", row["mention"], row.get("mention_start")
    if not mention:
        return None
    if start is not None and start >= 0 and text.startswith(mention, start):
        return int(start)
    return None if start is not None or (found := text.find(mention)) < 0 else found


def _span(row: dict[str, Any]) -> list[int]:
    return [row["start"], row["start"] + len(row["mention"])]


def _nif_range(start: int, end: int) -> str:
    number = '"^^xsd:nonNegativeInteger'
    return f'    nif:beginIndex "{start}{number} ;\n    nif:endIndex "{end}{number}'


def _iri(name: str, prefix: str) -> str:
    """Return an address for Turtle: the name itself if it is one, else behind the prefix."""
    is_address = name.startswith(("http://", "https://", "urn:"))
    return quote(name, _IRI_CHARACTERS) if is_address else prefix + quote(name, safe="")


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _first_places(keys: list[bytes]) -> NDArray[np.int64]:
    """Return for each key the place of the first equal one (N,)."""
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(key, place) for place, key in enumerate(keys)], np.int64)

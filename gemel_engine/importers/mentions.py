"""Reads corpora of mentions in the layouts that their authors publish.

    wikidiverse   JSON: [text, address of the picture, topic, [[surface form, type, first place, end,
                  address in Wikipedia], ...]] for each caption
    melbench      JSON (WikiMEL, Richpedia-MEL): objects with `sentence`, `mentions` (one surface
                  form), `imgPath`, `answer` (id of the entity) and `entities` (its name), in a list
                  or by their ids
    aida          tab-separated tokens (AIDA-CoNLL-YAGO): token, B or I, surface form, YAGO's name or
                  --NME--, address in Wikipedia, ...; `-DOCSTART- (1 EU)` begins a document
    blink         JSON Lines: `context_left`, `mention`, `context_right`, `label_id`, `label_title`

An address in Wikipedia becomes the title of its page: as `entity_id` as addresses and DBpedia have
it, `New_York_City`, as `entity_name` with spaces. Identifiers that a corpus lacks begin with the name
of its file, so that those of several splits are distinct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.errors import InputError, shown
from gemel_engine.importers.entities import ImportReport
from gemel_engine.storage.lines import read_lines

MENTION_SCHEMA = pa.schema(
    [
        pa.field("mention_id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("mention", pa.string(), nullable=False),
        pa.field("mention_start", pa.int64()),
        pa.field("image_uri", pa.string()),
        pa.field("group", pa.string()),
        pa.field("entity_id", pa.string()),
        pa.field("entity_name", pa.string()),
    ]
)
_MAX_JSON_BYTES = 1 << 30
_PAGE = "/wiki/"
_NO_ENTITY = ("", "nil", "none", "null", "unknown", "-1", "--nme--")
_DOCUMENT = re.compile(r"-DOCSTART- \((.*?)\)?")
_MALFORMED = (TypeError, ValueError, AttributeError, OverflowError, RecursionError)
_NO_SPACE_AFTER, _NO_SPACE_BEFORE = "([{\"'“‘-/#@", ".,;:!?)]}\"'”’-/%"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedMention:
    """One row of `MENTION_SCHEMA`.

    Raises:
        ValueError: Text or surface form is missing, or a value is not Unicode text.
    """

    mention_id: str
    text: str
    mention: str
    mention_start: int | None = None
    image_uri: str | None = None
    group: str | None = None
    entity_id: str | None = None
    entity_name: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip() or not self.mention.strip():
            raise ValueError("the text or the surface form is missing")
        for name in MENTION_SCHEMA.names:
            if isinstance(value := getattr(self, name), str):
                value.encode()  # raises for lone surrogates


def read_wikidiverse(uri: str, report: ImportReport, pictures: str | None = None) -> Iterator[ImportedMention]:
    """Yield the mentions of a split of WikiDiverse; a caption is a group."""
    for number, caption in enumerate(_items(uri)):
        group = _made_up_id(uri, number)
        try:
            text, picture, _, mentions = caption
            found = [
                ImportedMention(
                    mention_id=f"{group}-{place}",
                    text=text,
                    mention=form,
                    mention_start=_offset(text, form, int(start)),
                    image_uri=_picture(picture, pictures),
                    group=group,
                    **_page(address),
                )
                for place, (form, _, start, _, address, *_) in enumerate(mentions)
            ]
        except _MALFORMED as error:
            report.add_unusable(f"{shown(uri)}, caption {number}", error)
            continue
        yield from found


def read_melbench(uri: str, report: ImportReport, pictures: str | None = None) -> Iterator[ImportedMention]:
    """Yield the mentions of a split of WikiMEL or Richpedia-MEL; a sentence is a group."""
    for number, row in enumerate(_items(uri)):
        try:
            text, answer = _text(row, "sentence") or "", _text(row, "answer") or ""
            is_nil = answer.lower() in _NO_ENTITY
            found = ImportedMention(
                mention_id=_text(row, "id") or _made_up_id(uri, number),
                text=text,
                mention=_text(row, "mentions") or "",
                image_uri=_picture(_text(row, "imgPath"), pictures),
                group=text,
                entity_id=None if is_nil else answer,
                entity_name=None if is_nil else _text(row, "entities"),
            )
        except _MALFORMED as error:
            report.add_unusable(f"{shown(uri)}, row {number}", error)
            continue
        yield found


def read_aida(uri: str, report: ImportReport, part: str | None = None) -> Iterator[ImportedMention]:
    """Yield the mentions of AIDA; the text of a mention is its document, which is its group.

    Args:
        uri: Address of the file.
        report: Receives the lines that are malformed.
        part: `train`, `testa` or `testb`; None: all documents.
    """
    document = text = ""
    mentions: list[tuple[str, int, list[str]]] = []  # place in the file, start in the text, fields
    for number, line in read_lines(uri):
        place = f"{shown(uri)}, line {number}"
        try:
            fields = line.decode().split("\t")
        except UnicodeDecodeError as error:
            report.add_unusable(place, error)
            continue
        if found := _DOCUMENT.fullmatch(fields[0]):
            yield from _of_document(document, text, mentions, part, report)
            document, text, mentions = found[1], "", []
        elif not fields[0]:
            text = f"{text.rstrip()}\n" if text else ""
        else:
            if fields[1:2] == ["B"]:
                mentions.append((place, len(text), fields))
            text += f"{fields[0]} "
    yield from _of_document(document, text, mentions, part, report)


def _of_document(
    document: str, text: str, mentions: list[tuple[str, int, list[str]]], part: str | None, report: ImportReport
) -> Iterator[ImportedMention]:
    name = document.partition(" ")[0]
    if part is not None and part != (found[0] if (found := re.search("test[ab]", name)) else "train"):
        return
    for number, (place, start, fields) in enumerate(mentions):
        form = fields[2] if len(fields) > 2 else fields[0]
        try:
            mention = ImportedMention(
                mention_id=f"{name}-{number}",
                text=text.rstrip(),
                mention=form,
                mention_start=_offset(text, form, start),
                group=document,
                **_page(fields[4] if len(fields) > 4 else ""),
            )
        except ValueError as error:
            report.add_unusable(place, error)
            continue
        yield mention


def read_blink(uri: str, report: ImportReport) -> Iterator[ImportedMention]:
    """Yield the mentions of JSON Lines as BLINK takes them."""
    for number, line in read_lines(uri):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            left, form, right = (_text(row, key) or "" for key in ("context_left", "mention", "context_right"))
            before = left + (" " if left and not left[-1].isspace() and left[-1] not in _NO_SPACE_AFTER else "")
            after = (" " if right and not right[0].isspace() and right[0] not in _NO_SPACE_BEFORE else "") + right
            label = _text(row, "label_id") or ""
            is_nil = label.lower() in _NO_ENTITY
            found = ImportedMention(
                mention_id=_text(row, "id") or _made_up_id(uri, number),
                text=f"{before}{form}{after}",
                mention=form,
                mention_start=len(before),
                group=_text(row, "doc_id"),
                entity_id=None if is_nil else label,
                entity_name=None if is_nil else _text(row, "label_title"),
            )
        except _MALFORMED as error:
            report.add_unusable(f"{shown(uri)}, line {number}", error)
            continue
        yield found


LAYOUTS: dict[str, Callable[..., Iterator[ImportedMention]]] = {
    "wikidiverse": read_wikidiverse,
    "melbench": read_melbench,
    "aida": read_aida,
    "blink": read_blink,
}


def _items(uri: str) -> list[Any]:
    """Return the items of a JSON list, or the values of a JSON object with their keys as `id`."""
    try:
        data = storage.read_bytes(uri, _MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES >> 30} GiB")
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{shown(uri)} is no JSON file that can be read ({error}): download it again") from error
    if isinstance(found, dict):
        return [{"id": key} | value if isinstance(value, dict) else value for key, value in found.items()]
    if not isinstance(found, list):
        raise InputError(f"{shown(uri)} holds no list of mentions: give the file that the command's --help describes")
    return found


def _made_up_id(uri: str, number: int) -> str:
    """Return an identifier that the other files of a corpus do not have."""
    return f"{Path(uri).stem}-{number}"


def _offset(text: str, form: str, start: int) -> int | None:
    """Return where a corpus says that a surface form begins; None if it is not there."""
    return start if start >= 0 and text.startswith(form, start) else None


def _text(row: Any, key: str) -> str | None:
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} is {value!r:.50}, not a text")
    return str(value)


def _page(address: str | None) -> dict[str, str | None]:
    """Return id and name of the entity with a page in Wikipedia, as DBpedia spells them; {} without one."""
    _, separator, title = (address or "").partition(_PAGE)
    name = unquote(title).replace("_", " ").strip()
    return {"entity_id": name.replace(" ", "_") or None, "entity_name": name or None} if separator else {}


def _picture(place: str | None, pictures: str | None) -> str | None:
    """Return the address of a picture; with `pictures` that of its name in this directory."""
    if not isinstance(place, str | None):
        raise ValueError(f"the picture is {place!r:.50}, not an address")
    if not place or pictures is None:
        return place or None
    return f"{pictures.rstrip('/')}/{place.rpartition('/')[2]}"

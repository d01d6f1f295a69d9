"""Reads entities from a JSON dump of Wikidata.

Format: one JSON array, with an entity on each line, see
https://www.mediawiki.org/wiki/Wikibase/DataModel/JSON. Wikibase writes an empty object as `[]` in
some places and versions. The language `mul` has the labels and aliases of all languages that lack
their own, see https://www.wikidata.org/wiki/Help:Default_values_for_labels_and_aliases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from gemel_engine.errors import InputError, shown
from gemel_engine.importers.commons import ThumbnailWidth, picture_address
from gemel_engine.importers.entities import ImportedEntity, ImportReport, other_names
from gemel_engine.importers.processes import map_in_processes
from gemel_engine.storage.lines import read_lines

# Types of items about Wikimedia's own pages: disambiguation pages, categories, list articles, templates, portals,
# modules, project pages, disambiguation pages of people's names, internal items, and permanent duplicates.
WIKIMEDIA_PAGES = (
    *("Q4167410", "Q4167836", "Q13406463", "Q11266439", "Q4663903"),
    *("Q15184295", "Q14204246", "Q22808320", "Q17442446", "Q21286738"),
)
_DEFAULT_LANGUAGE = "mul"
_PART_BYTES = 4 << 20
_Empty = tuple[()]
_Part = list[tuple[int, bytes]]  # number of a line, one JSON object


@dataclass(frozen=True, slots=True)
class _Term:
    value: str


@dataclass(frozen=True, slots=True)
class _Value:
    value: Any


@dataclass(frozen=True, slots=True)
class _Snak:
    datavalue: _Value | None = None  # None: an unknown value, or none


@dataclass(frozen=True, slots=True)
class _Statement:
    mainsnak: _Snak
    rank: Literal["preferred", "normal", "deprecated"]


@dataclass(frozen=True, slots=True)
class _Claims:
    image: Annotated[list[_Statement], Field(alias="P18")] = field(default_factory=list)
    instance_of: Annotated[list[_Statement], Field(alias="P31")] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Item:
    """Those fields of an entity that are read."""

    id: Annotated[str, Field(min_length=1)]
    type: str
    labels: dict[str, _Term] | _Empty = ()
    descriptions: dict[str, _Term] | _Empty = ()
    aliases: dict[str, list[_Term]] | _Empty = ()
    claims: _Claims | _Empty = ()
    sitelinks: dict[str, Any] | _Empty = ()


_ITEM = TypeAdapter(_Item)


def read_wikidata(
    dump: str,
    report: ImportReport,
    *,
    languages: Sequence[str],
    left_out_types: Collection[str],
    image_width: ThumbnailWidth,
    with_other_names: bool = False,
) -> Iterator[ImportedEntity]:
    """Yield the items that have a label in one of the languages.

    The first language with a label, its own or the default for all languages, gives the name and
    the description. Labels in the others, and the aliases of all, are aliases. The popularity is
    the number of site links. Lines are parsed in a process for each CPU.

    Args:
        dump: Address of the dump, plain or compressed.
        report: Receives the numbers of items left out and of malformed lines.
        languages: Language codes, the most wanted first.
        left_out_types: Identifiers of types; an item that is an instance of one is left out.
        image_width: Width of the pictures in pixels.
        with_other_names: Whether labels in the other languages are `other_names`, too.

    Raises:
        InputError: The dump cannot be read, or is cut off.
    """
    read = partial(
        _read_part,
        dump=dump,
        languages=tuple(languages),
        left_out_types=frozenset(left_out_types),
        image_width=image_width,
        with_other_names=with_other_names,
    )
    for entities, counts in map_in_processes(read, _parts(dump)):
        report.add(counts)
        yield from entities


def _parts(dump: str) -> Iterator[_Part]:
    """Yield the lines with entities, a few MiB at a time.

    Raises:
        InputError: The dump cannot be read, or is cut off.
    """
    part: _Part = []
    num_bytes, is_open = 0, False
    for number, line in read_lines(dump):
        is_open = (is_open or line.startswith(b"[")) and not line.endswith(b"]")
        text = line.strip(b"[], \t")  # an object begins and ends with braces
        if text:
            part.append((number, text))
            num_bytes += len(text)
        if num_bytes >= _PART_BYTES:
            yield part
            part, num_bytes = [], 0
    if is_open:
        raise InputError(f"{shown(dump)} is cut off: it lacks the ] at its end; download it again")
    if part:
        yield part


def _read_part(
    part: _Part,
    *,
    dump: str,
    languages: Sequence[str],
    left_out_types: Collection[str],
    image_width: ThumbnailWidth,
    with_other_names: bool,
) -> tuple[list[ImportedEntity], ImportReport]:
    entities, report = [], ImportReport()
    for number, text in part:
        try:
            item = _ITEM.validate_json(text)
        except ValidationError as error:
            report.add_unusable(f"{shown(dump)}, line {number}", _first_fault(error))
            continue
        reason = _reason_to_leave_out(item, left_out_types)
        entity = None if reason else _entity(item, languages, image_width, with_other_names)
        if entity is not None:
            entities.append(entity)
        else:
            report.num_left_out[reason or "no label in these languages"] += 1
    return entities, report


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    return ": ".join(filter(None, [".".join(map(str, fault["loc"])), fault["msg"]]))


def _reason_to_leave_out(item: _Item, left_out_types: Collection[str]) -> str | None:
    if item.type != "item":
        return "not an item"
    types = {value.get("id") for value in _values(item, "instance_of") if isinstance(value, dict)}
    return "of a type that is left out" if types.intersection(left_out_types) else None


def _entity(
    item: _Item, languages: Sequence[str], image_width: ThumbnailWidth, with_other_names: bool
) -> ImportedEntity | None:
    labels, aliases, descriptions = dict(item.labels), dict(item.aliases), dict(item.descriptions)
    default = labels.get(_DEFAULT_LANGUAGE)
    for language in languages:
        label = labels.get(language, default)
        if label is not None and label.value.strip():
            break
    else:
        return None
    description = descriptions.get(language)
    names = [
        term.value
        for code in (*languages, _DEFAULT_LANGUAGE)
        for term in (*([labels[code]] if code in labels else []), *aliases.get(code, ()))
    ]
    translations = [labels[code].value for code in languages if code in labels and with_other_names]
    pictures = [value for value in _values(item, "image") if isinstance(value, str)]
    return ImportedEntity(
        entity_id=item.id,
        name=label.value,
        description=None if description is None else description.value,
        popularity=float(len(item.sitelinks)),
        aliases=list(other_names(label.value, names)),
        image_uri=[picture_address(name, image_width) for name in dict.fromkeys(pictures)],
        language=language,
        other_names=tuple(other_names(label.value, translations)),
    )


def _values(item: _Item, name: Literal["image", "instance_of"]) -> Iterator[Any]:
    """Yield the known values of a property, preferred ones first, without deprecated ones."""
    statements: list[_Statement] = getattr(item.claims, name, [])
    for statement in sorted(statements, key=lambda statement: statement.rank != "preferred"):
        if statement.rank != "deprecated" and statement.mainsnak.datavalue is not None:
            yield statement.mainsnak.datavalue.value

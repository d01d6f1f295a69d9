"""The reference: configuration, run directory, columns, command line and Python API, from the code's own words."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pyarrow as pa
from docstring_parser import parse
from interfaces import command_line, python_api

from gemel_engine.config.finding import FindConfig
from gemel_engine.config.settings import LinkConfig, TrainConfig
from gemel_engine.pipeline import output
from gemel_engine.pipeline.output import RunDirectory
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_SCHEMA, Candidate, Mention, PoolEntity, Prediction

MADE = "This page is generated from the code: `make docs`."
FILES = (
    "A configuration is a file in TOML; `--search.width 8` on the command line overrides the key `width` in the "
    "section `[search]`. An unknown key is an error. Numbers without an upper bound here are at most a million."
)
JOBS = {"gemel link": LinkConfig, "gemel train": TrainConfig, "gemel find-mentions": FindConfig}


def pages() -> dict[str, str]:
    """Return the pages of the reference by their names, without the ending `.md`."""
    return {
        "configuration": configuration(),
        "run_directory": run_directory(),
        "columns": columns(),
        "command_line": command_line(MADE),
        "python": python_api(MADE),
    }


def configuration() -> str:
    """Return the page of all settings: a table for each section of each job's configuration."""
    parts = ["# Configuration\n\n" + textwrap.fill(f"{MADE} {FILES}", 100) + "\n"]
    shown: set[tuple[str, type]] = set()
    for command, config in JOBS.items():
        parts.append(f"## {command}\n\n{_paragraph(config)}\n")
        for name, section in _sections(config, ""):
            if (name, section) in shown:
                continue
            shown.add((name, section))
            rows = list(_settings(section))
            if rows:
                heading = f"### `[{name}]` of {command}\n\n{_paragraph(section)}\n\n" if name else ""
                parts.append(f"{heading}| key | type | default | |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _sections(config: type, name: str) -> Iterator[tuple[str, type]]:
    """Yield a section of settings and those within it, with their names in TOML."""
    yield name, config
    for key, hint in get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _sections(hint, f"{name}.{key}" if name else key)


def _settings(section: type) -> Iterator[str]:
    """Yield a row for each setting of a section, without those that are sections themselves."""
    hints, words = get_type_hints(section, include_extras=True), _words(section)
    for item in dataclasses.fields(section):
        hint = hints[item.name]
        if not dataclasses.is_dataclass(hint):
            yield f"| `{item.name}` | {_type(hint)} | {_default(item)} | {words.get(item.name, '')} |"


def _words(kind: type) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of its attributes."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for item in parse(base.__doc__ or "").params:
            found[item.arg_name] = _cell(item.description or "")
    return found


def _paragraph(kind: type) -> str:
    """Return what the docstring of a class says before its attributes."""
    text = parse(kind.__doc__ or "").description or ""
    return "\n\n".join(textwrap.fill(" ".join(part.split()), 100) for part in text.split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _type(hint: Any) -> str:
    """Return a type in words, with the bounds of a number."""
    origin = get_origin(hint)
    if origin is Annotated:
        kind, *extras = get_args(hint)
        bounds = re.findall(r"(Ge|Gt|Le|Lt)\(\w+=([\d.e+]+)\)", " ".join(map(repr, extras)))
        signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
        said = [f"{signs[name]} {float(value):g}" for name, value in bounds if float(value) < 1e6]
        return ", ".join([_type(kind), *said])
    if origin is Literal:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in get_args(hint))
    if origin in (Union, UnionType):
        return " or ".join(_type(item) for item in get_args(hint) if item is not NoneType)
    if origin is tuple:
        return f"list of {_type(get_args(hint)[0])}"
    return {str: "string", int: "integer", float: "number", bool: "`true` or `false`"}.get(hint, f"`{hint}`")


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING:
        return "required"
    if item.default is None:
        return ""
    value = list(item.default) if isinstance(item.default, tuple) else item.default
    shown = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return f"`{_cell(shown)}`"


def run_directory() -> str:
    """Return the page of what a run writes, from the paths of `RunDirectory`."""
    paths = RunDirectory("OUTPUT")
    rows = []
    for name, member in vars(RunDirectory).items():
        if isinstance(member, property):
            said = (member.__doc__ or "").removeprefix("Return the ").rstrip(".")
            rows.append(f"| `{getattr(paths, name)}` | {_cell(said)} |")
    head, layout, rest = (output.__doc__ or "").split("\n\n", 2)
    del head
    return (
        f"# Run directory\n\n{MADE}\nHow to use it: [what a run leaves](../run_directory.md).\n\n"
        f"```text\n{textwrap.dedent(layout)}\n```\n\n{rest.strip()}\n\n"
        "| address | what is there, of linking or training |\n|---|---|\n" + "\n".join(rows) + "\n"
    )


def columns() -> str:
    """Return the page of the columns of mentions and of answers."""
    said = _words(Mention)
    said |= {
        "image_uri": "Address of the picture.",
        "image_bytes": "Content of the picture's file.",
        "image_features": "Features of the picture, of the image encoder's width.",
        "entity_id": "Gold label: identifier of the entity, for demonstrations, training and evaluation.",
        "entity_name": "Name of that entity.",
    }
    given = [f"| `{name}` | {_arrow(column.type)} | {said[name]} |" for name, column in MENTION_COLUMNS.items()]
    answers = _rows(PREDICTION_SCHEMA, _words(Prediction))
    parts = [
        f"# Columns\n\n{MADE}\n\n## Mentions\n\n| column | type | |\n|---|---|---|\n" + "\n".join(given),
        "## Answers\n\n" + _paragraph(Prediction) + "\n\n| column | type | |\n|---|---|---|\n" + "\n".join(answers),
    ]
    for name, kind in (("candidates", Candidate), ("pool", PoolEntity)):
        words = _words(kind)
        words["name"] = words.get("entity_name", "")
        inner = _rows(PREDICTION_SCHEMA.field(name).type.value_type, words)
        parts.append(f"### Items of `{name}`\n\n| field | type | |\n|---|---|---|\n" + "\n".join(inner))
    return "\n\n".join(parts) + "\n"


def _rows(fields: Any, words: dict[str, str]) -> list[str]:
    return [f"| `{item.name}` | {_arrow(item.type)} | {words[item.name]} |" for item in fields]


def _arrow(kind: Any) -> str:
    """Return an Arrow type in words; what lists hold in full stands in a table of its own."""
    if pa.types.is_list(kind):
        return f"list of {_arrow(kind.value_type)}"
    return "struct" if pa.types.is_struct(kind) else str(kind)

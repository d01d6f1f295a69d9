"""Pages of the reference on the command line, from `--help`, and on the Python API, from its source."""

from __future__ import annotations

import ast
import io
import os
import re
import sys
import textwrap
from contextlib import redirect_stdout, suppress
from pathlib import Path
from unittest.mock import patch

from docstring_parser import Docstring, parse

from gemel_engine.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent
# Their `--help` lists all settings, which the page of the configuration has.
CONFIGURED = {"link": "gemel-link", "train": "gemel-train", "find-mentions": "gemel-find-mentions"}
NESTED = {"import": ("wikidata", "dbpedia", "table", "mentions"), "import-gemel": ("mapper", "mentions")}
API = {
    "gemel_engine/config/loading.py": ("load_config",),
    "gemel_engine/linker.py": ("Linker", "Explanation", "explain"),
    "gemel_engine/types.py": ("Mention", "Prediction", "Candidate", "PoolEntity"),
    "gemel_engine/linking/job.py": ("link_corpus",),
    "gemel_engine/training/job.py": ("train_mapper",),
    "gemel_engine/spacy_component.py": ("register",),
}
IMPORTS = (
    "`Linker`, `LinkConfig` and `load_config` are imported from `gemel_engine`, the others from the modules that are "
    "named."
)
FRAME = re.compile(r"^[╭╰][─ ]*(.*?)[─ ]*[╮╯]$")


def command_line(made: str) -> str:
    """Return the page of all commands with their options."""
    parts = [
        "# Command line\n\n"
        + textwrap.fill(f"{made} `gemel --help` lists the commands, with the exit codes.", 100)
        + "\n"
    ]
    for command in COMMANDS:
        parts.append(f"## gemel {command}\n")
        for nested in NESTED.get(command, ("",)):
            arguments = [command, *filter(None, [nested])]
            heading = f"### gemel {' '.join(arguments)}\n\n" if nested else ""
            if command in CONFIGURED:
                said = parse(COMMANDS[command].function.__doc__ or "").short_description
                page = f"configuration.md#{CONFIGURED[command]}"
                options = f"Every key of the [configuration]({page}) is an option; `--help-all` lists them."
                parts.append(
                    f"```text\ngemel {command} CONFIG.toml [--key value ...]\n```\n\n{said}\n\n"
                    f"{textwrap.fill(options, 100, break_on_hyphens=False)}\n"
                )
            else:
                parts.append(f"{heading}```text\n{help_of(arguments)}\n```\n")
    return "\n".join(parts)


def help_of(arguments: list[str]) -> str:
    """Return what a command prints with `--help`, without frames."""
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")  # frames are as plain as the encoding demands
    width = {"COLUMNS": "100", "LINES": "100", "NO_COLOR": "1"}
    environment = patch.dict(os.environ, width)
    command = patch.object(sys, "argv", ["gemel", *arguments, "--help"])
    with environment, command, redirect_stdout(printed), suppress(SystemExit):
        main()
    printed.seek(0)
    lines = [FRAME.sub(r"\1", line.strip()).strip("│").rstrip() for line in printed]
    assert lines, f"gemel {' '.join(arguments)} --help printed nothing"
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^ *─+$", "", "\n".join(lines), flags=re.MULTILINE)).strip()


def python_api(made: str) -> str:
    """Return the page of the functions and classes that programs may use."""
    parts = ["# Python API\n\n" + textwrap.fill(f"{made} {IMPORTS}", 100) + "\n"]
    for path, names in API.items():
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        module = path.removesuffix(".py").replace("/", ".")
        for name in names:
            parts.append(f"## {name}\n\nIn `{module}`.\n\n{_described(defined[name])}\n")
            node = defined[name]
            if isinstance(node, ast.ClassDef):
                parts += [
                    f"### {name}.{method.name}\n\n{_described(method)}\n"
                    for method in node.body
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                ]
    return "\n".join(parts)


def _described(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return the signature of a function and the docstring of a definition, in Markdown."""
    said = parse(ast.get_docstring(node) or "")
    parts = []
    if isinstance(node, ast.FunctionDef):
        returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        parts.append(f"```text\n{node.name}({ast.unparse(node.args)}){returned}\n```")
    if said.description:
        parts += [textwrap.fill(" ".join(part.split()), 100) for part in said.description.split("\n\n")]
    parts += _items(said)
    return "\n\n".join(parts)


def _items(said: Docstring) -> list[str]:
    """Return the parameters, the result and the errors of a docstring as lists."""
    parts = []
    for kind, heading in (("param", ""), ("attribute", "Attributes:\n\n")):
        found = [_item(f"`{item.arg_name}`", item.description) for item in said.params if item.args[0] == kind]
        if found:
            parts.append(heading + "\n".join(found))
    if said.returns and said.returns.description:
        parts.append(textwrap.fill("Returns: " + " ".join(said.returns.description.split()), 100))
    if said.raises:
        parts.append("Raises:\n\n" + "\n".join(_item(f"`{item.type_name}`", item.description) for item in said.raises))
    return parts


def _item(name: str, text: str | None) -> str:
    return textwrap.fill(f"- {name}: {' '.join((text or '').split())}", 100, subsequent_indent="  ")

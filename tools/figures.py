"""Figures of documents: what stands between two marks is taken from `benchmarks/results/*.json`.

`<!-- =score/wikidiverse.score .3f -->0.894<!-- / -->` is the value at `wikidiverse.score` in `score.json`, in
Python's format `.3f`. With `script` in the place of the format it is the script that measured the value. Marks are
comments, which no reader of the rendered document sees.

A script that was needed once is not kept: its command is then shown with the commit at which it is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARK = re.compile(r"(<!-- =(?P<reference>\S[^>]*?) (?P<layout>\S+) -->)(?P<shown>[^<]*)(<!-- / -->)")
SCRIPT = re.compile(r"\bpython (?:-u )?(?:(?P<path>\w+/\w+\.py)|-m (?P<module>[\w.]+)(?: [a-z]+\b)?)")


class Results:
    """The files of one directory of results.

    Args:
        directory: The directory.
        derived: What is calculated from the others, as further files, by name.
    """

    def __init__(
        self, directory: Path, derived: Mapping[str, Callable[[Results], dict[str, Any]]] | None = None
    ) -> None:
        self._directory = directory
        self._derived = derived or {}
        self.read = cache(self._read)

    def names(self) -> list[str]:
        """Return the names of all files, without their endings."""
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def _read(self, name: str) -> dict[str, Any]:
        if name in self._derived:
            return self._derived[name](self)
        path = self._directory / f"{name}.json"
        if not path.is_file():
            raise LookupError(f"there is no file of results {path}")
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return content

    def look_up(self, reference: str) -> tuple[Any, dict[str, Any]]:
        """Return the value at `file/key/key…` and the record with its command, commit and conditions.

        Raises:
            LookupError: There is no such value.
        """
        name, *keys = reference.split("/")
        found: Any = self.read(name)
        record: dict[str, Any] = {}
        for key in keys:
            found = found[int(key)] if isinstance(found, list) else self._member(found, key, reference)
            if isinstance(found, dict) and "value" in found:
                record, found = found, found["value"]
        return found, record

    @staticmethod
    def _member(found: Any, key: str, reference: str) -> Any:
        if not isinstance(found, dict) or key not in found:
            raise LookupError(f"no result has {reference!r}: {key!r} is missing")
        return found[key]

    def show(self, reference: str, layout: str) -> str:
        """Return the value at a reference in one of Python's formats, or the `script` that measured it.

        A result without a value is empty.
        """
        value, record = self.look_up(reference)
        if layout == "script":
            return origin(record | {"command": scripts(record["command"])[0][0]}, names_commit=False)
        return "" if value is None else format(value, layout)


def origin(record: Mapping[str, str], *, names_commit: bool = True) -> str:
    """Return the command of a result, and the commit: at which to run it where its script has gone since.

    Args:
        record: Command and commit.
        names_commit: Whether to name the commit, too, where the script is still there.
    """
    commits = ", ".join(commit[:7] for commit in record["commit"].split(", "))
    if not all(is_there for _, is_there in scripts(record["command"])):
        return f"`{record['command']}` at commit {commits}"
    return f"`{record['command']}`" + (f", commit {commits}" if names_commit else "")


def scripts(command: str) -> list[tuple[str, bool]]:
    """Return how each script of a command is called, without its options, and whether it is still there."""
    found = []
    for call in SCRIPT.finditer(command):
        module = (call["module"] or "").replace(".", "/")
        places = [call["path"]] if call["path"] else [f"{module}.py", f"{module}/__main__.py"]
        found.append((call[0], any((ROOT / place).is_file() for place in places)))
    return found


def fill_in(text: str, results: Results) -> str:
    """Return a document with each marked figure as the results have it."""

    def filled(mark: re.Match[str]) -> str:
        return f"{mark[1]}{results.show(mark['reference'], mark['layout'])}{mark[5]}"

    return MARK.sub(filled, text)


def without_marks(text: str) -> str:
    """Return a document as a reader sees it: its figures without the comments around them."""
    return MARK.sub(r"\g<shown>", text)

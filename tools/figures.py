"""Figures of documents: what stands between two marks is taken from `benchmarks/results/*.json`.

`<!-- =score/wikidiverse.score .3f -->0.894<!-- / -->` is the value at `wikidiverse.score` in `score.json`, in
Python's format `.3f`. Marks are comments, which no reader of the rendered document sees.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

MARK = re.compile(r"(<!-- =(?P<reference>\S[^>]*?) (?P<layout>\S+) -->)(?P<shown>[^<]*)(<!-- / -->)")


class Results:
    """The files of one directory of results."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.read = cache(self._read)

    def names(self) -> list[str]:
        """Return the names of all files, without their endings."""
        return sorted(path.stem for path in self._directory.glob("*.json"))

    def _read(self, name: str) -> dict[str, Any]:
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
        """Return the value at a reference in one of Python's formats; a result without a value is empty."""
        value, _ = self.look_up(reference)
        return "" if value is None else format(value, layout)


def fill_in(text: str, results: Results) -> str:
    """Return a document with each marked figure as the results have it."""

    def filled(mark: re.Match[str]) -> str:
        return f"{mark[1]}{results.show(mark['reference'], mark['layout'])}{mark[5]}"

    return MARK.sub(filled, text)


def without_marks(text: str) -> str:
    """Return a document as a reader sees it: its figures without the comments around them."""
    return MARK.sub(r"\g<shown>", text)

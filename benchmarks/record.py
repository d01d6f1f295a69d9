"""What benchmarks share: how a result is noted with what made it, and how a command is run."""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"

logger = logging.getLogger("benchmarks")


class ResultFile:
    """A file of results, to which a benchmark adds as it goes on.

    Args:
        name: Name of the file, without its ending.
        paths: Paths in the command that other readers have elsewhere, by the words that stand for them.
        variables: Environment variables that the command needs.
    """

    def __init__(self, name: str, paths: Mapping[str, Path] | None = None, variables: Iterable[str] = ()) -> None:
        self._path = RESULTS / f"{name}.json"
        settings = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
        self._command = " ".join([*settings, command_line(paths or {})])

    def read(self) -> dict[str, Any]:
        """Return what the file has, by name: records, which have a `value`."""
        return json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}

    def note(self, values: Mapping[str, object], what: str) -> None:
        """Add values, or replace those of their names.

        Args:
            values: What was measured, by name.
            what: What it was measured on, for the conditions.
        """
        conditions = f"{what}, {machine()}"
        made_by = {"command": self._command, "commit": commit(), "conditions": conditions}
        # Read again, since others may have written meanwhile.
        results = self.read() | {name: {"value": value, **made_by} for name, value in values.items()}
        self._path.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
        for name, value in values.items():
            logger.info("%s: %s", name, textwrap.shorten(json.dumps(value), 500))


def command_line(paths: Mapping[str, Path]) -> str:
    """Return the command of this process, with words for some of its paths."""
    words = {str(path): word for word, path in paths.items()}
    arguments = sys.orig_argv[sys.orig_argv.index("-m") :]  # without options of Python itself
    return " ".join(["python", *(words.get(str(Path(part))) or shlex.quote(part) for part in arguments)])


def machine() -> str:
    """Return the machine, how busy it was in the last quarter of an hour, and the date."""
    return f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[2]:.1f}, {datetime.now(UTC):%Y-%m-%d}"


def commit(tree: Path = RESULTS) -> str:
    """Return the commit that is checked out."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout.strip()


def mean(values: Iterable[Any], digits: int = 4) -> float:
    """Return a mean, or a share of truths, rounded."""
    return round(float(np.mean(list(values))), digits)


def to_digits(right: Iterable[bool | np.bool_]) -> str:
    """Return a digit for each mention, 1 where its answer is right."""
    return "".join("1" if is_right else "0" for is_right in right)


def from_digits(digits: str) -> NDArray[np.int8]:
    """Return what `to_digits` wrote: (mentions,), 1 for each right answer, 0 for each wrong one."""
    return np.array([int(digit) for digit in digits], np.int8)


def difference(right: str, other: str) -> str:
    """Return the accuracy of the first less that of the second, with its paired 95% interval.

    Args:
        right: Digits of the first, as `to_digits` writes them.
        other: Digits of the second, for the same mentions.
    """
    from gemel_engine.evaluation.judge import Measured  # needs packages that a bare machine with a GPU may lack

    measured = Measured.of(from_digits(right) - from_digits(other))
    return f"{measured.value:+.3f} [{measured.low:+.3f}, {measured.high:+.3f}]"


def run(commands: Callable[..., None] | Mapping[str, Callable[..., None]]) -> None:
    """Run a function, or one of several by its name, with the arguments of the command line."""
    import tyro  # a bare machine with a GPU may lack it

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    name = " ".join(command_line({}).split()[:3])
    if isinstance(commands, Mapping):
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog=name)
    else:
        tyro.cli(commands, prog=name)

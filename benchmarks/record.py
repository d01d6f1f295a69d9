"""What benchmarks share: how a result is noted, with what made it, and how a script is run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemel_engine.evaluation.judge import Measured


def record(value: object, command: str, what: str) -> dict[str, Any]:
    """A result with its command, commit and conditions; `what` says what was measured."""
    return {"value": value, "command": command, "commit": commit(), "conditions": f"{what}, {machine()}"}


def machine() -> str:
    """The machine, how busy it was in the last quarter of an hour, and the date."""
    return f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[2]:.1f}, {datetime.now(UTC):%Y-%m-%d}"


def commit() -> str:
    """The commit that is checked out."""
    return subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def to_digits(right: Iterable[bool | np.bool_]) -> str:
    """A digit for each mention, 1 where its answer is right."""
    return "".join("1" if is_right else "0" for is_right in right)


def from_digits(digits: str) -> NDArray[np.int8]:
    """What `to_digits` wrote: (mentions,), 1 for each right answer, 0 for each wrong one."""
    return np.array([int(digit) for digit in digits], np.int8)


def difference(right: str, other: str) -> str:
    """Accuracy of the first less that of the second, with its paired 95% interval; both are of `to_digits`."""
    measured = Measured.of(from_digits(right) - from_digits(other))
    return f"{measured.value:+.3f} [{measured.low:+.3f}, {measured.high:+.3f}]"


def run_script(log: Path, *command: str) -> None:
    """Run a script of the project with this Python; its output is appended to a log."""
    with log.open("a") as stream:
        subprocess.run([sys.executable, *command], check=True, stdout=stream, stderr=stream)

"""What benchmarks share: how a result is noted, with what made it, and how a script of the project is run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def record(value: object, command: str, what: str) -> dict[str, Any]:
    """A result with its command, commit and conditions; `what` says what was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    machine = (
        f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[2]:.1f}, {datetime.now(UTC):%Y-%m-%d}"
    )
    return {"value": value, "command": command, "commit": commit, "conditions": f"{what}, {machine}"}


def run_script(log: Path, *command: str) -> None:
    """Run a script of the project with this Python; its output is appended to a log."""
    with log.open("a") as stream:
        subprocess.run([sys.executable, *command], check=True, stdout=stream, stderr=stream)

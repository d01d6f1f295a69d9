"""How every benchmark notes a result: the value, and what made it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from typing import Any


def record(value: object, command: str, what: str) -> dict[str, Any]:
    """A result with its command, commit and conditions; `what` says what was measured."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    machine = (
        f"{os.cpu_count()} cores {platform.machine()}, load {os.getloadavg()[2]:.1f}, {datetime.now(UTC):%Y-%m-%d}"
    )
    return {"value": value, "command": command, "commit": commit, "conditions": f"{what}, {machine}"}

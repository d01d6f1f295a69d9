"""Model Runner V2 as a whole engine, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support


@pytest.mark.heavy
def test_the_second_runner_gives_what_transformers_gives() -> None:
    """Triton's interpreter is chosen when Triton is imported, so this runs in a process of its own."""
    pytest.importorskip("triton")
    tests = Path(support.__path__[0]).parent
    result = subprocess.run(
        [sys.executable, tests / "support/engine_v2.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]

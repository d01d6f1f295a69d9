"""Directories that are claimed while an artifact is written to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemel_engine.errors import ConfigurationError
from gemel_engine.storage.manifest import claimed

pytestmark = pytest.mark.unit


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("number", [None, 10**30, pytest.param(os.getpid(), id="of this process")])
def test_the_claim_of_a_process_that_has_ended_is_void(tmp_path: Path, number: int | None) -> None:
    claim = tmp_path / ".being-written"
    claim.write_text(f"process {number or ended_process()} on {socket.gethostname()}")
    with claimed(tmp_path):
        assert claim.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ConfigurationError, match="is being written by another command"), claimed(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("owner", [f"process 1 on {socket.gethostname()}", "process 99999999 on elsewhere", "", "?"])
def test_any_other_claim_is_respected(tmp_path: Path, owner: str) -> None:
    (tmp_path / ".being-written").write_text(owner)
    with pytest.raises(ConfigurationError, match="if that command was killed, remove"), claimed(tmp_path):
        pass
    assert (tmp_path / ".being-written").read_text() == owner

"""The benchmark of a GPU, tried on the CPU with tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


@pytest.mark.heavy
@pytest.mark.parametrize("part", ["device", "mask", "training", "encoder", "transformers_engine", "vllm"])
def test_a_part_gives_figures(part: str, tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    variables = {"DEVICE": "cpu", "SHAPE": "tiny"}
    command = [sys.executable, "-m", "benchmarks.gpu", part, str(target)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | variables)
    assert json.loads(target.read_text())

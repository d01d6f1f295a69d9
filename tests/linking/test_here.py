"""Small runs in one process: the same output as on Ray, and no library of models where nothing is left to link."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.corpus import predictions, run_job, toml, write_mentions
from support.paths import ROOT

from gemel_engine.config.loading import load_config
from gemel_engine.config.resources import PoolSettings, ResourceSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linking import here
from gemel_engine.linking.here import is_run_here
from gemel_engine.pipeline.corpus import Shard

SHARDS = [Shard(0, "mentions.parquet", "", 0, 9)]
MODEL_LIBRARIES = "torch", "transformers", "open_clip", "ray", "vllm"
# Links as `gemel link` does, and prints which of the libraries it has imported.
CODE = f"""
import sys
from gemel_engine.cli.main import main
main("link")
print("imported:", *(name for name in {MODEL_LIBRARIES} if name in sys.modules))
"""


@pytest.fixture
def path(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    return path


def imported_by_link(path: Path, *options: str) -> set[str]:
    command = [sys.executable, "-c", CODE, str(path), *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=540)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return set(finished.stdout.rpartition("imported:")[2].split())


def test_a_small_run_needs_no_ray_and_gives_the_same(path: Path, tmp_path: Path) -> None:
    """And neither its rerun nor a dry run imports a library of models."""
    output = str(tmp_path / "output")
    imported = imported_by_link(path)
    assert "torch" in imported
    assert "ray" not in imported
    assert imported_by_link(path) == set()
    assert imported_by_link(path, "--dry-run", "--output", str(tmp_path / "other")) == set()
    for name in ("_parts", "_marks"):
        assert not Path(output, name).exists()

    on_ray = str(tmp_path / "on_ray")
    finished = run_job(path, "--output", on_ray, RAY_ADDRESS="local")
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert predictions(on_ray) == predictions(output)
    files = sorted(file.name for file in Path(output, "data").iterdir())
    assert files == sorted(file.name for file in Path(on_ray, "data").iterdir())
    for file in files:
        assert pq.read_schema(Path(output, "data", file)).equals(pq.read_schema(Path(on_ray, "data", file)))


def test_a_model_of_the_same_size_and_time_is_checked_again(path: Path, artifacts: dict[str, Path]) -> None:
    """What passed is remembered by content: file times are no identity."""
    weights = artifacts["mention_encoder"] / "model.safetensors"
    before, status = weights.read_bytes(), weights.stat()
    imported_by_link(path, "--dry-run")
    try:
        weights.write_bytes(before[:-4] + bytes(4))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        finished = run_job(path, "--dry-run")
    finally:
        weights.write_bytes(before)
    assert finished.returncode == 4
    assert "encoded by another mention encoder" in finished.stderr


def test_where_a_run_is_linked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_LOGGING_CONFIG_ENCODING"):
        monkeypatch.delenv(name, raising=False)
    config = load_config(LinkConfig, path)
    assert is_run_here(config, SHARDS)
    with monkeypatch.context() as changed:
        changed.setattr(here, "_MOST_ROWS", 8)
        assert not is_run_here(config, SHARDS)
    with monkeypatch.context() as changed:
        changed.setenv("RAY_ADDRESS", "local")
        assert not is_run_here(config, SHARDS)
    two = ResourceSettings(generation=PoolSettings(max_actors=2))
    assert not is_run_here(replace(config, resources=two), SHARDS)
    mark = Path(config.output, "_marks/generation/0-0-4/0-4.0/mark")  # of a process that has ended
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert not is_run_here(config, SHARDS)

"""Where a run is linked, and when its models are checked again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.corpus import toml, write_mentions

from gemel_engine.config.loading import load_config
from gemel_engine.config.resources import PoolSettings, ResourceSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError
from gemel_engine.linking import here
from gemel_engine.linking.here import is_run_here
from gemel_engine.linking.job import describe_run
from gemel_engine.pipeline.corpus import Shard

SHARDS = [Shard(0, "mentions.parquet", "", 0, 9)]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LinkConfig:
    """A run that takes place in one process; its artifacts do not exist."""
    for name in ("RAY_ADDRESS", "RAY_LOGGING_CONFIG_ENCODING"):
        monkeypatch.delenv(name, raising=False)
    names = "language_model", "mention_encoder", "image_encoder", "knowledge_base", "demonstrations", "feature_mapper"
    path = tmp_path / "link.toml"
    path.write_text(toml(dict.fromkeys(names, "none"), tmp_path / "mentions.parquet", tmp_path / "output"))
    return load_config(LinkConfig, path)


@pytest.mark.unit
def test_few_rows_are_linked_here_unless_something_asks_for_ray(
    config: LinkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_run_here(config, SHARDS)
    for resources in (
        ResourceSettings(generation=PoolSettings(max_actors=2)),
        ResourceSettings(retrieval=PoolSettings(num_gpus=0.1)),
    ):
        assert not is_run_here(replace(config, resources=resources), SHARDS)
    two_processes = replace(config.language_model, tensor_parallel_size=2)
    assert not is_run_here(replace(config, language_model=two_processes), SHARDS)
    with monkeypatch.context() as changed:
        changed.setattr(here, "_MOST_ROWS", 8)
        assert not is_run_here(config, SHARDS)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert not is_run_here(config, SHARDS)


@pytest.mark.unit
def test_a_run_in_which_a_process_has_ended_goes_on_with_ray(config: LinkConfig) -> None:
    mark = Path(config.output, "_marks/generation/0-0-4/0-4.0/mark")
    mark.parent.mkdir(parents=True)
    mark.touch()
    assert not is_run_here(config, SHARDS)


def test_a_model_of_the_same_size_and_time_is_checked_again(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """What passed is remembered by content: file times are no identity."""
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    config, weights = load_config(LinkConfig, path), artifacts["mention_encoder"] / "model.safetensors"
    before, status = weights.read_bytes(), weights.stat()
    describe_run(config)
    try:
        weights.write_bytes(before[:-4] + bytes(4))
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(ArtifactError, match="encoded by another mention encoder"):
            describe_run(config)
    finally:
        weights.write_bytes(before)

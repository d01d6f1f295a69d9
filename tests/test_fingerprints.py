"""Models and artifacts belong to a run by their content, in the driver and in every process that opens them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.corpus import toml, write_mentions
from support.models import (
    TINY_VIT,
    write_image_encoder,
)

from gemel_engine import fingerprints as fingerprints
from gemel_engine.compatibility import check_mapper
from gemel_engine.config.components import VisionSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.language_model import language_model_fingerprint
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.fingerprints import Contents, checkpoint_fingerprint
from gemel_engine.linking import job as linking
from gemel_engine.linking.job import checked_plan, describe_run
from gemel_engine.linking.stages import GenerateEntityNames
from gemel_engine.pipeline.output import claim_output
from gemel_engine.pipeline.stages import EncodeImages, Retrieve
from gemel_engine.vision.mapper import FeatureMapper


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> LinkConfig:
    """A run with models of its own, without pictures: a feature mapper would tell language models apart."""
    models = {name: tmp_path / name for name in ("language_model", "mention_encoder", "image_encoder")}
    for name, directory in models.items():
        shutil.copytree(artifacts[name], directory)
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts | models, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    return replace(load_config(LinkConfig, path), vision=VisionSettings())


def change_a_weight(directory: Path) -> None:
    """Another value in the middle of the file, which keeps its size."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] += 1
    save_file(weights, path, metadata={"format": "pt"})


def change_the_configuration(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 5000.0}))


CHANGES = [change_a_weight, change_the_configuration]


@pytest.mark.parametrize("change", CHANGES)
def test_a_language_model_that_was_replaced_is_another_run_s(
    config: LinkConfig, change: Callable[[Path], None]
) -> None:
    plan, found = checked_plan(config)
    claim_output(config.output, linking._identity(config, plan, found.contents))
    assert "9 of 9 rows are to be linked" in describe_run(config)
    change(Path(config.language_model.name))
    with pytest.raises(ConfigurationError, match=r"differs in artifacts\.language_model: choose another output"):
        describe_run(config)


def test_every_model_and_artifact_belongs_to_the_run(
    config: LinkConfig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    vision = VisionSettings(
        image_encoder=str(tmp_path / "image_encoder"), feature_mapper=str(artifacts["feature_mapper"])
    )
    contents = checked_plan(replace(config, vision=vision))[1].contents
    assert contents.keys() == {
        *("language_model", "mention_encoder", "image_encoder"),
        *("knowledge_base", "demonstrations", "feature_mapper"),
        "weights",
    }


@pytest.fixture
def contents(config: LinkConfig) -> Contents:
    return checked_plan(config)[1].contents


def test_an_actor_that_opens_another_language_model_is_refused(config: LinkConfig, contents: Contents) -> None:
    """As on a node with another model at the same path, or in an actor that is started again."""
    GenerateEntityNames(config, contents)
    change_a_weight(Path(config.language_model.name))
    with pytest.raises(ArtifactError, match=r"language model .* is not the one that the run began with.*on all nodes"):
        GenerateEntityNames(config, contents)


def test_an_actor_that_opens_another_artifact_is_refused(
    config: LinkConfig, contents: Contents, tmp_path: Path
) -> None:
    other = tmp_path / "knowledge_base"
    shutil.copytree(config.knowledge_base, other)
    manifest = json.loads((other / "knowledge_base.json").read_text())
    (other / "knowledge_base.json").write_text(json.dumps(manifest | {"vocabulary_size": 7}))
    with pytest.raises(ArtifactError, match=r"knowledge base .* is not the one that the run began with"):
        GenerateEntityNames(replace(config, knowledge_base=str(other)), contents)
    (other / "knowledge_base.json").unlink()
    with pytest.raises(ArtifactError, match=r"knowledge_base\.json' is missing or damaged .*; build the artifact"):
        GenerateEntityNames(replace(config, knowledge_base=str(other)), contents)


def test_an_actor_that_opens_another_mention_encoder_is_refused(config: LinkConfig, contents: Contents) -> None:
    Retrieve(config, contents)
    change_a_weight(Path(str(config.retrieval.mention_encoder)))
    with pytest.raises(ArtifactError, match=r"mention encoder .* is not the one that the run began with"):
        Retrieve(config, contents)


def test_an_actor_that_opens_another_image_encoder_is_refused(
    config: LinkConfig, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """Which a feature mapper that was made for any encoder of its width does not refuse."""
    FeatureMapper.random(64, 2, 64, seed=0).save(tmp_path / "feature_mapper")
    image_encoder = tmp_path / "image_encoder"
    vision = VisionSettings(image_encoder=str(image_encoder), feature_mapper=str(tmp_path / "feature_mapper"))
    config = replace(config, demonstrations=None, vision=vision)
    contents = checked_plan(config)[1].contents
    EncodeImages(config, contents)
    write_image_encoder(image_encoder, TINY_VIT, seed=1)
    with pytest.raises(ArtifactError, match=r"image encoder .* is not the one that the run began with"):
        EncodeImages(config, contents)


def test_every_tensor_of_a_large_file_counts(
    config: LinkConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At its beginning, at its end, and where all of it changes."""
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 1 << 10)
    monkeypatch.setattr(fingerprints, "_SAMPLED_BYTES", 1 << 6)
    directory = Path(config.language_model.name)
    path = directory / "model.safetensors"
    weights, before = load_file(path), checkpoint_fingerprint(str(directory))
    found = {before}
    for name, weight in weights.items():
        for position in (0, -1):
            changed = weight.clone()
            changed.view(-1)[position] += 1
            save_file(weights | {name: changed}, path, metadata={"format": "pt"})
            found.add(checkpoint_fingerprint(str(directory)))
    assert len(found) == 1 + 2 * len(weights)
    save_file(weights, path, metadata={"format": "pt"})
    assert checkpoint_fingerprint(str(directory)) == before


def test_large_weights_in_any_format_are_sampled(config: LinkConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 1 << 10)
    directory = Path(config.language_model.name)
    found = set()
    for content in (bytes(1 << 20), bytes(1 << 20 | 1), b"\xff" * (1 << 20), bytes(1 << 19) + b"\xff" * (1 << 19)):
        for name in ("pytorch_model.bin", "damaged.safetensors"):
            (directory / name).write_bytes(content)
            found.add(checkpoint_fingerprint(str(directory)))
    assert len(found) == 8


def test_a_model_that_is_not_there_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        checkpoint_fingerprint(str(tmp_path / "nowhere"))


def test_a_model_of_the_hub_is_the_same_with_any_number_of_its_files(
    artifacts: dict[str, Path], config: LinkConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A node has its configuration alone, until an engine has fetched the weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, of_model = "0" * 40, tmp_path / "models--org--model"
    snapshot = of_model / "snapshots" / commit
    shutil.copytree(artifacts["language_model"], snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (of_model / "refs").mkdir()
    (of_model / "refs" / "main").write_text(commit)
    assert checkpoint_fingerprint("org/model") == commit
    assert language_model_fingerprint("org/model") is None
    hub = replace(config, language_model=replace(config.language_model, name="org/model"))
    mapper = FeatureMapper.random(64, 2, 64, 0, language_model_fingerprint="another")
    check_mapper(hub, mapper, None)
    shutil.copy(artifacts["language_model"] / "model.safetensors", snapshot)
    assert checkpoint_fingerprint("org/model") == commit
    assert language_model_fingerprint("org/model") == language_model_fingerprint(str(artifacts["language_model"]))
    with pytest.raises(ArtifactError, match="another language model"):
        check_mapper(hub, mapper, None)

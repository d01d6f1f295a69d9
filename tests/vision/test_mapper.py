"""The feature mapper's arithmetic, and what `load` accepts and refuses."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from support.trouble import damage, edit_manifest, make_endless

from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.vision import mapper as mapper_module
from gemel_engine.vision.mapper import FeatureMapper

C, P, D = 5, 3, 4


@pytest.fixture
def mapper() -> FeatureMapper:
    return FeatureMapper.random(C, P, D, seed=7, language_model_fingerprint="lm", image_encoder_fingerprint="encoder")


@pytest.fixture
def directory(mapper: FeatureMapper, tmp_path: Path) -> Path:
    mapper.save(tmp_path / "mapper")
    return tmp_path / "mapper"


def test_each_prefix_position_is_its_own_block_of_the_linear_layer(mapper: FeatureMapper) -> None:
    features = torch.randn(2, C)
    prefixes = mapper(features)
    assert prefixes.shape == (2, P, D)
    for p in range(P):
        block = features @ mapper.linear.weight[p * D : (p + 1) * D].T + mapper.linear.bias[p * D : (p + 1) * D]
        torch.testing.assert_close(prefixes[:, p], block)


def test_random_depends_on_the_seed_only() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (FeatureMapper.random(C, P, D, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_z_scores_leave_constant_features_finite() -> None:
    mapper = FeatureMapper.random(C, P, D, seed=7, scaling="z_score")
    features = torch.randn(100, C) * 3 + 2
    features[:, 0] = 1.5
    mapper.fit_scaling(features)
    z = (features - features.mean(0)) / features.std(0, correction=0)
    z[:, 0] = 0
    torch.testing.assert_close(mapper(features).flatten(1), mapper.linear(z))


def test_scaling_to_a_norm() -> None:
    mapper = FeatureMapper.random(C, P, D, seed=7, scaling="z_score_norm")
    mapper.fit_scaling(torch.randn(100, C) * 3 + 2)
    torch.testing.assert_close(mapper.scaled(torch.randn(7, C)).norm(dim=1), torch.full((7,), C**0.5))


def test_the_closed_form_recovers_a_linear_map_and_shrinks_with_its_penalty() -> None:
    truth = FeatureMapper.random(C, P, D, seed=1)
    mapper = FeatureMapper.random(C, P, D, seed=2, scaling="z_score")
    features = torch.randn(200, C) + 1
    with torch.no_grad():
        embeddings = truth(features)
    mapper.fit_scaling(features)
    mapper.fit_ridge(features, torch.split(embeddings, 7), penalty=0.0)
    torch.testing.assert_close(mapper(features), embeddings, atol=1e-4, rtol=1e-4)
    assert mapper.metadata.initialisation == "ridge"
    weight = mapper.linear.weight.clone()
    mapper.fit_ridge(features, [embeddings], penalty=10.0)
    assert mapper.linear.weight.norm() < 0.5 * weight.norm()
    torch.testing.assert_close(mapper(features).mean(0), embeddings.mean(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sizes", [[300], [1, 99, 200]])
def test_the_closed_form_of_batches_is_that_of_the_whole(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As NumPy's least squares solves it, with the penalty as further rows; means lie far from zero."""
    monkeypatch.setattr(mapper_module, "_PICTURES_PER_BATCH", 64)
    features, embeddings = 0.1 * torch.randn(300, C) + 100, torch.randn(300, P, D) + 5
    mapper = FeatureMapper.random(C, P, D, seed=2)
    mapper.fit_ridge(features, torch.split(embeddings, sizes), penalty=0.5, gain=1.5)
    inputs, targets = features.double() - features.double().mean(0), embeddings.flatten(1).double()
    penalty = (0.5 * (inputs**2).mean() * 300).sqrt() * torch.eye(C)
    rows = torch.cat([inputs, penalty]), torch.cat([targets - targets.mean(0), torch.zeros(C, P * D)])
    weight = 1.5 * torch.linalg.lstsq(*rows).solution.T
    torch.testing.assert_close(mapper.linear.weight, weight.float(), atol=1e-6, rtol=1e-5)
    bias = targets.mean(0) - weight @ features.double().mean(0)
    torch.testing.assert_close(mapper.linear.bias, bias.float(), atol=1e-4, rtol=1e-5)


def test_the_demo_has_a_mapper() -> None:
    directory = ROOT / "examples" / "emoji" / "feature_mapper"
    metadata = FeatureMapper.load(directory).metadata
    assert (metadata.vision_width, metadata.prefix_length, metadata.language_model_width) == (1280, 4, 576)
    assert (metadata.origin, metadata.initialisation) == ("trained", "ridge")


def test_load_returns_what_was_saved(mapper: FeatureMapper, tmp_path: Path) -> None:
    mapper.metadata = replace(mapper.metadata, trained=True, details={"steps": 12, "loss": 0.5, "start": "random"})
    mapper.save(tmp_path)
    loaded = FeatureMapper.load(tmp_path)
    assert loaded.metadata == mapper.metadata
    features = torch.randn(2, C)
    assert torch.equal(loaded(features), mapper(features))


def test_bfloat16_weights_load_as_float32(mapper: FeatureMapper, tmp_path: Path) -> None:
    mapper.bfloat16().save(tmp_path)
    assert FeatureMapper.load(tmp_path).linear.weight.dtype == torch.float32


def test_the_scaling_is_kept_in_full(mapper: FeatureMapper, tmp_path: Path) -> None:
    mapper.metadata = replace(mapper.metadata, scaling="z_score")
    mapper.fit_scaling(100 + 0.1 * torch.randn(50, C))
    mapper.save(tmp_path, torch.bfloat16)
    features = 100 + 0.1 * torch.randn(2, C)
    torch.testing.assert_close(FeatureMapper.load(tmp_path)(features), mapper(features), atol=0.05, rtol=0.05)


def test_equal_pictures_teach_nothing(mapper: FeatureMapper) -> None:
    with pytest.raises(InputError, match="the 3 training pictures have the same features"):
        mapper.fit_ridge(torch.full((3, C), 0.3), [torch.randn(2, P, D), torch.randn(1, P, D)], penalty=1.0)


@pytest.mark.parametrize("name", ["mapper.json", "mapper.safetensors"])
def test_missing_or_damaged_file_is_refused(directory: Path, name: str) -> None:
    (directory / name).write_bytes((directory / name).read_bytes()[:20])
    with pytest.raises(ArtifactError, match=name):
        FeatureMapper.load(directory)
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        FeatureMapper.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, "format version 1"),
        ({"vision_width": C + 1}, "asks for"),
        ({"prefix_length": 0}, "prefix_length"),
        ({"prefix_length": 10**400}, "prefix_length"),
        (dict.fromkeys(("vision_width", "prefix_length", "language_model_width"), 1 << 20), "asks for"),
        ({"details": {"a": [[]]}}, "details"),
        ({"trained": "yes"}, "trained"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_description_that_does_not_fit_is_refused(directory: Path, changes: dict[str, object], message: str) -> None:
    edit_manifest(directory / "mapper.json", changes)
    with pytest.raises(ArtifactError, match=message):
        FeatureMapper.load(directory)


def test_a_changed_description_is_refused(directory: Path) -> None:
    path = directory / "mapper.json"
    path.write_text(path.read_text().replace('"scaling": "none"', '"scaling": "z_score"'))
    with pytest.raises(ArtifactError, match="has been changed since it was written"):
        FeatureMapper.load(directory)


def test_a_mapper_in_use_is_no_mapping_of_its_file(directory: Path) -> None:
    loaded = FeatureMapper.load(directory)
    before = loaded.linear.weight.clone()
    with (directory / "mapper.safetensors").open("r+b") as file:
        file.seek(-8 * C, 2)
        file.write(b"\1" * 8 * C)
    assert torch.equal(loaded.linear.weight, before)
    with (directory / "mapper.safetensors").open("r+b") as file:
        file.truncate(10)  # what reads a mapping behind the new end is ended by the operating system
    assert torch.equal(loaded.linear.weight, before)


@pytest.mark.parametrize("name", ["mapper.json", "mapper.safetensors"])
def test_what_is_no_regular_file_is_refused(directory: Path, name: str) -> None:
    make_endless(directory / name)
    with pytest.raises(ArtifactError, match="not a regular file"):
        FeatureMapper.load(directory)
    (directory / name).unlink()
    (directory / name).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="not a regular file"):
        FeatureMapper.load(directory)


def test_a_file_larger_than_the_mapper_is_not_read(directory: Path) -> None:
    with (directory / "mapper.safetensors").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"is larger than what mapper\.json asks for"):
        FeatureMapper.load(directory)


@pytest.mark.parametrize("content", ["[]", "null", "{"])
def test_description_that_is_no_object_is_refused(directory: Path, content: str) -> None:
    (directory / "mapper.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"mapper\.json"):
        FeatureMapper.load(directory)


@pytest.mark.parametrize(
    ("name", "value"), [("linear.weight", torch.nan), ("linear.bias", torch.inf), ("feature_std", 0.0)]
)
def test_unusable_weights_are_refused(directory: Path, name: str, value: float) -> None:
    weights = load_file(directory / "mapper.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, directory / "mapper.safetensors")
    with pytest.raises(ArtifactError, match=name):
        FeatureMapper.load(directory)


def test_other_weights_are_refused(directory: Path) -> None:
    weights = load_file(directory / "mapper.safetensors")
    save_file(weights | {"linear.bias": weights["linear.bias"] + 1}, directory / "mapper.safetensors")
    with pytest.raises(ArtifactError, match="checksum"):
        FeatureMapper.load(directory)


def test_extra_and_missing_tensors_are_refused(directory: Path) -> None:
    weights = load_file(directory / "mapper.safetensors")
    save_file(weights | {"extra": torch.zeros(1)}, directory / "mapper.safetensors")
    with pytest.raises(ArtifactError, match="extra"):
        FeatureMapper.load(directory)
    del weights["linear.bias"]
    save_file(weights, directory / "mapper.safetensors")
    with pytest.raises(ArtifactError, match=r"linear\.bias"):
        FeatureMapper.load(directory)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_weights_of_another_type_are_refused(directory: Path, dtype: torch.dtype) -> None:
    weights = load_file(directory / "mapper.safetensors")
    save_file(weights | {"linear.bias": weights["linear.bias"].to(dtype)}, directory / "mapper.safetensors")
    with pytest.raises(ArtifactError, match=r"linear\.bias is of torch\."):
        FeatureMapper.load(directory)


@settings(max_examples=200)
@given(
    name=st.sampled_from(["mapper.json", "mapper.safetensors"]),
    changes=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_damaged_bytes_give_an_error_or_the_same_mapper(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[tuple[int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("damaged")
    saved = FeatureMapper.random(C, P, D, seed=7)
    saved.save(directory)
    damage(directory / name, changes)
    with suppress(ArtifactError):
        assert torch.equal(FeatureMapper.load(directory).linear.weight, saved.linear.weight)

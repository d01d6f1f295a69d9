"""Configurations: defaults, overrides, and every kind of mistake by the full name of its key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

from gemel_engine.config.components import EngineSettings, ImagePolicy, SearchSettings
from gemel_engine.config.loading import load_config, validated, with_absolute_paths
from gemel_engine.config.settings import LinkConfig, TrainConfig
from gemel_engine.errors import ConfigurationError

pytestmark = pytest.mark.unit

REQUIRED = """
input = "in"
output = "out"
knowledge_base = "kb"
"""
MINIMAL = REQUIRED + "language_model = { name = 'lm' }\n"


def load(tmp_path: Path, text: str, *overrides: str) -> LinkConfig:
    path = tmp_path / "link.toml"
    path.write_text(text)
    return load_config(LinkConfig, path, overrides)


def test_overrides_come_last(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL + "search = { width = 2, max_rollouts = 8 }", "--search.max-rollouts", "9", "--input", "other"
    )
    assert (config.input, config.search.width, config.search.max_rollouts) == ("other", 2, 9)


def test_a_slash_at_the_end_of_an_address_means_nothing(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL, "--output", "s3://bucket/out/", "--knowledge-base", "kb//", "--input", "/")
    assert (config.output, config.knowledge_base, config.input) == ("s3://bucket/out", "kb", "/")


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("search = { objectiv = 'sum' }", "unknown key 'search.objectiv'; did you mean 'objective'"),
        ("demonstration = 'd'", "unknown key 'demonstration'; did you mean 'demonstrations'"),
        ("search = { objective = 'max' }", r"search\.objective: .*'sum' or 'mean'.* \(got 'max'\)"),
        ("search = { width = 'wide' }", r"search\.width: .*integer"),
        ("search = { width = 0 }", r"search\.width: .*greater than or equal to 1 \(got 0\)"),
        ("search = { num_to_certify = 9 }", "num_to_certify is 9: it must not be above num_candidates 5"),
        (
            "previous = 'linked'\nlanguage_model = { name = 'lm' }\nscore = { kind = 'language_model' }",
            "ranking is 'mean': .*leave out `previous`, or set search.ranking = \"objective\"",
        ),
        ("rows_per_shard = 0", "rows_per_shard: .*greater than or equal to 1"),
        ("max_failed_fraction = 2.0", "max_failed_fraction: .*less than or equal to 1"),
        ("demonstrations = 'd'", "demonstrations need retrieval.mention_encoder"),
        ("resources = { images = { min_actors = 2 } }", "min_actors is 2: it must not be above max_actors 1"),
        (
            "resources = { generation = { num_gpus = 1.5 } }",
            "num_gpus is 1.5: give an actor a share of one GPU, or whole",
        ),
        ("resources = { generation = { num_gpus = 2 } }", "num_gpus is 2 and .*tensor_parallel_size 1: an actor needs"),
        (
            "language_model = { name = 'lm', tensor_parallel_size = 4 }\nresources = { generation = { num_gpus = 1 } }",
            "num_gpus is 1 and .*tensor_parallel_size 4: an actor needs",
        ),
        (
            "resources = { generation = { num_gpus = 0.5 } }",
            "gpu_memory_utilization is 0.9 and .*num_gpus 0.5: .*shares",
        ),
        (
            "language_model = { name = 'lm', engine = 'transformers' }\nresources = { generation = { num_gpus = 1 } }",
            "num_gpus is 1, but the engine transformers uses no GPU",
        ),
        (
            "vision = { image_encoder = 'e', feature_mapper = 'm', device = 'cuda' }",
            "vision.device is 'cuda' and resources.images.num_gpus 0: .*such as 0.25",
        ),
        ("output_columns = ['text', 'text']", r"output_columns is \['text', 'text'\]: name each column once"),
        ("image_source = { allowed_prefixes = ['relative'] }", "allowed_prefixes: cannot use 'relative'"),
        ("=", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, (REQUIRED if "language_model" in addition else MINIMAL) + addition)


def test_wrong_overrides_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigurationError, match=r"search\.width: .*greater than or equal to 1 \(got 0\)"):
        load(tmp_path, MINIMAL, "--search.width", "0")
    with pytest.raises(SystemExit, match="2"):
        load(tmp_path, MINIMAL, "--search.width", "wide")
    assert "--search.width" in capsys.readouterr().err


def numeric_settings(settings: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """The path and type of each number below a group of settings."""
    for name, hint in get_type_hints(settings).items():
        kinds = {hint, *get_args(hint)}
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from numeric_settings(hint, (*prefix, name))
        elif kind := kinds & {int, float}:
            yield (*prefix, name), kind.pop()


@pytest.mark.parametrize("config_type", [LinkConfig, TrainConfig])
def test_every_number_has_bounds(config_type: type) -> None:
    required = {"input": "i", "train": "t", "output": "o", "knowledge_base": "k", "language_model": {"name": "m"}}
    known = {field.name for field in dataclasses.fields(config_type)}
    adapter: TypeAdapter[Any] = TypeAdapter(config_type)
    found = list(numeric_settings(config_type))
    assert len(found) > 25
    for path, kind in found:
        for value in (math.nan, math.inf, -math.inf, -2, True, "1", 10**12 if kind is int else 1e12):
            values: dict[str, Any] = {name: value for name, value in required.items() if name in known}
            group = values
            for name in path[:-1]:
                group[name] = group = dict(group.get(name, {}))
            group[path[-1]] = value
            with pytest.raises(ValidationError) as refused:
                adapter.validate_python(values)
            assert [fault["loc"] for fault in refused.value.errors()] == [path], (path, value)


def test_a_configuration_made_in_python_is_checked_too() -> None:
    config = LinkConfig(input="i", output="o", knowledge_base="k/", language_model=EngineSettings(name="m"))
    assert validated(config).knowledge_base == "k"
    for wrong in (
        replace(config, rows_per_shard=0),
        replace(config, search=SearchSettings(width=-1)),
        replace(config, image_source=ImagePolicy(timeout_seconds=math.inf)),
    ):
        with pytest.raises(ConfigurationError, match="the configuration is wrong: "):
            validated(wrong)


def test_paths_become_absolute_for_processes_that_work_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load(tmp_path, MINIMAL + "vision = { feature_mapper = 'm' }\ncalibration = 's3://b/c'\nprevious = '/p'")
    found = with_absolute_paths(config)
    assert (found.output, found.vision.feature_mapper) == (f"{tmp_path}/{config.output}", f"{tmp_path}/m")
    assert (found.calibration, found.previous, found.demonstrations) == ("s3://b/c", "/p", None)
    assert found.language_model == config.language_model
    brought = tmp_path / "working_dir_files/_ray_pkg_0"
    brought.mkdir(parents=True)
    monkeypatch.chdir(brought)
    assert with_absolute_paths(config) == config


def test_a_byte_order_mark_means_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + MINIMAL).input == "in"


@pytest.mark.parametrize("deep", ["deep = " + "[" * 5000 + "]" * 5000, "deep = " + "{a=" * 5000 + "1" + "}" * 5000])
def test_a_deep_configuration_is_a_mistake(tmp_path: Path, deep: str) -> None:
    with pytest.raises(ConfigurationError, match="nested too deeply"):
        load(tmp_path, MINIMAL + deep)


@pytest.mark.parametrize("key", ["deep", "search", "language_model.name", "rows_per_shard"])
def test_deep_keys_are_named(tmp_path: Path, key: str) -> None:
    required = REQUIRED if key.startswith("language_model") else MINIMAL
    with pytest.raises(ConfigurationError, match=key.partition(".")[0]) as refused:
        load(tmp_path, required.replace("rows_per_shard", "") + key + ".a" * 5000 + " = 1")
    assert len(str(refused.value)) < 1000


def test_a_nul_in_an_address_is_a_mistake(tmp_path: Path) -> None:
    for setting in ("previous", "calibration", "demonstrations"):
        with pytest.raises(ConfigurationError, match=r"'a\\x00b': it holds a NUL; remove"):
            load(tmp_path, MINIMAL + f'{setting} = "a\\u0000b"')
    for model in ("a\\u0000b", "https://user:secret@host/model", ""):
        with pytest.raises(ConfigurationError, match="names no model: give a local directory") as refused:
            load(tmp_path, REQUIRED + f'language_model = {{ name = "{model}" }}')
        assert "secret" not in str(refused.value)


def test_a_mistake_says_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"vision: .*\(got a value of type list\)"):
        load(tmp_path, MINIMAL + "vision = ['s3://user:secret@bucket/mapper']")
    with pytest.raises(ConfigurationError, match=r"width: .*\(got 's3://\.\.\.@bucket'\)"):
        load(tmp_path, MINIMAL + "search = { width = 's3://user:secret@bucket' }")
    with pytest.raises(ConfigurationError, match=r"width: .*\(got a value of type int\)"):
        load(tmp_path, MINIMAL + "search = { width = 0x1" + "0" * 9000 + " }")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml can't be read"):
        load_config(LinkConfig, tmp_path / "nowhere.toml")

"""Configurations: defaults, overrides, and every kind of mistake by the full name of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemel_engine.config import LinkConfig, load_config
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
        ("search = { width = 0 }", "width is 0: it must be at least 1"),
        ("search = { num_to_certify = 9 }", "num_to_certify is 9: it must be from 1 to 5"),
        ("previous = 'linked'", "ranking is 'mean': .*leave out `previous`, or set search.ranking = \"objective\""),
        ("rows_per_shard = 0", "rows_per_shard: .*greater than 0"),
        ("max_failed_fraction = 2.0", "max_failed_fraction: .*less than or equal to 1"),
        ("demonstrations = 'd'", "demonstrations need retrieval.mention_encoder"),
        ("vision = { image_encoder = 'e' }", "needs vision.feature_mapper"),
        ("resources = { images = { max_actors = 0 } }", "min_actors 1 must be between 1 and max_actors 0"),
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
        ("image_source = { allowed_prefixes = ['relative'] }", "allowed_prefixes: cannot use 'relative'"),
        ("=", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, (REQUIRED if "language_model" in addition else MINIMAL) + addition)


def test_wrong_overrides_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load(tmp_path, MINIMAL, "--search.width", "0")
    assert "width is 0: it must be at least 1" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml can't be read"):
        load_config(LinkConfig, tmp_path / "nowhere.toml")

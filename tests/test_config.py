"""Configurations: defaults, overrides, and every kind of mistake by the full name of its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemel_engine.config import LinkConfig, load_config
from gemel_engine.errors import ConfigurationError

MINIMAL = """
input = "in"
output = "out"
knowledge_base = "kb"
language_model = { name = "lm" }
"""


def load(tmp_path: Path, text: str, *overrides: str) -> LinkConfig:
    path = tmp_path / "link.toml"
    path.write_text(text)
    return load_config(LinkConfig, path, overrides)


def test_overrides_come_last(tmp_path: Path) -> None:
    config = load(
        tmp_path, MINIMAL + "search = { width = 2, max_rollouts = 8 }", "--search.max-rollouts", "9", "--input", "other"
    )
    assert (config.input, config.search.width, config.search.max_rollouts) == ("other", 2, 9)


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        ("search = { objectiv = 'sum' }", "unknown key 'search.objectiv'; did you mean 'objective'"),
        ("demonstration = 'd'", "unknown key 'demonstration'; did you mean 'demonstrations'"),
        ("search = { objective = 'max' }", r"search\.objective: .*'sum' or 'mean'.* \(got 'max'\)"),
        ("search = { width = 'wide' }", r"search\.width: .*integer"),
        ("search = { width = 0 }", "width is 0: it must be at least 1"),
        ("search = { num_to_certify = 9 }", "num_to_certify is 9: it must be from 1 to 5"),
        ("rows_per_shard = 0", "rows_per_shard: .*greater than 0"),
        ("max_failed_fraction = 2.0", "max_failed_fraction: .*less than or equal to 1"),
        ("demonstrations = 'd'", "demonstrations need retrieval.mention_encoder"),
        ("vision = { image_encoder = 'e' }", "needs vision.feature_mapper"),
        ("resources = { images = { max_actors = 0 } }", "min_actors 1 must be between 1 and max_actors 0"),
        ("image_source = { allowed_prefixes = ['relative'] }", "allowed_prefixes: cannot use 'relative'"),
        ("=", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(tmp_path, MINIMAL + addition)


def test_wrong_overrides_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        load(tmp_path, MINIMAL, "--search.width", "0")
    assert "width is 0: it must be at least 1" in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml can't be read"):
        load_config(LinkConfig, tmp_path / "nowhere.toml")

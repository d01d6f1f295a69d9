"""The reference names everything that a user may set, call or read."""

from __future__ import annotations

from dataclasses import fields

import pytest
from reference import pages
from support.paths import ROOT

import gemel_engine
from gemel_engine.cli.main import COMMANDS
from gemel_engine.config.settings import LinkConfig, TrainConfig
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_SCHEMA

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return pages()


def test_it_is_up_to_date(reference: dict[str, str]) -> None:
    for name, text in reference.items():
        assert (ROOT / f"docs/reference/{name}.md").read_text("utf-8") == text, "run `make docs`"


def test_every_setting_has_its_row(reference: dict[str, str]) -> None:
    for config in (LinkConfig, TrainConfig):
        for item in fields(config):
            text = reference["configuration"]
            assert f"| `{item.name}` |" in text or f"### `[{item.name}]`" in text or f"### `[{item.name}." in text
    assert "| `max_rollouts` | integer, ≥ 1 | `64` | Maximum number of rollouts" in reference["configuration"]


def test_no_row_lacks_its_words(reference: dict[str, str]) -> None:
    for name in ("configuration", "columns", "run_directory"):
        assert [row for row in reference[name].splitlines() if row.startswith("| `") and row.endswith("|  |")] == []


def test_commands_columns_and_python_are_there(reference: dict[str, str]) -> None:
    assert [name for name in COMMANDS if f"## gemel {name}\n" not in reference["command_line"]] == []
    columns = (*MENTION_COLUMNS, *PREDICTION_SCHEMA.names)
    assert [name for name in columns if f"| `{name}` |" not in reference["columns"]] == []
    public = [name for name in gemel_engine.__all__ if not name.endswith("Config")]
    assert [name for name in public if f"## {name}\n" not in reference["python"]] == []

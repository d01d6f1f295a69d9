"""The files that describe the project agree with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


@pytest.fixture(scope="module")
def pins() -> list[str]:
    return (ROOT / "requirements-cpu.txt").read_text("utf-8").splitlines()


def test_the_newest_version_of_the_changelog_is_the_project_s(project: dict[str, Any]) -> None:
    newest = re.search(r"^## \[(?P<version>\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest["version"] == project["version"]


def test_the_pins_are_bare_versions(pins: list[str]) -> None:
    """No address, no path and no local version, which only its own index would serve."""
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", pin)] == []


@pytest.mark.parametrize("extra", [None, "cpu", "demo", "dev"])
def test_the_pins_satisfy_the_requirements(project: dict[str, Any], pins: list[str], extra: str | None) -> None:
    versions = dict(pin.split("==") for pin in pins)
    declared = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement

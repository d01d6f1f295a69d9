"""Packages that an installation may lack: the message names the extra that brings them."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from support.paths import ROOT

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError
from gemel_engine.extras import extra, require


@pytest.mark.unit
def test_any_of_several_extras_is_named() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"the package gemel_absent is not installed: install gemel-engine\[cpu\] or gemel-engine\[gpu\]$",
    ):
        require("gemel_absent", "cpu", "gpu")


@pytest.mark.unit
def test_a_package_that_is_there_is_imported() -> None:
    require("pytest", "dev")
    with extra("dev"):
        importlib.import_module("pytest")


@pytest.mark.parametrize(
    ("module", "package", "name"),
    [
        ("report.plots", "matplotlib", "report"),
        ("report.page", "jinja2", "report"),
        ("gemel_release", "h5py", "import"),
        ("training.job", "tensorboardX", "train"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, package: str, name: str
) -> None:
    monkeypatch.delitem(sys.modules, f"gemel_engine.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ConfigurationError, match=rf"the package {package} is not installed: install gemel-engine\[{name}\]$"
    ):
        importlib.import_module(f"gemel_engine.{module}")


def test_a_job_without_its_engine_stops_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from gemel_engine.linking.job import checked_plan

    monkeypatch.setitem(sys.modules, "vllm", None)
    (tmp_path / "link.toml").write_text(
        "input = 'none.parquet'\noutput = 'out'\nknowledge_base = 'kb'\nlanguage_model = { name = 'lm' }\n"
    )
    config = load_config(LinkConfig, tmp_path / "link.toml")
    with pytest.raises(ConfigurationError, match=r"vllm is not installed: install .*\[cpu\] or .*\[gpu\]"):
        checked_plan(config)


@pytest.mark.unit
def test_every_extra_that_is_named_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    named: set[str] = set()
    for path in (ROOT / "gemel_engine").rglob("*.py"):
        for arguments in re.findall(r"\bextra\(([^)]*)\)|\brequire\(\"\w+\", ([^)]*)\)", path.read_text("utf-8")):
            named |= set(re.findall(r'"(\w+)"', "".join(arguments)))
    assert named <= set(declared)
    assert {"cpu", "gpu", "report", "train", "import"} <= named

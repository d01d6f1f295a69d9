"""The files that describe the project agree with each other."""

from __future__ import annotations

import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from configparser import ConfigParser
from importlib import metadata
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT

import gemel_engine
from gemel_engine.cli.main import main


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def pins(engine: str) -> list[str]:
    return (ROOT / f"requirements-{engine}.txt").read_text("utf-8").splitlines()


@pytest.mark.parametrize(
    ("file", "pattern"), [("CHANGELOG.md", r"^## \[(\d[^\]]*)\]"), ("CITATION.cff", r"^version: (.+)$")]
)
def test_the_newest_version_is_the_project_s(project: dict[str, Any], file: str, pattern: str) -> None:
    newest = re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == project["version"]


def test_the_installed_version_is_the_project_s(project: dict[str, Any]) -> None:
    """It is what `gemel --version` prints; `make install` brings it up to date."""
    assert metadata.version(project["name"]) == project["version"]


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_the_pins_are_bare_versions(engine: str) -> None:
    """No address, no path and no local version, which only its own index would serve."""
    assert [pin for pin in pins(engine) if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", pin)] == []


@pytest.mark.parametrize(("engine", "left_out"), [("cpu", {"gpu", "aws"}), ("gpu", {"cpu"})])
def test_the_pins_satisfy_the_requirements(project: dict[str, Any], engine: str, left_out: set[str]) -> None:
    versions = dict(pin.split("==") for pin in pins(engine))
    extras = [items for name, items in project["optional-dependencies"].items() if name not in left_out]
    declared = [*project["dependencies"], *chain.from_iterable(extras)]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


@pytest.mark.gpu
def test_every_module_is_imported_and_vllm_knows_the_device(device: str) -> None:
    for module in pkgutil.walk_packages(gemel_engine.__path__, "gemel_engine."):
        importlib.import_module(module.name)
    platform = importlib.import_module("vllm.platforms").current_platform
    assert platform.device_type == device


def test_the_wheel_holds_the_package_and_its_command(project: dict[str, Any], tmp_path: Path) -> None:
    """Built from the source distribution, as `python -m build` does."""
    checkout = tmp_path / "checkout"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gemel_engine", checkout / "gemel_engine", ignore=without)
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, checkout)
    package = {path.relative_to(checkout).as_posix() for path in checkout.rglob("gemel_engine/**/*") if path.is_file()}
    source = checkout / build("sdist", checkout)
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    assert (unpacked / "requirements-cpu.txt").is_file()
    with ZipFile(unpacked / build("wheel", unpacked)) as wheel:
        information = f"gemel_engine-{project['version']}.dist-info"
        names = set(wheel.namelist())
        entry_points = wheel.read(f"{information}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(information)} == package
    assert {f"{information}/licenses/{name}" for name in project["license-files"]} <= names
    commands = ConfigParser()
    commands.read_string(entry_points)
    assert resolve_name(commands["console_scripts"]["gemel"]) is main


def build(kind: str, directory: Path) -> str:
    """Build a distribution of the project in `directory`, and in it; the name of its file."""
    code = f"from setuptools import build_meta; print('\\n' + build_meta.build_{kind}('.'))"
    built = subprocess.run([sys.executable, "-c", code], cwd=directory, check=True, capture_output=True, text=True)
    return built.stdout.splitlines()[-1]

"""Files and functions that a reader can hold in mind."""

from __future__ import annotations

import ast

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.unit

FILES = sorted((ROOT / "gemel_engine").rglob("*.py"))


def test_no_file_has_more_than_350_lines() -> None:
    assert [path.name for path in FILES if len(path.read_text("utf-8").splitlines()) > 350] == []


def test_no_function_has_more_than_60_lines() -> None:
    functions = (
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert [f"{path.name}: {node.name}" for path, node in functions if (node.end_lineno or 0) - node.lineno >= 60] == []

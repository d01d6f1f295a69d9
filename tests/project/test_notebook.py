"""The notebook runs from top to bottom with the demo's models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from support.paths import ROOT


def committed() -> Any:
    return nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)  # type: ignore[no-untyped-call]


@pytest.mark.unit
def test_it_is_committed_without_outputs() -> None:
    notebook = committed()
    nbformat.validate(notebook)
    assert [cell.outputs for cell in notebook.cells if cell.cell_type == "code" and cell.outputs] == []


@pytest.mark.heavy
@pytest.mark.timeout(3600)
def test_it_links_reports_and_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "build/emoji/demonstrations.stamp").exists():
        pytest.skip("the demo's artifacts are not there: `make test-all` makes them")
    for name in ("examples", "build"):  # what it writes goes elsewhere
        (tmp_path / name).mkdir()
        for path in (ROOT / name).iterdir():
            if path.name != "quickstart":
                (tmp_path / name / path.name).symlink_to(path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = committed()
    NotebookClient(notebook, timeout=1700, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text") or output["data"].get("text/plain", "") for output in shown)
    pages = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert "accuracy 0." in printed or "accuracy 1." in printed
    assert "[Answer]" in printed  # of the prompt that is explained
    assert any("<iframe srcdoc=" in page for page in pages)

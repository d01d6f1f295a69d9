"""Figures of documents come from the files of results, and prose is laid out for readers of source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from documents import documents, outdated
from figures import MARK, Results, without_marks
from support.paths import ROOT

pytestmark = pytest.mark.unit

PROSE = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [path for path in PROSE if not {path.name, path.parent.name} & {"results.md", "CHANGELOG.md", "reference"}]
FIGURE = re.compile(r"(?<![\w.])\d+(?:,\d{3})*\.\d+(?![\w.])|(?<![\w.])\d+(?:\.\d+)?\s?%")
# What is no measurement: versions, sizes of public data, levels that are set, and what they mean.
NO_MEASUREMENT = re.compile(
    r"(?:Python|Python from|PyTorch|vLLM|Ray) \d+\.\d+(?:(?:, | to | or | and )\d+\.\d+)*|5\.9 million|"
    r"95% intervals?|risk of \d%|\b40% of its vendor's|Apache-2\.0|Far below 100%|"
    r"80% confidence are right in 80%|Below 0\.05 is usually|precision of 0\.6"
)


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A document without its blocks of code and the marks of its figures."""
    text = without_marks(path.read_text("utf-8"))
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_documents_are_up_to_date() -> None:
    assert [named(path) for path in outdated(ROOT)] == [], "run `make docs`"


def test_a_changed_result_changes_the_documents(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    shutil.copy(ROOT / "README.md", tmp_path)
    file = tmp_path / "benchmarks/results/score.json"
    content = json.loads(file.read_text("utf-8"))
    content["wikidiverse.score"]["value"] = 0.12345
    file.write_text(json.dumps(content))
    changed = {path.relative_to(tmp_path).as_posix(): text for path, text in outdated(tmp_path).items()}
    assert {"README.md", "docs/results.md", "docs/score.md"} <= changed.keys()
    assert all("0.123" in without_marks(text) for text in changed.values())


def test_a_result_that_is_missing_is_named() -> None:
    results = Results(ROOT / "benchmarks/results")
    with pytest.raises(LookupError, match="no result has 'score/nothing': 'nothing' is missing"):
        results.show("score/nothing", ".3f")
    with pytest.raises(LookupError, match="there is no file of results"):
        results.show("nothing/accuracy", ".3f")


@pytest.mark.parametrize("path", WRITTEN, ids=named)
def test_no_figure_is_typed(path: Path) -> None:
    text = MARK.sub("", path.read_text("utf-8"))
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = NO_MEASUREMENT.sub("", re.sub(r"\s+", " ", text))
    assert FIGURE.findall(text) == []


@pytest.mark.parametrize("path", PROSE, ids=named)
def test_lines_of_prose_are_short(path: Path) -> None:
    lines = re.sub(r"\]\([^)]*\)", "]", prose(path)).splitlines()
    assert [line for line in lines if len(line) > 100 and not re.match(r" *\||- `.*`(?:,| at) commit ", line)] == []


@pytest.mark.parametrize("path", PROSE, ids=named)
def test_no_line_begins_with_a_mark(path: Path) -> None:
    """Markdown would take the whole line for HTML."""
    assert re.findall(r"^\s*<!-- =.*", path.read_text("utf-8"), re.MULTILINE) == []


def test_decisions_are_short_and_numbered() -> None:
    found = sorted((ROOT / "docs/decisions").glob("0*.md"))
    listed = (ROOT / "docs/decisions/index.md").read_text("utf-8")
    assert 10 <= len(found) <= 15
    for number, path in enumerate(found, 1):
        lines = path.read_text("utf-8").splitlines()
        assert len(lines) <= 25, path.name
        assert lines[0].startswith(f"# {number:03} "), path.name
        assert path.name.startswith(f"{number:03}-")
        assert f"- [{lines[0][2:]}]({path.name})\n" in listed


def test_results_of_a_new_file_are_shown(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    record = {"value": {"seconds": 1.5}, "command": "make new", "commit": "0123456789", "conditions": "two cores"}
    (tmp_path / "benchmarks/results/new.json").write_text(json.dumps({"start": record}))
    text = documents(tmp_path)[tmp_path / "docs/results.md"]
    assert "| start, seconds | 1.5 |" in text
    assert "- `make new`, commit 0123456: two cores" in text

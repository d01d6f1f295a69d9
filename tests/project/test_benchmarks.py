"""Benchmarks: what they note, and that every command behind a figure can still be found."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures import Results, origin, scripts
from sizing import on_paper
from support.paths import ROOT

from benchmarks import record
from benchmarks.record import ResultFile, difference

pytestmark = pytest.mark.unit

FILES = sorted((ROOT / "benchmarks/results").glob("*.json"))


def records(found: Any) -> Iterator[dict[str, Any]]:
    """Each record of a file of results."""
    assert isinstance(found, dict), f"no record: {found!r}"
    if "value" in found:
        yield found
    else:
        for item in found.values():
            yield from records(item)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_figure_has_a_command_that_is_there_or_its_commit(path: Path) -> None:
    for found in records(json.loads(path.read_text("utf-8"))):
        assert {"command", "commit", "conditions"} <= found.keys()
        assert re.fullmatch(r"[0-9a-f]{7,40}(, [0-9a-f]{7,40})*", found["commit"])
        assert scripts(found["command"]), found["command"]
        is_there = all(is_there for _, is_there in scripts(found["command"]))
        assert (" at commit " in origin(found)) != is_there


def test_a_command_whose_script_is_gone_is_shown_at_its_commit() -> None:
    made_by = {"commit": f"{'1' * 40}, {'2' * 40}"}
    gone = made_by | {"command": "python benchmarks/gone.py DATA && python jobs/train.py a.toml"}
    assert origin(gone) == f"`{gone['command']}` at commit 1111111, 2222222"
    module = made_by | {"command": "X=1 python -m benchmarks.accuracy score DATA --risk 0.03"}
    assert origin(module) == f"`{module['command']}`, commit 1111111, 2222222"
    assert scripts(module["command"]) == [("python -m benchmarks.accuracy score", True)]
    assert scripts("python -m benchmarks.gone DATA") == [("python -m benchmarks.gone", False)]


def test_prose_names_the_script_of_a_figure(tmp_path: Path) -> None:
    of_training = {"value": {"rate": 1.5}, "command": "python -m benchmarks.training --cases a", "commit": "0" * 40}
    of_plan = {"value": 2, "command": "python benchmarks/plan.py DATA", "commit": "abcdef0123"}
    (tmp_path / "new.json").write_text(json.dumps({"training": of_training, "plan": of_plan}))
    results = Results(tmp_path)
    assert results.show("new/training/rate", "script") == "`python -m benchmarks.training`"
    assert results.show("new/plan", "script") == "`python benchmarks/plan.py` at commit abcdef0"


def test_a_result_is_noted_with_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "commit", lambda: "0" * 40)
    monkeypatch.setattr(
        sys, "orig_argv", ["/usr/bin/python3", "-u", "-m", "benchmarks.x", "one", "/home/me/data/", "--a", "b c"]
    )
    monkeypatch.setenv("SHAPE", "tiny")
    results = ResultFile("x", {"DATA": Path("/home/me/data")}, ["SHAPE", "UNSET"])
    results.note({"a": 1, "b": 2}, "ten mentions")
    results.note({"b": 3}, "twelve mentions")
    found = results.read()
    assert (found["a"]["value"], found["b"]["value"]) == (1, 3)
    assert found["a"]["command"] == "SHAPE=tiny python -m benchmarks.x one DATA --a 'b c'"
    assert found["b"]["conditions"].startswith("twelve mentions, ")


def test_a_difference_has_its_paired_interval() -> None:
    assert difference("1100", "1100") == "+0.000 [+0.000, +0.000]"
    assert difference("1" * 100, "0" * 100) == "+1.000 [+1.000, +1.000]"


def test_sizes_on_paper_follow_from_what_is_measured() -> None:
    results = Results(ROOT / "benchmarks/results", {"on_paper": on_paper})
    milliseconds, _ = results.look_up("hostcost/picture_840x4096_ms")
    found, _ = results.look_up("on_paper/costs/8B, H100")
    assert found["searches_per_second_host"] == pytest.approx(1000 / (4 * milliseconds))
    assert found["mentions_per_second_distinct"] < found["mentions_per_second_distinct_cascade"]


def test_the_readme_lists_every_command_and_every_file_that_one_writes() -> None:
    readme = (ROOT / "benchmarks/README.md").read_text("utf-8")
    sources = {path: path.read_text("utf-8") for path in (ROOT / "benchmarks").rglob("*.py")}
    for path, text in sources.items():
        for command in re.findall(r"^ *(?:\w+=\w+ )*(python -m [\w.]+(?: [a-z]+)?)", text, re.MULTILINE):
            assert f"| `{command}" in readme, path
        for name in re.findall(r'ResultFile\(\s*"(\w+)"', text):
            assert f"`{name}`" in readme, path

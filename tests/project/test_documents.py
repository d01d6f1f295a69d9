"""What the documents say can be done: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.corpus import picture, toml
from support.paths import ROOT

from gemel_engine import errors
from gemel_engine.cli.main import COMMANDS
from gemel_engine.config.finding import FindConfig
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.knowledge_base.build import read_entities
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.types import Prediction

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = re.compile(r"--([a-z][a-z_.-]+)")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8"))
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_commands_exist_and_know_their_options(path: Path) -> None:
    for block in blocks(path.read_text("utf-8"), "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("#")[0]
            for script in re.findall(r"\b((?:jobs|benchmarks|examples)/\w+\.py)", command):
                assert (ROOT / script).is_file(), line
            for target in re.findall(r"\bmake ([a-z-]+)", command):
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), line
            for subcommand, converted in re.findall(
                r"\bgemel ([a-z][a-z-]+)(?: (mapper|mentions|wikidata|dbpedia|table)\b)?", command
            ):
                assert subcommand in COMMANDS, line
                known = OPTION.findall(help_of("-m", "gemel_engine.cli.main", subcommand, *filter(None, [converted])))
                assert set(OPTION.findall(command.partition(f"gemel {subcommand}")[2])) <= set(known), line
            if scripts := re.findall(r"\bpython (jobs/\w+\.py)", command):
                known = OPTION.findall(help_of(scripts[0]))
                assert set(OPTION.findall(command.partition(scripts[0])[2])) <= set(known), line


_help: dict[tuple[str, ...], str] = {}


def help_of(*command: str) -> str:
    if command not in _help:
        finished = subprocess.run(
            [sys.executable, *command, "--help-all" if "link" in command[-1] else "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        _help[command] = finished.stdout
    return _help[command]


def test_the_tables_made_in_the_documents_are_accepted(tmp_path: Path) -> None:
    for name in ("corpus.md", "knowledge_base.md"):
        for block in blocks((ROOT / "docs" / name).read_text("utf-8"), "python"):
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    assert len(plan_shards(str(tmp_path / "mentions.parquet"), 10)) == 1
    assert read_entities(str(tmp_path / "entities.parquet")).num_rows == 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_configurations_are_accepted(path: Path, tmp_path: Path) -> None:
    for block in blocks(path.read_text("utf-8"), "toml"):
        (tmp_path / "link.toml").write_text(block)
        load_config(LinkConfig if "language_model" in block else FindConfig, tmp_path / "link.toml")


def test_the_python_of_the_readme_links_a_mention(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the artifacts of tiny models for those that `link.toml` names there."""
    monkeypatch.chdir(tmp_path)
    Path("link.toml").write_text(toml(artifacts, "none.parquet", "none"))
    snippets = blocks((ROOT / "README.md").read_text("utf-8"), "python")
    assert snippets
    for block in snippets:
        for name in re.findall(r'"([\w-]+\.png)"', block):
            Path(name).write_bytes(picture("brown"))
        *statements, last = ast.parse(block).body
        assert isinstance(last, ast.Expr)
        names: dict[str, object] = {}
        exec(compile(ast.Module(statements, []), "README.md", "exec"), names)
        prediction = eval(compile(ast.Expression(last.value), "README.md", "eval"), names)
        assert isinstance(prediction, Prediction)
        assert (prediction.error, prediction.entity_id is None) == (None, False)


def test_every_error_has_its_remedy() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    kinds = [item for item in vars(errors).values() if isinstance(item, type) and item is not errors.GemelError]
    assert [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in text] == []
    row_kinds = [kind.kind for kind in kinds if issubclass(kind, errors.MentionError)]
    assert [kind for kind in row_kinds if f"| `{kind}` |" not in text] == []

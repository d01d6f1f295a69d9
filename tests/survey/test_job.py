"""`gemel doctor` names what a machine and a configuration lack."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import toml, write_mentions
from support.s3_server import S3Server

from gemel_engine import storage
from gemel_engine.cli.main import main
from gemel_engine.decoding.confidence import MANIFEST as CALIBRATION_MANIFEST
from gemel_engine.knowledge_base.store import MANIFEST as KNOWLEDGE_BASE_MANIFEST
from gemel_engine.retrieval.index import MANIFEST as INDEX_MANIFEST
from gemel_engine.survey.job import MANIFESTS
from gemel_engine.vision.mapper import MANIFEST as MAPPER_MANIFEST


def doctor(monkeypatch: pytest.MonkeyPatch, *arguments: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["gemel", "doctor", *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def lines(printed: str, status: str) -> dict[str, str]:
    """What was found by each check of a status, by its name."""
    found = [line for line in printed.splitlines() if line.startswith(f"{status} ")]
    return {line[9:26].strip(): line[26:] for line in found}


def test_the_manifests_are_those_of_the_artifacts() -> None:
    of_artifacts = [KNOWLEDGE_BASE_MANIFEST, INDEX_MANIFEST, MAPPER_MANIFEST, CALIBRATION_MANIFEST]
    assert [*MANIFESTS.values()] == [*of_artifacts, "_report.json"]


def test_the_machine_alone_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor(monkeypatch) == 0
    fine = lines(capsys.readouterr().out, "ok")
    assert {"Python", "packages", "processor", "Ray", "GPUs"} <= fine.keys()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        assert doctor(monkeypatch) == 0
    assert doctor(monkeypatch) == 1
    wrong = lines(capsys.readouterr().out, "problem")
    assert "nothing answers at RAY_ADDRESS '127.0.0.1:" in wrong["Ray"]


def test_a_configuration_whose_parts_are_there_is_fine(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, path = write_mentions(tmp_path / "mentions.parquet"), tmp_path / "link.toml"
    path.write_text(toml(artifacts, corpus, tmp_path / "new" / "linked"))
    assert doctor(monkeypatch, path) == 0
    printed = capsys.readouterr().out
    names = {"input", "knowledge base", "demonstrations", "feature mapper", "language model", "image encoder", "output"}
    assert names <= lines(printed, "ok").keys()
    assert printed.splitlines()[-1].startswith("0 problems")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.toml", "mentions.parquet"]


def test_each_fault_is_a_line_with_its_remedy(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    documents, path = tmp_path / "documents.parquet", tmp_path / "link.toml"
    pq.write_table(pa.table({"document_id": ["a"], "text": ["b"]}), documents)
    empty = tmp_path / "empty"
    empty.mkdir()
    changes = {"knowledge_base": tmp_path / "nowhere", "language_model": empty, "mention_encoder": "no/model"}
    named = "".join(f'{name} = "{tmp_path / name}"\n' for name in ("calibration", "previous"))
    path.write_text(named + toml({**artifacts, **changes}, documents, documents))
    assert doctor(monkeypatch, path) == 1
    printed = capsys.readouterr().out
    problems = lines(printed, "problem")
    assert problems.keys() == {
        *("input", "knowledge base", "calibration", "previous", "language model", "mention encoder", "output")
    }
    assert "make it by `gemel calibrate`" in printed
    assert "previous/_report.json" in problems["previous"]
    assert "set find_mentions = true" in printed
    assert "has no configuration or no weights" in problems["language model"]
    assert "HF_HUB_OFFLINE is set" in problems["mention encoder"]
    path.write_text("input = 1")
    assert doctor(monkeypatch, path) == 1
    assert "configuration" in lines(capsys.readouterr().out, "problem")


def test_the_first_picture_is_read(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, path = tmp_path / "mentions.csv", tmp_path / "link.toml"
    corpus.write_text("mention_id,text,mention,image_uri\na,A bear.,bear,bear.png\n")
    path.write_text(f'{toml(artifacts, corpus, tmp_path / "out")}\n[image_source]\nallowed_prefixes = ["{tmp_path}"]\n')
    assert doctor(monkeypatch, path) == 1
    assert "bear.png': no such file" in lines(capsys.readouterr().out, "problem")["pictures"]
    (tmp_path / "bear.png").write_bytes(b"abc")
    assert doctor(monkeypatch, path) == 0
    assert "has 3 bytes" in lines(capsys.readouterr().out, "ok")["pictures"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written_to_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    path = tmp_path / "find.toml"
    path.write_text(f'input = "x"\noutput = "{tmp_path / "out"}"\nknowledge_base = "kb"')
    assert doctor(monkeypatch, path) == 1
    assert "output" in lines(capsys.readouterr().out, "problem")


def test_rights_in_s3_are_tried_and_nothing_is_left(
    s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "find.toml"
    path.write_text(f'input = "x"\noutput = "{s3_server.uri}/doctor"\nknowledge_base = "kb"')
    doctor(monkeypatch, path)
    assert "output" in lines(capsys.readouterr().out, "ok")
    assert storage.list_files(f"{s3_server.uri}/doctor") == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    doctor(monkeypatch, path)
    assert "output" in lines(capsys.readouterr().out, "problem")

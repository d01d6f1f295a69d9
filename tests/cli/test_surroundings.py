"""What surrounds a job: locales, terminals, where Ray is, uv."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ray
from support.paths import ROOT

from gemel_engine.errors import ConfigurationError
from gemel_engine.pipeline import ray_data
from gemel_engine.pipeline.ray_data import connect

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PRINT_FILE = "import sys; from gemel_engine.cli import options; options.use_utf8(); print(open(sys.argv[1]).read())"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=known | environment, capture_output=True, check=False
    )


@pytest.mark.parametrize(
    ("environment", "printed"),
    [
        ({"LC_ALL": "C.UTF-8"}, "ü中".encode()),
        ({"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "latin-1"}, b"\xfc\\u4e2d"),
        (C_LOCALE, rb"\xfc\u4e2d"),
    ],
    ids=["utf-8", "latin-1 terminal", "C locale"],
)
def test_text_is_utf8_and_what_a_terminal_lacks_is_escaped(
    environment: dict[str, str], printed: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "text"
    file.write_text("ü中", encoding="utf-8")
    done = python("-c", PRINT_FILE, str(file), **environment)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, printed, b"")


def test_an_error_is_said_in_any_locale() -> None:
    done = python("jobs/link_corpus.py", "nöwhere.toml", **C_LOCALE)
    assert done.returncode == ConfigurationError.exit_code
    assert b"error: the configuration n\\xf6where.toml can't be read" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_once_how_to_go_on(number: signal.Signals, code: int) -> None:
    work = """
import sys, time
from gemel_engine.cli import main, options
def work():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
options.run(work, "gemel link 'a b.toml'")
"""
    running = subprocess.Popen(
        [sys.executable, "-c", work], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "at work\n"
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out, err) == (code, "cleaned up\n", "stopped; to go on: gemel link 'a b.toml'\n")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "Connection refused"),
        ("ray://127.0.0.1:9", "Connection refused"),
        ("http://127.0.0.1:8265", "not of the form host:port"),
        ("somewhere", "not of the form host:port"),
        ("127.0.0.1:many", "Port could not be cast"),
    ],
)
def test_a_cluster_that_is_not_there_is_said_at_once(
    address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not ray.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigurationError, match=rf"RAY_ADDRESS is .* can be joined \(.*{reason}.*unset RAY_ADDRESS"):
        connect()


def test_a_temporary_directory_with_a_long_path_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ray.is_initialized()
    monkeypatch.setenv("RAY_ADDRESS", "")  # which is none
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 20)))
    with pytest.raises(ConfigurationError, match="set TMPDIR, or RAY_TMPDIR, to a directory with a shorter path"):
        connect()
    assert "RAY_ADDRESS" not in os.environ


def test_a_pool_may_grow_with_the_cluster_and_is_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose head has no CPUs, and whose workers come when there is work."""
    dataset, start = MagicMock(), MagicMock()
    dataset.map_batches.return_value.iter_batches.return_value = []
    monkeypatch.setattr(ray_data, "_start_ray", start)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1.0})
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: dataset)
    for name in ("RAY_ADDRESS", "GEMEL_VERBOSE", "RAY_LOGGING_CONFIG_ENCODING"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        ray_data.run_each([{"shard": number} for number in range(3)], object, (), num_cpus=2, num_gpus=0)
        monkeypatch.setenv("GEMEL_VERBOSE", "1")
    pools = [call.kwargs["compute"] for call in dataset.map_batches.call_args_list]
    assert [(pool.min_size, pool.max_size) for pool in pools] == [(1, 3)] * 2
    assert [call.args[0]["log_to_driver"] for call in start.call_args_list] == [False, True]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_the_output_may_end(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "gemel_engine.cli.main", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_workers_behind_uv_run_work_where_the_driver_does() -> None:
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv is not in this environment")
    code = "import gemel_engine; from ray._private.worker import _maybe_modify_runtime_env as f; print(f({}, False))"
    command = [
        str(uv),
        "run",
        "--no-project",
        "--no-config",
        "--offline",
        "--python",
        sys.executable,
        "python",
        "-c",
        code,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}"

"""The job on a cluster that was started with `ray start --head`, submitted as the README says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pyarrow.parquet as pq
import pytest
from support.chaos import NO_DAMAGE, ROWS_PER_SHARD, Corpus, Damage, link
from support.corpus import mention_rows, toml, write_mentions
from support.paths import ROOT

from gemel_engine import storage
from gemel_engine.pipeline.output import finished_shards

pytestmark = pytest.mark.heavy
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def dashboard() -> Iterator[str]:
    """Address of the dashboard of a cluster of this machine alone; only its own processes are stopped afterwards."""
    ports = dict(zip(("port", "dashboard-port", "dashboard-agent-listen-port"), free_ports(3), strict=True))
    flags = [f"--{name}={port}" for name, port in ports.items()]
    command = [RAY, "start", "--head", "--block", "--num-cpus=4", *flags]
    # A job's `python` is the one that the cluster's environment finds first.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"RAY_AUTH_MODE": "token", "PATH": path}
    cluster = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_for(address)
        yield address
    finally:  # asked to stop, it would take half a minute
        for process in [*psutil.Process(cluster.pid).children(recursive=True), cluster]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.wait()


def wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            with urlopen(f"{address}/api/gcs_healthz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def submit(
    dashboard: str,
    config: Path,
    *options: str,
    flags: tuple[str, ...] = (),
    command: tuple[str, ...] = ("python", "jobs/link_corpus.py"),
) -> subprocess.CompletedProcess[str]:
    """Submit the linking job; `options` are its own, `flags` those of the submission."""
    return ray_job("submit", dashboard, "--working-dir=.", *flags, "--", *command, str(config), *options)


def ray_job(command: str, dashboard: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", command, f"--address={dashboard}", *arguments],
        cwd=ROOT,
        env=os.environ | {"RAY_AUTH_MODE": "token"},
        check=False,
        capture_output=True,
        text=True,
        timeout=540,
    )


@pytest.mark.parametrize("command", [("python", "jobs/link_corpus.py"), ("gemel", "link")], ids=["script", "gemel"])
def test_ray_job_submit(command: tuple[str, ...], artifacts: dict[str, Path], dashboard: str, tmp_path: Path) -> None:
    config = tmp_path / "link.toml"
    config.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    submitted = submit(dashboard, config, command=command)
    assert submitted.returncode == 0, submitted.stdout[-5000:]
    linked = pq.read_table(tmp_path / "output" / "data")
    assert linked["mention_id"].to_pylist() == [row["mention_id"] for row in mention_rows()]
    assert linked["error"].null_count == 9


def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    artifacts: dict[str, Path], dashboard: str, tmp_path: Path
) -> None:
    corpus = Corpus.write(str(tmp_path / "corpus"), artifacts, 640)
    undisturbed = link(corpus, tmp_path / "undisturbed")
    output = str(tmp_path / "output")
    config = tmp_path / "link.toml"
    options = corpus.command(config, output)[3:]
    assert submit(dashboard, config, *options, flags=("--no-wait", "--submission-id=first")).returncode == 0
    while not finished_shards(output):
        assert "FAILED" not in ray_job("status", dashboard, "first").stdout
        time.sleep(1)
    stopped = ray_job("stop", dashboard, "first")
    assert stopped.returncode == 0, stopped.stdout
    num_finished = len(finished_shards(output))
    assert num_finished < 640 // ROWS_PER_SHARD
    again = submit(dashboard, config, *options)
    assert again.returncode == 0, again.stdout[-5000:]
    report = json.loads(storage.read_bytes(f"{output}/_report.json"))
    assert report["shards_skipped"] >= num_finished
    assert Damage.of(output, undisturbed) == NO_DAMAGE

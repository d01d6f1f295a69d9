"""The linking job on several nodes, which on this machine are raylets with directories of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from support.chaos import NO_DAMAGE, Corpus, Damage, link, processes
from support.faulty_s3 import FaultyProxy, faulty_proxy
from support.paths import ROOT
from support.s3_server import S3Server

from gemel_engine.pipeline.output import is_claimed

pytestmark = pytest.mark.heavy

ARTIFACTS = {"knowledge_base", "demonstrations", "feature_mapper"}
MANIFESTS = ("knowledge_base.json", "index.json", "mapper.json")
# Of a node's two CPUs; the other stages find room beside it, a second generation actor does not.
ONE_A_NODE = "--resources.generation.num-cpus=1.25"


@dataclass(slots=True)
class Nodes:
    """A cluster whose nodes reach S3 through a proxy, without faults, and keep their temporary files apart."""

    cluster: Cluster
    proxy: FaultyProxy
    directory: Path

    def temporary(self, name: str) -> Path:
        """A node's directory for temporary files."""
        return self.directory / name

    def add(self, name: str, **arguments: Any) -> Any:
        """Let a node join."""
        self.temporary(name).mkdir()
        environment = {"TMPDIR": str(self.temporary(name)), "AWS_ENDPOINT_URL": self.proxy.endpoint}
        return self.cluster.add_node(env_vars=environment, **arguments)

    def kept(self, name: str) -> set[str]:
        """Names of the artifacts that a node has kept, without the mark of their version; not of their locks."""
        return {path.name.rpartition("-")[0] for path in self.temporary(name).glob("gemel-artifacts-*/[!.]*")}

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a driver on the head."""
        settings = {
            "RAY_ADDRESS": self.cluster.address,
            "TMPDIR": str(self.temporary("head")),
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
        }
        with log.open("wb") as stream:
            return subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=stream, stderr=stream)


@pytest.fixture
def nodes(s3_server: S3Server, tmp_path: Path) -> Iterator[Nodes]:
    """A head without CPUs, where the driver runs, and two nodes."""
    with faulty_proxy(s3_server.endpoint) as proxy:
        nodes = Nodes(Cluster(), proxy, tmp_path)
        try:
            nodes.add("head", num_cpus=0, include_dashboard=False)
            nodes.add("first", num_cpus=2)
            nodes.add("second", num_cpus=2)
            yield nodes
        finally:
            nodes.cluster.shutdown()  # type: ignore[no-untyped-call]


def test_artifacts_are_read_once_a_node_and_mapped(
    nodes: Nodes, artifacts: dict[str, Path], s3_server: S3Server, tmp_path: Path
) -> None:
    corpus = Corpus.write(f"{s3_server.uri}/nodes", artifacts, 160)
    undisturbed = link(corpus, tmp_path / "undisturbed")
    output, log = str(tmp_path / "output"), tmp_path / "log.txt"
    pool = ["--resources.generation.min-actors=2", "--resources.generation.max-actors=2", ONE_A_NODE]
    driver = nodes.start(corpus.command(tmp_path / "link.toml", output, *pool), log)
    mapped: set[str] = set()
    while driver.poll() is None:
        for process in processes("generation"):
            with suppress(psutil.NoSuchProcess):
                mapped |= {item.path for item in process.memory_maps()}
        time.sleep(0.5)
    assert driver.returncode == 0, log.read_text()[-4000:]
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    for name in ("first", "second"):
        assert nodes.kept(name) == ARTIFACTS
        assert any(path.startswith(str(nodes.temporary(name))) and "/trie/" in path for path in mapped)
    reads = Counter(path for method, path in nodes.proxy.requests if method == "GET")
    for name in ARTIFACTS:
        counts = {path: count for path, count in reads.items() if f"/nodes/{name}/" in path}
        # Twice for the two nodes, once for the driver; who also reads each manifest to say what the run is made of.
        assert counts == {path: 4 if path.endswith(MANIFESTS) else 3 for path in counts}
        assert counts


def test_pools_grow_and_shrink_with_the_cluster(
    nodes: Nodes, artifacts: dict[str, Path], s3_server: S3Server, tmp_path: Path
) -> None:
    """One node joins, and one that is at work goes."""
    corpus = Corpus.write(f"{s3_server.uri}/elastic", artifacts, 560)
    undisturbed = link(corpus, tmp_path / "undisturbed")
    output, log = str(tmp_path / "output"), tmp_path / "log.txt"
    options = ["--resources.generation.max-actors=3", ONE_A_NODE]
    driver = nodes.start(corpus.command(tmp_path / "link.toml", output, *options), log)

    def wait_until(is_so: Callable[[], bool]) -> None:
        while not is_so():
            assert driver.poll() is None, f"the run has ended: {log.read_text()[-4000:]}"
            time.sleep(0.1)

    wait_until(lambda: is_claimed(output))
    (gone, *_) = nodes.cluster.worker_nodes
    nodes.add("third", num_cpus=2)
    wait_until(lambda: "knowledge_base" in nodes.kept("third"))  # a generation actor has started there
    nodes.cluster.remove_node(gone, allow_graceful=False)
    assert driver.wait(540) == 0, log.read_text()[-4000:]
    assert Damage.of(output, undisturbed) == NO_DAMAGE

"""Linking runs whose processes are killed at random, and what must be true of their output all the same.

The job is the user's own command, started again whenever its driver was killed: see `tests/linking/test_chaos.py`.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow as pa
from ray.cluster_utils import Cluster

from gemel_engine import storage
from gemel_engine.pipeline.output import finished_shards
from gemel_engine.storage.parquet import parquet_bytes
from support.corpus import picture, predictions, toml
from support.names import ENTITY_NAMES
from support.paths import ROOT

logger = logging.getLogger(__name__)

Target = Literal[
    "image encoder", "retrieval", "generation", "engine worker", "task", "node", "driver", "driver, asked to stop"
]

ROWS_PER_SHARD = 16
# How the command line of a process begins that does a kind of work.
_TITLES = {
    "image encoder": r"ray::MapWorker\(.*EncodeImages",
    "retrieval": r"ray::MapWorker\(.*Retrieve",
    "generation": r"ray::MapWorker\(.*GenerateEntityNames",
    "engine worker": "VLLM::Worker",
    "task": r"ray::(MapBatches|commit_shard|IDLE)",  # an idle one has done a task, or is about to
}
_EARLY = ("image encoder", "retrieval")  # a small corpus has gone through them when the first shard is finished
_COLOURS = ("red", "green", "blue")
_COUNTERS = {"num_rollouts"}
_TOLERANCE = 1e-3
_LONGEST_SECONDS = 560
_ENDS_OF_DRIVERS = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM}


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run reads, under one address, local or `s3://`; models stay local."""

    root: str
    artifacts: Mapping[str, object]

    @classmethod
    def write(cls, root: str, artifacts: Mapping[str, Path], num_rows: int) -> Corpus:
        """Write mentions, three in four with a picture, and copy the artifacts to their side."""
        for colour in _COLOURS:
            storage.write_bytes(f"{root}/pictures/{colour}.png", picture(colour))
        rows = [
            {
                "mention_id": f"m{number:05}",
                "text": f"Look at the {name} over there, as in photo {number}.",
                "mention": name,
                "mention_start": 12,
                "image_uri": f"{root}/pictures/{_COLOURS[number % 4]}.png" if number % 4 < 3 else None,
            }
            for number in range(num_rows)
            for name in [ENTITY_NAMES[number % len(ENTITY_NAMES)]]
        ]
        storage.write_bytes(f"{root}/mentions.parquet", parquet_bytes(pa.Table.from_pylist(rows)))
        copies = {}
        for name in ("knowledge_base", "demonstrations", "feature_mapper"):
            copies[name] = f"{root}/{name}"
            for file in filter(Path.is_file, artifacts[name].rglob("*")):
                storage.write_bytes(f"{copies[name]}/{file.relative_to(artifacts[name])}", file.read_bytes())
        return cls(root, {**artifacts, **copies})

    def command(self, config: Path, output: str, *options: str, engine: str = "transformers") -> list[str]:
        """The command that links it; writes the configuration."""
        config.write_text(toml(self.artifacts, f"{self.root}/mentions.parquet", output, engine))
        options = (f"--rows-per-shard={ROWS_PER_SHARD}", "--image-source.allowed-prefixes", self.root, *options)
        return [sys.executable, "jobs/link_corpus.py", str(config), *options]


@dataclass(frozen=True, slots=True)
class Blow:
    """Something that is to be killed.

    Attributes:
        target: What it is.
        delay: Seconds to wait with it.
        at_work: Count them from the next shard that is finished; else from now, so that the target may be starting. A
            target that is not there by the time that a shard is finished gives way to the next.
        when: Count them from the moment when this is true instead.
    """

    target: Target
    delay: float
    at_work: bool
    when: Callable[[], bool] | None = None

    @classmethod
    def draw(cls, targets: Sequence[Target], seed: int) -> list[Blow]:
        """Random blows against these targets, in random order, but first those whose work is done first."""
        draws = random.Random(seed)
        order = sorted(draws.sample(targets, len(targets)), key=lambda target: target not in _EARLY)
        return [
            cls(target, draws.uniform(0, 1.5), at_work=target not in _EARLY and draws.random() < 0.75)
            for target in order
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """In what an output differs from the undisturbed one; no field may be above 0.

    Attributes:
        rows_lost: Rows that are missing.
        rows_twice: Rows that stand more than once.
        rows_different: Rows that stand elsewhere or say something else, `num_rollouts` apart; floats may differ by
            1e-3.
        innocent_poison: Rows marked as poison, of which there is none.
    """

    rows_lost: int
    rows_twice: int
    rows_different: int
    innocent_poison: int

    @classmethod
    def of(cls, output: str, undisturbed: str) -> Damage:
        """Compare two outputs."""
        rows = predictions(output)
        found, expected = (
            {row["mention_id"]: row | {"place": place} for place, row in enumerate(table)}
            for table in (rows, predictions(undisturbed))
        )
        counts = Counter(row["mention_id"] for row in rows)
        return cls(
            rows_lost=len(expected.keys() - found.keys()),
            rows_twice=sum(count > 1 for count in counts.values()),
            rows_different=sum(not _agree(expected.get(mention_id), row) for mention_id, row in found.items()),
            innocent_poison=sum((row["error"] or "").startswith("poison") for row in found.values()),
        )


NO_DAMAGE = Damage(rows_lost=0, rows_twice=0, rows_different=0, innocent_poison=0)


@dataclass(slots=True)
class Chaos:
    """A run's blows, and what came of them.

    Attributes:
        command: Links the corpus.
        output: Where to.
        log: File for what all drivers print.
        environment: Of the drivers, beside this process's.
        cluster: Whose nodes may be killed; None where each driver starts Ray itself.
        kills: Targets that were killed, so far.
        num_drivers: How often the command was started.
    """

    command: Sequence[str]
    output: str
    log: Path
    environment: Mapping[str, str]
    cluster: Cluster | None
    kills: list[str]
    num_drivers: int = 0

    def run(self, blows: Sequence[Blow]) -> None:
        """Run the command to its end, again and again while its driver is killed.

        Raises:
            AssertionError: It failed although nobody killed it, or did not come to an end.
        """
        left, deadline = list(blows), time.monotonic() + _LONGEST_SECONDS
        driver, due, num_shards = self._start(), None, self._num_shards()
        try:
            while (code := driver.poll()) != 0:
                assert time.monotonic() < deadline, f"no end after {self.kills}: {self._log_tail()}"
                if code is not None:
                    was_killed = any(target.startswith("driver") for target in self.kills[-1:])
                    assert was_killed, f"exit code {code} after {self.kills}: {self._log_tail()}"
                    assert code in _ENDS_OF_DRIVERS, f"exit code {code}: {self._log_tail()}"
                    driver = self._start()
                elif left and due is None:
                    when = left[0].when
                    if when() if when is not None else not left[0].at_work or self._num_shards() > num_shards:
                        due = time.monotonic() + left[0].delay
                elif left and due is not None and time.monotonic() >= due:
                    if self._strike(left[0].target, driver):
                        self.kills.append(left.pop(0).target)
                        logger.info("killed: %s", self.kills[-1])
                        due, num_shards = None, self._num_shards()
                    elif self._num_shards() > num_shards:
                        left.append(left.pop(0))  # its work may be done until a driver begins anew
                time.sleep(0.02 if left and left[0].when is not None else 0.1)
        finally:
            driver.kill()
            driver.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_drivers += 1
        with self.log.open("ab") as log:
            environment = os.environ | self.environment
            return subprocess.Popen(self.command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def _strike(self, target: Target, driver: subprocess.Popen[bytes]) -> bool:
        """Kill one, if it is there."""
        if target == "node":
            assert self.cluster is not None, "only a cluster has nodes"
            node = min(self.cluster.worker_nodes, key=lambda node: str(node.unique_id))
            self.cluster.remove_node(node, allow_graceful=False)
            add_node(self.cluster)
        elif target.startswith("driver"):
            driver.send_signal(signal.SIGKILL if target == "driver" else signal.SIGTERM)
            driver.wait(60)
        else:
            found = processes(target)
            if not found:
                return False
            with suppress(psutil.NoSuchProcess):
                found[0].kill()
        return True

    def _num_shards(self) -> int:
        return len(finished_shards(self.output))

    def _log_tail(self) -> str:
        return self.log.read_text("utf-8", "replace")[-4000:]


def processes(target: str) -> list[psutil.Process]:
    """The processes below this one that do a kind of work."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if re.match(_TITLES[target], " ".join(process.cmdline())):
                found.append(process)
    return found


def is_sorting(output: str) -> bool:
    """Whether a part of the ordered corpus is written, and its plan is not."""
    return storage.exists(f"{output}/_ordered") and not storage.exists(f"{output}/_plan.json")


def is_merging(temporary: Path) -> bool:
    """Whether a knowledge base is being merged with its update by a process with this directory for temporary files."""
    return any(path.is_dir() for path in temporary.glob("*/.*-merged-*"))


@contextmanager
def nodes(num_nodes: int, environment: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """A Ray cluster on this machine: a head without CPUs, for the driver, and so many nodes beside it."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(num_nodes):
            add_node(cluster, environment)
        yield cluster
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def add_node(cluster: Cluster, environment: Mapping[str, str] | None = None) -> None:
    """Let a node of four logical CPUs join, whose processes have these variables beside this one's."""
    cluster.add_node(num_cpus=4, env_vars=dict(environment or {}))


def link(corpus: Corpus, directory: Path, **settings: str) -> str:
    """Link a corpus undisturbed; returns the output, which lies in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    output = f"{directory}/output"
    command = corpus.command(directory / "link.toml", output, **settings)
    Chaos(command, output, directory / "log.txt", {}, None, []).run([])
    return output


def _agree(expected: Any, found: Any) -> bool:
    """Whether two values say the same, counters apart."""
    if isinstance(expected, float) and isinstance(found, float):
        return math.isclose(expected, found, rel_tol=0, abs_tol=_TOLERANCE)
    if isinstance(expected, dict) and isinstance(found, dict):
        names = expected.keys() - _COUNTERS
        return names == found.keys() - _COUNTERS and all(_agree(expected[name], found[name]) for name in names)
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_agree, expected, found))
    return bool(expected == found)

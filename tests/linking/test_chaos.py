"""Linking runs in trouble: killed processes, two drivers at once, an S3 server with faults, a full disk."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from support.chaos import (
    NO_DAMAGE,
    ROWS_PER_SHARD,
    Blow,
    Chaos,
    Corpus,
    Damage,
    Target,
    is_merging,
    is_sorting,
    link,
    nodes,
    processes,
)
from support.faulty_s3 import FAULTS, faulty_proxy
from support.names import ENTITY_NAMES
from support.paths import ROOT
from support.s3_server import S3Server
from support.trouble import small_file_system

from gemel_engine import storage
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.update import update_knowledge_base
from gemel_engine.pipeline.output import finished_shards, is_claimed
from gemel_engine.tokenizer import load_tokenizer

pytestmark = pytest.mark.heavy

NUM_ROWS = 192


@pytest.fixture(scope="module")
def corpus(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus.write(str(tmp_path_factory.mktemp("corpus")), artifacts, NUM_ROWS)


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output that all others are compared with."""
    return link(corpus, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def s3_corpus(artifacts: dict[str, Path], s3_server: S3Server) -> Corpus:
    return Corpus.write(f"{s3_server.uri}/chaos", artifacts, NUM_ROWS)


def left_over(output: str) -> set[str]:
    """Names in an output that only a run at work has."""
    return {file.partition("/")[0] for file in storage.list_files(output)} & {"_parts", "_marks"}


@pytest.mark.chaos
def test_a_run_whose_processes_are_killed_gives_the_same_output(
    s3_corpus: Corpus, undisturbed: str, s3_server: S3Server, tmp_path: Path
) -> None:
    output = f"{s3_server.uri}/killed"
    targets: list[Target] = ["image encoder", "retrieval", "generation", "task", "node", "driver"]
    command = s3_corpus.command(tmp_path / "link.toml", output)
    with nodes(2) as cluster:
        chaos = Chaos(command, output, tmp_path / "log.txt", {"RAY_ADDRESS": cluster.address}, cluster, [])
        chaos.run(Blow.draw(targets, seed=0))
    assert len(chaos.kills) >= 4, f"the run was over too soon: {chaos.kills}"
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


@pytest.mark.chaos
def test_kills_during_the_sort_and_the_merge_of_a_knowledge_base_change_nothing(
    corpus: Corpus, undisturbed: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """The driver merges the update, then an actor on a node does, which has a cache of its own."""
    output = str(tmp_path / "output")
    update = write_slow_update(tmp_path, artifacts["language_model"])
    corpus = replace(corpus, artifacts={**corpus.artifacts, "knowledge_base": update})
    command = corpus.command(tmp_path / "link.toml", output)
    with TemporaryDirectory(prefix="gemel-", dir="/tmp") as short:  # Ray's sockets need a short path
        of_driver, of_node = (Path(short, name) for name in ("driver", "node"))
        for directory in (of_driver, of_node):
            directory.mkdir()
        with nodes(1, {"TMPDIR": str(of_node)}) as cluster:
            environment = {"RAY_ADDRESS": cluster.address, "TMPDIR": str(of_driver)}
            chaos = Chaos(command, output, tmp_path / "log.txt", environment, cluster, [])
            chaos.run(
                [
                    Blow("driver", 0.0, at_work=False, when=lambda: is_merging(of_driver)),
                    Blow("driver", 0.0, at_work=False, when=lambda: is_sorting(output)),
                    Blow("task", 0.0, at_work=False, when=lambda: is_sorting(output)),
                    Blow("generation", 0.0, at_work=False, when=lambda: is_merging(of_node)),
                ]
            )
        assert not is_merging(of_driver)
        assert not is_merging(of_node)
    assert chaos.kills == ["driver", "driver", "task", "generation"]
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


def write_slow_update(directory: Path, language_model: Path) -> Path:
    """An update that changes no answer, of a knowledge base whose descriptions take seconds to be merged."""
    ids, descriptions = [f"Q{n}" for n in range(len(ENTITY_NAMES))], ["long " * 2_000_000] * len(ENTITY_NAMES)
    entities = pa.table(
        {"entity_id": ids, "name": ENTITY_NAMES, "description": pa.array(descriptions, pa.large_string())}
    )
    tokenizer, base, update = load_tokenizer(str(language_model)), directory / "base", directory / "update"
    build_knowledge_base(entities, tokenizer, base, KnowledgeBaseSettings())
    changes = pa.table({"entity_id": ids[:1], "name": ENTITY_NAMES[:1]})
    update_knowledge_base(str(base), changes, tokenizer, update, KnowledgeBaseSettings())
    return update


def test_two_drivers_at_once(corpus: Corpus, undisturbed: str, tmp_path: Path) -> None:
    """The second begins right behind the first, has as much to do, and is at work when the first ends."""
    output = str(tmp_path / "output")
    command = corpus.command(tmp_path / "link.toml", output)
    with (tmp_path / "log.txt").open("wb") as log:
        first = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not is_claimed(output):
            assert first.poll() is None, "it has ended"
            time.sleep(0.1)
        second = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        codes = [driver.wait(540) for driver in (first, second)]
    assert codes == [0, 0], (tmp_path / "log.txt").read_text()[-4000:]
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


def test_a_run_that_is_asked_to_stop_goes_on_later(corpus: Corpus, undisturbed: str, tmp_path: Path) -> None:
    output = str(tmp_path / "output")
    chaos = Chaos(corpus.command(tmp_path / "link.toml", output), output, tmp_path / "log.txt", {}, None, [])
    chaos.run([Blow("driver, asked to stop", 0.0, at_work=True)])
    assert chaos.num_drivers == 2
    assert "stopped; to go on: gemel link " in chaos.log.read_text()
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


def test_a_run_over_an_s3_server_in_trouble(
    s3_corpus: Corpus, undisturbed: str, s3_server: S3Server, tmp_path: Path
) -> None:
    output = f"{s3_server.uri}/in-trouble"
    with faulty_proxy(s3_server.endpoint, seed=1, share=0.05) as proxy:
        command = s3_corpus.command(tmp_path / "link.toml", output)
        chaos = Chaos(command, output, tmp_path / "log.txt", {"AWS_ENDPOINT_URL": proxy.endpoint}, None, [])
        chaos.run([])
    assert set(proxy.faults) == set(FAULTS)
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few shards."""
    with small_file_system(tmp_path / "small", "160k") as directory:
        yield directory


def test_a_full_disk_ends_a_run_which_goes_on_when_there_is_room(
    corpus: Corpus, undisturbed: str, small_disk: Path, tmp_path: Path
) -> None:
    output = str(small_disk / "output")
    command = corpus.command(tmp_path / "link.toml", output)
    finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=540)
    assert finished.returncode == 1
    assert "no room left on the disk: make room, then run the same command again" in finished.stderr
    assert 0 < len(finished_shards(output)) < NUM_ROWS // ROWS_PER_SHARD
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    Chaos(command, output, tmp_path / "log.txt", {}, None, []).run([])
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert left_over(output) == set()


def test_an_engine_that_loses_a_process_is_started_again(corpus: Corpus, undisturbed: str, tmp_path: Path) -> None:
    """vLLM with its model split over two processes of the actor."""
    split = "--language-model.tensor-parallel-size=2"
    output = str(tmp_path / "output")
    command = corpus.command(tmp_path / "link.toml", output, split, engine="vllm")
    chaos = Chaos(command, output, tmp_path / "log.txt", {}, None, [])
    chaos.run([Blow("engine worker", 0.0, at_work=True)])
    assert chaos.kills == ["engine worker"]
    assert Damage.of(output, undisturbed) == NO_DAMAGE
    assert processes("engine worker") == []

"""The linking job in actors of Ray, with vLLM, on S3: the same as in one process, sorted and counted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from support.corpus import mention_rows, predictions, run_job, toml, write_mentions, write_unsorted
from support.paths import ROOT
from support.s3_server import S3Server

from gemel_engine import storage
from gemel_engine.config.loading import load_config
from gemel_engine.config.resources import PoolSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.linker import Linker
from gemel_engine.linking import on_ray, order
from gemel_engine.linking.order import ordered_plan
from gemel_engine.pipeline import ray_data
from gemel_engine.pipeline.chain import Stage
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.pipeline.ray_data import actor_pool, own_errors

SAMPLE = re.compile(r"ray_gemel_(\w+)\{(.*)\} (\S+)")
Linked = tuple[Path, LinkConfig, dict[str, Any]]  # the report as in its file
# A GPU that the image encoder and the language model share.
SHARED_GPU = [
    "--vision.device=cuda",
    "--resources.images.num-gpus=0.2",
    "--resources.generation.num-gpus=0.8",
    "--language-model.gpu-memory-utilization=0.15",
]


@pytest.fixture(scope="module")
def linked(
    s3_server: S3Server,
    local_ray: None,
    artifacts: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    device: str,
) -> Linked:
    """A run by vLLM on a cluster: input, knowledge base and output on S3, credentials from the environment.

    One of the nine mentions has no surface form.
    """
    directory = tmp_path_factory.mktemp("on_ray")
    mentions = write_mentions(directory / "mentions.parquet", (4, {"mention": " ", "mention_start": None}))
    prefix = f"{s3_server.uri}/linking"
    storage.write_bytes(f"{prefix}/in/mentions.parquet", mentions.read_bytes())
    for file in artifacts["knowledge_base"].rglob("*.*"):
        relative = file.relative_to(artifacts["knowledge_base"])
        storage.write_bytes(f"{prefix}/kb/{relative}", file.read_bytes())
    path = directory / "link.toml"
    text = toml(artifacts | {"knowledge_base": f"{prefix}/kb"}, f"{prefix}/in", f"{prefix}/out", "vllm")
    path.write_text(text.replace("fraction = 0.0", "fraction = 0.2"))
    finished = run_job(
        path, *(SHARED_GPU if device == "cuda" else []), RAY_ADDRESS=ray.get_runtime_context().gcs_address
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in finished.stderr + finished.stdout
    assert secret.encode() not in storage.read_bytes(f"{prefix}/out/_run.json")
    report = json.loads(storage.read_bytes(f"{prefix}/out/_report.json"))
    return path, load_config(LinkConfig, path), report


@pytest.mark.gpu
def test_vllm_links_like_the_reference_on_s3(linked: Linked) -> None:
    _, config, report = linked
    linker = Linker(replace(config, language_model=replace(config.language_model, engine="transformers")))
    rows = predictions(config.output)
    assert [row["mention_id"] for row in rows] == [f"m{n}" for n in range(9)]
    for row, mention in zip(rows, mention_rows(), strict=True):
        if row["mention_id"] == "m4":
            assert row["entity_id"] is None
            continue
        expected = linker.link_one(mention["text"], mention["mention"], mention["image_bytes"])
        assert row["entity_id"] == expected.entity_id
        assert row["log_prob"] == pytest.approx(expected.log_prob, abs=1e-3)
    assert report["prefix_cache_hit_rate"] > 0


def test_metrics_and_report_count_a_run(linked: Linked) -> None:
    _, config, report = linked
    rows = predictions(config.output)
    assert report["rollouts"] == sum(row["num_rollouts"] or 0 for row in rows)
    assert set(report["peak_bytes"]) == {"image", "retrieval", "generation"}
    assert 0 <= report["cached_tokens"] <= report["prompt_tokens"]
    assert report["errors"] == {"invalid_mention": 1}

    expected = {
        ("planned_rows_total", ""): 9,
        ("rows_total", "linked"): 8,
        ("rows_total", "invalid_mention"): 1,
        ("rollouts_total", ""): report["rollouts"],
        ("stage_seconds_total", "generation"): pytest.approx(report["stage_seconds"]["generation"]),
    }
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 120, dict[tuple[str, str], float]()
    while time.monotonic() < deadline and not expected.items() <= found.items():
        time.sleep(1)
        with urlopen(address) as response:
            found = scraped(response.read().decode(), config.output)
    assert {key: found.get(key) for key in expected} == expected


def scraped(text: str, output: str) -> dict[tuple[str, str], float]:
    """Value of each of our metrics of a run, by name and by what tells its kinds apart."""
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("output") == output:
            found[name, tags.get("outcome") or tags.get("stage") or tags.get("found") or ""] = float(value)
    return found


def test_one_process_gives_the_same_without_ray(linked: Linked, tmp_path: Path) -> None:
    """And its rerun and a dry run import no library of models at all."""
    path, on_ray, report = linked
    assert (report["rows"], report["shards"]) == (9, 3)
    output = str(tmp_path / "output")
    arguments = (path, "--language-model.engine", "transformers", "--output")
    imported = imported_by_link(*arguments, output)
    assert "torch" in imported
    assert "ray" not in imported
    found, expected = (list(leaves(predictions(directory))) for directory in (output, on_ray.output))
    assert [place for place, _ in found] == [place for place, _ in expected]
    for (place, ours), (_, theirs) in zip(found, expected, strict=True):
        assert ours == (pytest.approx(theirs, abs=1e-3) if isinstance(theirs, float) else theirs), place
    for directory in (output, on_ray.output):
        assert not any("_parts" in file or "_marks" in file for file in storage.list_files(directory))
    assert imported_by_link(*arguments, output) == set()
    assert imported_by_link(*arguments, tmp_path / "other", "--dry-run") == set()


def leaves(value: Any, *place: str | int) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Each value in nested lists and dictionaries, with its place."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, *place, key)
    else:
        yield place, value


def imported_by_link(*arguments: object) -> set[str]:
    """The libraries of models, and Ray, that a process of `gemel link` imports."""
    code = (
        "import sys; from gemel_engine.cli.main import main; main('link'); "
        "print('imported:', *({'torch', 'transformers', 'open_clip', 'ray', 'vllm'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=540)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return set(finished.stdout.rpartition("imported:")[2].split())


def test_ray_sorts_by_surface_form(linked: Linked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_MOST_ROWS_HERE", 0)
    corpus, expected = write_unsorted(tmp_path / "corpus")
    config = replace(linked[1], input=str(corpus), output=str(tmp_path / "output"), rows_per_shard=6)
    plan = ordered_plan(config, plan_shards(config.input, 6))
    assert [shard.stop - shard.start for shard in plan] == [6, 6, 6]
    tables = [pq.read_table(uri).to_pylist() for uri in dict.fromkeys(shard.uri for shard in plan)]
    assert [row["mention_id"] for rows in tables for row in rows] == expected
    assert ordered_plan(config, plan_shards(config.input, 6)) == plan


def test_processes_of_a_cluster_are_told_absolute_paths(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They work in the directory where Ray was started."""
    told: list[object] = []

    def stream(_: object, stages: list[Stage]) -> NoReturn:
        told.extend(getattr(argument, "output", None) for stage in stages for argument in stage.arguments)
        told.extend(stage.work.keywords["output"] for stage in stages if isinstance(stage.work, partial))
        raise KeyboardInterrupt

    def sort(_: object, __: int, directory: str, *___: int) -> NoReturn:
        told.append(directory.partition("/_ordered/")[0])
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(order, "_MOST_ROWS_HERE", 0)
    monkeypatch.setattr(on_ray, "stream", stream)
    monkeypatch.setattr(on_ray, "sort_on_ray", sort)
    corpus, _ = write_unsorted(tmp_path / "corpus")
    (tmp_path / "link.toml").write_text(toml(artifacts, corpus, "output"))
    config = load_config(LinkConfig, tmp_path / "link.toml")
    plan = plan_shards(config.input, 6)
    with pytest.raises(KeyboardInterrupt):
        ordered_plan(replace(config, rows_per_shard=6), plan)
    with pytest.raises(KeyboardInterrupt):
        next(on_ray.receipts_on_ray(config, plan, {}))
    assert config.output == "output"
    assert {place for place in told if place is not None} == {str(tmp_path / "output")}
    assert len(told) > 5


def test_actors_claim_what_their_settings_say() -> None:
    asked = actor_pool(PoolSettings(num_cpus=2, num_gpus=0.25, memory_gib=1.5, num_threads=3))
    assert (asked["num_cpus"], asked["num_gpus"], asked["memory"]) == (2, 0.25, 1.5 * 2**30)
    assert asked["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "3"}}
    assert not {"memory", "runtime_env"} & actor_pool(PoolSettings()).keys()


@pytest.mark.parametrize(
    ("messages", "num_calls", "error"),
    [
        (["the raylet did not answer"], 2, None),
        (["the raylet did not answer"] * 2, 2, "see that the machine is not overloaded"),
        (["AF_UNIX path length is too long"], 1, "set TMPDIR, or RAY_TMPDIR"),
    ],
)
def test_ray_is_started_once_more_where_that_may_help(
    monkeypatch: pytest.MonkeyPatch, messages: list[str], num_calls: int, error: str | None
) -> None:
    calls: list[object] = []

    def init(**options: object) -> None:
        calls.append(options)
        if len(calls) <= len(messages):
            raise RuntimeError(messages[len(calls) - 1])

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with nullcontext() if error is None else pytest.raises(ConfigurationError, match=error):
        ray_data._start_ray({})
    assert len(calls) == num_calls


def test_an_error_of_a_stage_is_raised_as_itself() -> None:
    """However Ray reports it: as the error of a task, of the code that it was given, or of an actor's start."""
    text = (
        "ray::MapBatches()\n  File ...\ngemel_engine.errors.InputError: x has changed: do y\n\nThe above exception was "
        "the direct cause of the following exception:\n\nray.exceptions.UserCodeException: UDF failed"
    )
    task: Any = RayTaskError("f", text, UserCodeException("UDF failed"))  # type: ignore[no-untyped-call]
    for error in (task, task.make_dual_exception_instance(), ActorDiedError(task)):
        with pytest.raises(InputError, match=r"^x has changed: do y$"), own_errors():
            raise error
    with pytest.raises(RayTaskError), own_errors():
        raise RayTaskError("f", "gemel_engine.errors.NoSuchError: x", ValueError("x"))  # type: ignore[no-untyped-call]

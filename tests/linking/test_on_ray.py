"""The linking job in actors of Ray: the same as in one process, sorted and counted."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from support.corpus import predictions, toml, write_mentions
from support.names import ENTITY_NAMES
from support.paths import ROOT

from gemel_engine.config.components import VisionSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.resources import PoolSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import InputError
from gemel_engine.linking.job import link_corpus
from gemel_engine.pipeline.ray_data import actor_pool, own_errors


@pytest.fixture
def path(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    """The configuration of a run over nine good mentions on the reference engine."""
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "on_ray"))
    return path


def test_one_process_gives_the_same_without_ray(local_ray: None, path: Path, tmp_path: Path) -> None:
    """And its rerun and a dry run import no library of models at all."""
    on_ray = load_config(LinkConfig, path)
    report = link_corpus(on_ray)
    assert (report.rows, report.errors, report.shards) == (9, {}, 3)
    output = str(tmp_path / "output")
    imported = imported_by_link(path, "--output", output)
    assert "torch" in imported
    assert "ray" not in imported
    assert predictions(output) == predictions(on_ray.output)
    for directory in (output, on_ray.output):
        assert not {"_parts", "_marks"} & {file.name for file in Path(directory).iterdir()}
    assert imported_by_link(path, "--output", output) == set()
    assert imported_by_link(path, "--output", tmp_path / "other", "--dry-run") == set()


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


def test_equal_surface_forms_meet_in_one_shard(local_ray: None, path: Path, tmp_path: Path) -> None:
    """Two files of other types and columns, surface forms that take turns, and a row without any."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows: list[dict[str, Any]] = [
        {"mention_id": f"m{n:02}", "text": f"Look at the {name} over there.", "mention": name}
        for n, name in enumerate(ENTITY_NAMES[:3] * 6)
    ]
    rows[7]["mention"] = None
    pq.write_table(pa.Table.from_pylist(rows[:10]), corpus / "a.parquet")
    large = pa.schema([(name, pa.large_string()) for name in (*rows[0], "image_uri")])
    pq.write_table(pa.Table.from_pylist(rows[10:], schema=large), corpus / "b.parquet")
    vision = VisionSettings()  # none, which spares a process
    config = replace(
        load_config(LinkConfig, path), input=str(corpus), rows_per_shard=6, max_failed_fraction=0.1, vision=vision
    )
    report = link_corpus(config)
    assert (report.rows, report.shards, report.errors) == (18, 3, {"invalid_mention": 1})
    found = [row["mention_id"] for row in predictions(config.output)]
    expected = sorted(rows, key=lambda row: (row["mention"] is None, row["mention"] or "", row["mention_id"]))
    assert found == [row["mention_id"] for row in expected]

    (Path(config.output) / "data/shard-00001.parquet").unlink()
    assert link_corpus(config).shards_skipped == 2
    assert [row["mention_id"] for row in predictions(config.output)] == found


def test_actors_claim_what_their_settings_say() -> None:
    asked = actor_pool(PoolSettings(num_cpus=2, num_gpus=0.25, memory_gib=1.5, num_threads=3))
    assert (asked["num_cpus"], asked["num_gpus"], asked["memory"]) == (2, 0.25, 1.5 * 2**30)
    assert asked["runtime_env"] == {"env_vars": {"OMP_NUM_THREADS": "3"}}
    assert not {"memory", "runtime_env"} & actor_pool(PoolSettings()).keys()


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

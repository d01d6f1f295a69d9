"""The training job as a user runs it: tiny real models, real Ray Train, interruptions, and linking with the result."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.train import ControllerError
from support.corpus import picture
from support.names import ENTITY_NAMES
from support.paths import ROOT
from support.s3_server import S3Server

from gemel_engine import storage
from gemel_engine.assembly import open_artifacts
from gemel_engine.compatibility import check_encoders
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import TrainConfig, TrainedModelSettings
from gemel_engine.contents import run_contents
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, TooManyFailuresError
from gemel_engine.pipeline.chain import Stage
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.training import job, preparation
from gemel_engine.training.checkpoints import keep_record, restore_record
from gemel_engine.training.job import TrainReport, _errors_of_workers, _events_kept, _Reports, train_mapper
from gemel_engine.training.preparation import PreparedSplit, prepare_split
from gemel_engine.training.worker import SCORE
from gemel_engine.vision.mapper import FeatureMapper


def write_split(path: Path, num_mentions: int = 10, **columns: list[object]) -> Path:
    colours = ["red", "green", "blue", "white", "black"]
    names = [ENTITY_NAMES[n % 7] for n in range(num_mentions)]
    table = {
        "mention_id": [f"{path.stem}{n}" for n in range(num_mentions)],
        "text": [f"Look, a {name}." for name in names],
        "mention": names,
        "image_bytes": [picture(colours[n % 5]) if n % 4 else None for n in range(num_mentions)],
        "entity_id": [f"Q{n % 7}" for n in range(num_mentions)],
    }
    pq.write_table(pa.table(table | columns), path)
    return path


@pytest.fixture
def config_path(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(
        f"""
train = "{write_split(tmp_path / "train.parquet")}"
dev = "{write_split(tmp_path / "dev.parquet", 6)}"
output = "{tmp_path / "output"}"
knowledge_base = "{artifacts["knowledge_base"]}"
demonstrations = "{artifacts["demonstrations"]}"
[language_model]
name = "{artifacts["language_model"]}"
dtype = "float32"
[vision]
image_encoder = "{artifacts["image_encoder"]}"
[retrieval]
mention_encoder = "{artifacts["mention_encoder"]}"
num_demonstrations = 2
[prompt]
max_prompt_tokens = 600
query_reserve = 200
[mapper]
prefix_length = 2
initialisation = "ridge"
scaling = "z_score"
[optimisation]
epochs = 2
learning_rate = 1e-2
batch_size = 4
[workers]
num_cpus = 0.5
checkpoint_every = 2
report_every = 1
"""
    )
    return path


def run_job(path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "jobs/train.py", str(path), *overrides],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=540,
    )


def report(output: str) -> TrainReport:
    return TrainReport(**json.loads(storage.read_bytes(f"{output}/_report.json")))


@pytest.mark.gpu
@pytest.mark.heavy
def test_the_job_trains_a_mapper_on_two_workers(config_path: Path, device: str) -> None:
    on_gpu = ("--workers.use-gpu", "--vision.device=cuda", "--resources.images.num-gpus=0.25")
    num_workers = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    finished = run_job(config_path, f"--workers.num-workers={num_workers}", *(on_gpu if device == "cuda" else ()))
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert "Failed to query" not in finished.stderr + finished.stdout, "a warning of Ray's that comes every second"
    config = load_config(TrainConfig, config_path)
    found = report(config.output)
    assert (found.steps, found.examples, found.left_out) == (6, 10, {"train": {}, "dev": {}})
    assert found.loss is not None
    assert found.dev_accuracy is not None
    mapper = FeatureMapper.load(f"{config.output}/feature_mapper")
    assert mapper.metadata.initialisation == "ridge"
    assert mapper.metadata.language_model_fingerprint is not None
    assert mapper.metadata.image_encoder_fingerprint is not None
    assert mapper.metadata.details["dev_accuracy"] == found.dev_accuracy
    assert list(Path(config.output, "tensorboard").glob("events*"))
    for path in Path(config.output).glob("checkpoints/checkpoint_*/optimiser.safetensors"):
        path.write_bytes(b"")
    damaged = run_job(config_path, f"--workers.num-workers={num_workers}", *(on_gpu if device == "cuda" else ()))
    assert damaged.returncode == 4, damaged.stderr[-5000:]
    assert "are of two checkpoints: go back to an earlier one" in damaged.stderr


def test_pictures_are_encoded_once_for_all_examples_of_a_content(
    local_ray: None, config_path: Path, tmp_path: Path
) -> None:
    """Other numbers of demonstrations and another prefix length need no picture again, a copied corpus nothing."""
    config = load_config(TrainConfig, config_path)
    artifacts = open_artifacts(config)
    encoder = check_encoders(config, artifacts)
    assert encoder is not None
    contents = run_contents(config, artifacts.mention_encoder_fingerprint, encoder.fingerprint)

    def prepared(changed: TrainConfig, corpus: str) -> PreparedSplit:
        plan = plan_shards(corpus, 4, ("entity_id",))
        return prepare_split(changed, "train", plan, artifacts, encoder, contents)

    first = prepared(config, config.train)
    assert (first.num_rows, first.num_pictures) == (10, 7)
    (tmp_path / "clone").mkdir()
    clone = str(shutil.copy(config.train, tmp_path / "clone/train.parquet"))  # with another time
    assert prepared(config, clone) == first
    retrieval, mapper = replace(config.retrieval, num_demonstrations=1), replace(config.mapper, prefix_length=3)
    second = prepared(replace(config, retrieval=retrieval, mapper=mapper), clone)
    assert second.directory != first.directory
    assert len(list(Path(config.output, "examples/train/pictures").iterdir())) == 1
    columns = ["mention_id", "error", "image_features"]
    assert read_examples(second).select(columns).equals(read_examples(first).select(columns))


@pytest.mark.unit
@pytest.mark.parametrize("fault", [None, RuntimeError("a full disk")])
def test_only_the_directory_in_use_remains_of_a_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    """Where it fails, and where another run was faster."""

    class Rows:
        def __init__(self, plan: object, stages: list[Stage]) -> None:
            self.work = stages[-1].work

        def take_all(self) -> list[dict[str, int]]:
            self.work({})
            if fault is not None:
                raise fault
            root = next(tmp_path.glob("*/data-*")).parent
            storage.write_bytes(f"{root}/data-other/1.parquet", b"")
            counts = {"num_rows": 2, "num_pictures": 1}
            storage.write_bytes(f"{root}/_prepared.json", json.dumps({"directory": "data-other"} | counts).encode())
            return [counts]

    def write(rows: object, directory: str) -> None:
        storage.write_bytes(f"{directory}/1.parquet", b"")

    monkeypatch.setattr(preparation, "stream", Rows)
    with pytest.raises(RuntimeError, match="full") if fault else nullcontext():
        prepared = preparation._prepared(str(tmp_path), {"settings": {}}, [], [], write)
        assert prepared.directory.endswith("/data-other")
    assert [path.name for path in tmp_path.glob("*/data-*")] == ([] if fault else ["data-other"])


@pytest.mark.unit
def test_given_features_have_the_width_of_the_artifacts_or_of_the_first_training_mention(tmp_path: Path) -> None:
    features = [None, [], None, [0.5] * 3, [0.5] * 4]
    train = write_split(tmp_path / "train.parquet", 5, image_features=list(features))
    config = TrainConfig(
        train=str(train), output="", knowledge_base="", language_model=TrainedModelSettings(name="unused")
    )

    def width(**found: object) -> int | None:
        artifacts: Any = SimpleNamespace(**dict.fromkeys(("feature_mapper", "index", "evidence")) | found)
        return preparation._vision_width(config, artifacts, None)

    assert width() == 3
    without_pictures = SimpleNamespace(metadata=SimpleNamespace(vision_width=None))
    evidence = SimpleNamespace(pictures=SimpleNamespace(width=7))
    assert width(index=without_pictures, evidence=evidence) == 7
    assert width(index=without_pictures, evidence=SimpleNamespace(pictures=None)) == 3
    sized = SimpleNamespace(metadata=SimpleNamespace(vision_width=8))
    assert width(feature_mapper=sized) == width(index=sized, evidence=evidence) == 8


def read_examples(prepared: PreparedSplit) -> pa.Table:
    return pq.read_table(prepared.directory).sort_by("mention_id")


def test_a_corpus_or_a_setting_that_is_wrong_stops_the_job_at_once(config_path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, config_path)
    no_gold = pq.read_table(config.train).drop_columns(["entity_id"])
    pq.write_table(no_gold, tmp_path / "no_gold.parquet")
    with pytest.raises(InputError, match="no column 'entity_id'"):
        train_mapper(replace(config, train=str(tmp_path / "no_gold.parquet")))
    with pytest.raises(InputError, match="no column 'image_features'"):
        train_mapper(replace(config, vision=replace(config.vision, image_encoder=None)))
    with pytest.raises(InputError, match=r"have \d+ mention_id in common, such as '.*': keep the splits apart"):
        train_mapper(replace(config, dev=config.train))
    assert not storage.exists(config.output)
    with pytest.raises(ConfigurationError, match=r"optimisation\.batch_size: .*greater than or equal to 1 \(got 0\)"):
        load_config(TrainConfig, config_path, ["--optimisation.batch-size", "0"])


@pytest.mark.heavy
def test_mentions_that_cannot_be_used_are_counted(local_ray: None, config_path: Path, tmp_path: Path) -> None:
    config = load_config(TrainConfig, config_path)
    strangers = write_split(tmp_path / "strangers.parquet", 4, entity_id=["X1"] * 4)
    other = replace(config, train=str(strangers), output=str(tmp_path / "strangers"))
    with pytest.raises(InputError, match=r"none of the 4 train mentions can be used: 4 unknown_entity"):
        train_mapper(other)
    with pytest.raises(ConfigurationError, match=r"differs in .*settings\.mapper\.prefix_length"):
        train_mapper(replace(other, mapper=replace(config.mapper, prefix_length=3)))
    damaged = write_split(tmp_path / "damaged.parquet", 4, image_bytes=[picture("red"), b"?", None, None])
    with pytest.raises(TooManyFailuresError, match=r"1 of 4 train mentions failed \(1 image\)"):
        train_mapper(replace(config, train=str(damaged), output=str(tmp_path / "damaged")))


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_a_killed_worker_and_a_killed_job_change_nothing(config_path: Path, tmp_path: Path) -> None:
    plain, disturbed = str(tmp_path / "plain"), str(tmp_path / "disturbed")
    options = ("--optimisation.epochs", "20", "--validation.every-steps", "30")
    assert run_job(config_path, "--output", plain, *options).returncode == 0
    command = [sys.executable, "jobs/train.py", str(config_path), "--output", disturbed, *options]
    job = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_checkpoint(disturbed, 2)
    kill_workers(job.pid)
    wait_for_checkpoint(disturbed, 4)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert run_job(config_path, "--output", disturbed, *options).returncode == 0
    a, b = (FeatureMapper.load(f"{output}/feature_mapper") for output in (plain, disturbed))
    assert torch.equal(a.linear.weight, b.linear.weight)
    found = [report(output) for output in (plain, disturbed)]
    assert [item.steps for item in found] == [60, 60]
    assert found[0].dev_accuracy == found[1].dev_accuracy
    assert found[0].kept_step == found[1].kept_step
    assert run_job(config_path, "--output", disturbed, *options).returncode == 0, "a finished run can be run again"


@pytest.mark.unit
def test_a_worker_s_own_error_ends_the_training_as_itself(tmp_path: Path) -> None:
    reports = _Reports(str(tmp_path), str(tmp_path), as_lines=False)
    lost: dict[int, Exception] = {0: RuntimeError("a lost connection")}
    reports.after_exception(None, lost)  # the next attempt may succeed
    with pytest.raises(ArtifactError, match="damaged") as raised:
        reports.after_exception(None, lost | {1: ArtifactError("damaged: remove it")})
    with pytest.raises(ArtifactError, match="damaged: remove it"), _errors_of_workers():
        raise pickle.loads(pickle.dumps(ControllerError(raised.value)))  # as Ray passes it on
    with pytest.raises(ControllerError, match="lost"), _errors_of_workers():
        raise ControllerError(lost[0])


@pytest.mark.unit
def test_events_are_copied_once_in_a_while_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self, directory: str, flush_secs: int) -> None:
            self._file = Path(directory, "events")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            with self._file.open("a") as file:
                file.write(f"{step} ")

    def copied(step: int) -> str:
        reports.after_report(None, [{"step": step, SCORE: -1.0, "loss": 0.5}], None)
        return (tmp_path / "tensorboard/events").read_text()

    monkeypatch.setattr(job, "SummaryWriter", Writer)
    with _events_kept(str(tmp_path)) as events:
        reports = _Reports(str(tmp_path), events, as_lines=False)
        assert copied(1) == copied(2) == "1 "
        reports._last_copy -= 60
        assert copied(3) == copied(4) == "1 2 3 "
    assert (tmp_path / "tensorboard/events").read_text() == "1 2 3 4 "
    assert not Path(events).exists()


def test_training_goes_on_from_a_record_of_checkpoints_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a kill while Ray Train writes it, which it does in place."""
    record = tmp_path / "checkpoints/checkpoint_manager_snapshot.json"
    restore_record(str(tmp_path))
    record.parent.mkdir()
    record.write_text('{"checkpoint_results": [')
    keep_record(str(tmp_path))
    restore_record(str(tmp_path))
    assert not record.exists(), "there is nothing to go on from"
    record.write_text('{"checkpoint_results": []}')
    keep_record(str(tmp_path))
    for cut in ("", '{"checkpoint_results": [{'):
        record.write_text(cut)
        keep_record(str(tmp_path))
        restore_record(str(tmp_path))
        assert record.read_text() == '{"checkpoint_results": []}'
    monkeypatch.setattr(storage, "read_bytes", None)
    keep_record("s3://bucket/output")  # where a record is never cut off, so that none is copied


def wait_for_checkpoint(output: str, count: int) -> None:
    seen: set[str] = set()
    deadline = time.monotonic() + 600
    while len(seen) < count:
        assert time.monotonic() < deadline, f"no {count} checkpoints in {output}"
        seen |= {path.name for path in Path(output, "checkpoints").glob("checkpoint_*")}
        time.sleep(0.05)


def kill_workers(job: int) -> None:
    """Kill the training workers of a job, and no others."""
    killed = 0
    for process in psutil.Process(job).children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed += 1
    assert killed, "no training worker to kill"


@pytest.mark.heavy
def test_training_on_s3(config_path: Path, artifacts: dict[str, Path], s3_server: S3Server) -> None:
    output = f"{s3_server.uri}/training"
    finished = run_job(config_path, "--output", output)
    assert finished.returncode == 0, finished.stderr[-5000:]
    assert report(output).steps == 6
    assert FeatureMapper.load(storage.download_directory(f"{output}/feature_mapper")).metadata.trained
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in finished.stderr + finished.stdout

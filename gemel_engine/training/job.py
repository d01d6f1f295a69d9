"""The training job: Ray Data prepares the mentions once, Ray Train fits the feature mapper on them.

    read mentions → EncodeImages → RetrieveDemonstrations (not of its own group) → CheckExamples → OUTPUT/examples
    workers: frozen language model, feature mapper under DDP → OUTPUT/checkpoints → OUTPUT/feature_mapper

A rerun of the same command continues from the last checkpoint, whatever ended the run before it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.data import Dataset
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    ControllerError,
    DataConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer

from gemel_engine import storage
from gemel_engine.assembly import open_artifacts
from gemel_engine.compatibility import check_encoders
from gemel_engine.config.loading import config_json, validated, with_absolute_paths
from gemel_engine.config.settings import TrainConfig
from gemel_engine.contents import run_contents, without_missing_evidence
from gemel_engine.decoding.language_model import DTYPES
from gemel_engine.errors import ConfigurationError, GemelError, InputError, shown
from gemel_engine.extras import extra
from gemel_engine.pipeline.corpus import count_rows, plan_identity, plan_shards, with_rows_per_shard
from gemel_engine.pipeline.identity import run_identity
from gemel_engine.pipeline.output import RunDirectory, claim_output
from gemel_engine.pipeline.ray_data import connect
from gemel_engine.storage.parquet import read_tables
from gemel_engine.training.attention import check_trainable
from gemel_engine.training.checkpoints import keep_record, restore_record
from gemel_engine.training.preparation import count_left_out, prepare_split, prepared_dataset
from gemel_engine.training.worker import ACCURACY, SCORE, train_worker
from gemel_engine.types import mention_columns
from gemel_engine.vision.mapper import FeatureMapper

with extra("train"):
    from tensorboardX import SummaryWriter

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_COPIES = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Result of a training run.

    Attributes:
        steps: Number of gradient steps, those before an interruption included.
        loss: Mean over the steps of the last report, in nats per label token; None without a step.
        dev_accuracy: Dev accuracy of the mapper that was kept; None without validation.
        kept_step: Number of steps after which this mapper was saved.
        examples: Number of training mentions that were used.
        left_out: Number of mentions that can't be used, by split and reason.
        seconds: Duration of this call.
    """

    steps: int
    loss: float | None
    dev_accuracy: float | None
    kept_step: int
    examples: int
    left_out: dict[str, dict[str, int]]
    seconds: float

    def summary(self) -> str:
        """Return one line for a terminal."""
        loss, accuracy = ("-" if value is None else f"{value:.3f}" for value in (self.loss, self.dev_accuracy))
        return f"examples={self.examples} steps={self.steps} loss={loss} dev_accuracy={accuracy} at={self.kept_step}"


def train_mapper(config: TrainConfig) -> TrainReport:
    """Train a feature mapper; keep the one with the best dev accuracy, in `OUTPUT/feature_mapper`.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable (nothing has been
            started then, unless it is unusable for a worker alone), or too many mentions can't be
            used.
    """
    started = time.monotonic()
    config = validated(config)
    for address in filter(None, (config.output, config.examples)):
        storage.check_kept(address)
        for source in filter(None, (config.train, config.dev)):
            storage.check_apart(address, source)
    check_trainable(config.language_model.name, activation_checkpointing=config.language_model.activation_checkpointing)
    config = replace(config, retrieval=replace(config.retrieval, exclude_group=True))
    splits = {"train": config.train}
    if config.dev is not None and config.validation.num_mentions:
        splits["dev"] = config.dev
    config = with_rows_per_shard(config, *splits.values())
    required = ("entity_id", *(("image_features",) if config.vision.image_encoder is None else ()))
    names = config.columns.given()
    plans = {split: plan_shards(uri, config.rows_per_shard, required, names) for split, uri in splits.items()}
    _check_disjoint(splits, names)
    artifacts = open_artifacts(config, verify=config.verify_artifacts)
    image_encoder = check_encoders(config, artifacts)
    fingerprint = None if image_encoder is None else image_encoder.fingerprint
    contents = run_contents(config, artifacts.mention_encoder_fingerprint, fingerprint)
    shards = {split: plan_identity(plan) for split, plan in plans.items()}
    claim_output(config.output, run_identity(config, shards, contents))
    config = without_missing_evidence(config, has_evidence=artifacts.evidence is not None)
    connect(quiet=False)  # the workers' progress comes as their output
    _check_resources(config)
    of_workers = with_absolute_paths(config)
    prepared = {
        split: prepare_split(of_workers, split, plan, artifacts, image_encoder, contents)
        for split, plan in plans.items()
    }
    left_out = {split: count_left_out(config, split, examples) for split, examples in prepared.items()}
    if not prepared["train"].num_pictures:
        raise InputError(f"no mention of {config.train} has a usable picture: there is nothing to train on")
    datasets = {split: prepared_dataset(examples) for split, examples in prepared.items()}
    settings = {
        "config": of_workers,
        "contents": contents,
        "image_encoder_fingerprint": fingerprint,
        "shows_bar": sys.stderr.isatty(),
    }
    restore_record(config.output)
    with _events_kept(config.output) as events, _errors_of_workers():
        result = _trainer(config, settings, datasets, events).fit()
    num_examples = count_rows(plans["train"]) - sum(left_out["train"].values())
    report = _keep_best(config, result, num_examples, left_out, time.monotonic() - started)
    storage.write_bytes(RunDirectory(config.output).report, json.dumps(asdict(report), indent=2).encode())
    logger.info("trained the feature_mapper in %s: %s", shown(config.output), report.summary())
    return report


def _check_disjoint(splits: Mapping[str, str], stored_names: Mapping[str, str]) -> None:
    """Raise InputError if splits share an id.

    A mention is kept from being its own demonstration by its id.
    """
    columns = mention_columns(stored_names)
    tables = [read_tables(uri, columns, ["mention_id"], ["mention_id"]) for uri in splits.values()]
    ids = [set(table["mention_id"].to_pylist()) for table in tables]
    common = set.intersection(*ids) if len(ids) > 1 else set()
    if common:
        raise InputError(
            f"{' and '.join(splits.values())} have {len(common)} mention_id in common, such as {min(common)[:50]!r}: "
            "keep the splits apart, and give their mentions different ids"
        )


def _check_resources(config: TrainConfig) -> None:
    """Raise ConfigurationError if this machine lacks room for the workers; a cluster may grow."""
    if os.environ.get("RAY_ADDRESS"):
        return
    workers = config.workers
    has: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for kind, of_worker in (("CPU", workers.num_cpus), ("GPU", float(workers.use_gpu))):
        asked = (workers.min_workers or workers.num_workers) * of_worker
        if asked > has.get(kind, 0.0):
            raise ConfigurationError(
                f"the workers ask for {asked:g} {kind}s, and this machine's Ray has {has.get(kind, 0.0):g}: lower "
                f"workers.num_workers or {'workers.num_cpus' if kind == 'CPU' else 'unset workers.use_gpu'}"
            )


@contextmanager
def _errors_of_workers() -> Iterator[None]:
    """Raise the error of `gemel_engine.errors` with which `_Reports` ended the training."""
    try:
        yield
    except ControllerError as error:
        if isinstance(error.controller_failure, GemelError):
            raise error.controller_failure from error
        raise


@contextmanager
def _events_kept(output: str) -> Iterator[str]:
    """Make a directory for TensorBoard events, which are copied to the output at the end."""
    with tempfile.TemporaryDirectory(prefix="gemel-tensorboard-") as events:
        try:
            yield events
        finally:
            _copy_events(events, output)


def _copy_events(events: str, output: str) -> None:
    for path in Path(events).iterdir():
        try:
            storage.write_bytes(f"{RunDirectory(output).tensorboard}/{path.name}", path.read_bytes())
        except OSError as error:  # raising would end the training; the next copy is whole again
            logger.warning("no TensorBoard events in %s for now: %s", output, error)


def _trainer(config: TrainConfig, settings: dict[str, Any], datasets: dict[str, Dataset], events: str) -> TorchTrainer:
    workers = config.workers
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # addresses in a configuration may be relative
    file_system, path = storage.resolve(config.output)
    environment = {"THP_MEM_ALLOC_ENABLE": "1"}  # large pages: a step on a CPU is a tenth faster
    if workers.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(workers.num_threads)
    return TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(workers.min_workers, workers.num_workers) if workers.min_workers else workers.num_workers,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": workers.num_cpus} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE),
            callbacks=[
                _Reports(
                    str(storage.local_path(config.output) or config.output),
                    events,
                    as_lines=not settings["shows_bar"],
                )
            ],
            worker_runtime_env={"env_vars": environment},
        ),
        datasets=datasets,
        # Every worker takes its share of each batch itself, so that batches do not depend on the
        # number of workers.
        dataset_config=DataConfig(datasets_to_split=[]),
    )


class _Reports(UserCallback):  # type: ignore[misc]
    """Writes the first worker's reports as lines, and as TensorBoard events copied to the output.

    Also keeps the record of the checkpoints, and ends the training at an error that is no accident.
    Ray runs it on the node of the job.
    """

    def __init__(self, output: str, events: str, *, as_lines: bool) -> None:
        self._output = output
        self._events = events
        self._as_lines = as_lines
        self._writer: SummaryWriter | None = None
        self._last_copy = -math.inf

    def after_report(self, run_context: object, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        try:
            keep_record(self._output)
        except OSError as error:  # as in `_copy_events`
            logger.warning("the record of the checkpoints in %s is not kept for now: %s", self._output, error)
        if self._writer is None:
            self._writer = SummaryWriter(self._events, flush_secs=1)  # its own `flush` does not wait for its queue
        first = metrics[0]
        names = [name for name in first if name not in ("step", SCORE)]
        if self._as_lines and names:
            sys.stderr.write(f"step {first['step']}: {', '.join(f'{name} {first[name]:.4g}' for name in names)}\n")
        for name in names:
            self._writer.add_scalar(name, first[name], first["step"])
        if time.monotonic() - self._last_copy >= _SECONDS_BETWEEN_COPIES:
            _copy_events(self._events, self._output)
            self._last_copy = time.monotonic()

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        """Raise a worker's own error: Ray ends the training then, instead of starting the workers again."""
        for error in worker_exceptions.values():
            if isinstance(error, GemelError):
                raise error


def _keep_best(
    config: TrainConfig, result: train.Result, num_examples: int, left_out: dict[str, dict[str, int]], seconds: float
) -> TrainReport:
    """Write the best checkpoint's mapper to `OUTPUT/feature_mapper`; return the report."""
    assert result.checkpoint is not None, "a run reports a checkpoint before its first step"
    metrics = result.metrics or {}
    scored = [item for item in result.best_checkpoints or () if ACCURACY in item[1]]
    last = result.checkpoint, metrics
    checkpoint, kept = max(scored, key=lambda item: (item[1][ACCURACY], item[1]["step"]), default=last)
    accuracy, step = kept.get(ACCURACY), int(kept["step"])
    with checkpoint.as_directory() as directory:
        mapper = FeatureMapper.load(directory)
    details: dict[str, str | float | int] = {"steps": step, "config": config_json(config)}
    if accuracy is not None:
        details[ACCURACY] = accuracy
    mapper.metadata = replace(mapper.metadata, details=details)
    with tempfile.TemporaryDirectory() as directory:
        mapper.save(directory, DTYPES[config.mapper.saved_dtype])
        for path in sorted(Path(directory).iterdir(), key=lambda path: path.suffix == ".json"):
            storage.write_bytes(f"{RunDirectory(config.output).feature_mapper}/{path.name}", path.read_bytes())
    return TrainReport(
        steps=metrics["step"],
        loss=metrics.get("loss"),
        dev_accuracy=accuracy,
        kept_step=step,
        examples=num_examples,
        left_out=left_out,
        seconds=seconds,
    )

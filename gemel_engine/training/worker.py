"""The training loop that Ray Train runs in each worker."""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from ray import train
from ray.experimental import tqdm_ray
from ray.train import Checkpoint
from ray.train.torch import get_device

from gemel_engine.assembly import open_artifacts
from gemel_engine.config.settings import TrainConfig
from gemel_engine.contents import check_contents
from gemel_engine.decoding.language_model import language_model_fingerprint
from gemel_engine.pipeline.ray_data import own_errors
from gemel_engine.training.attention import PackedLanguageModel
from gemel_engine.training.preparation import mapper_prefix_length
from gemel_engine.training.prompts import TrainingExample, TrainingPrompts, read_examples
from gemel_engine.training.trainer import MapperTrainer, initial_mapper
from gemel_engine.training.validation import Validation
from gemel_engine.vision.mapper import FeatureMapper

ACCURACY = "dev_accuracy"
# Ray Train keeps the checkpoints with the highest score: the dev accuracy, or -1 if unknown.
SCORE = "checkpoint_score"


def train_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; return when all steps are taken."""
    config: TrainConfig = settings["config"]
    context, device = train.get_context(), get_device()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    check_contents(settings["contents"], config)
    artifacts = open_artifacts(config)
    language_model = config.language_model
    model = PackedLanguageModel(
        language_model.name,
        language_model.dtype,
        str(device),
        activation_checkpointing=language_model.activation_checkpointing,
    )
    mapper, fingerprint = artifacts.feature_mapper, settings["image_encoder_fingerprint"]
    prompts = TrainingPrompts(_examples("train"), artifacts, config.prompt, mapper_prefix_length(config, mapper))
    checkpoint = train.get_checkpoint()
    with nullcontext() if checkpoint is None else checkpoint.as_directory() as directory:
        if mapper is None and directory is not None:
            mapper = FeatureMapper.load(directory)
        elif mapper is None:
            mapper = initial_mapper(config.mapper, config.optimisation.seed, prompts, model)
        mapper.metadata = replace(
            mapper.metadata,
            language_model_fingerprint=language_model_fingerprint(language_model.name),
            image_encoder_fingerprint=fingerprint or mapper.metadata.image_encoder_fingerprint,
            details={},
        )
        trainer = MapperTrainer(mapper, model, prompts, config.optimisation, rank=rank, world_size=world_size)
        if directory is not None:
            trainer.load(Path(directory))
    validation = None
    if config.dev is not None and config.validation.num_mentions:
        validation = Validation(config, artifacts, model, _examples("dev"), rank, world_size)
    shows_bar = rank == 0 and settings["shows_bar"]
    _loop(config, trainer, validation, is_first=rank == 0, is_new=checkpoint is None, shows_bar=shows_bar)


def _examples(split: str) -> list[TrainingExample]:
    with own_errors():
        return read_examples(train.get_dataset_shard(split).iter_batches(batch_size=None, batch_format="pyarrow"))


def _loop(
    config: TrainConfig,
    trainer: MapperTrainer,
    validation: Validation | None,
    *,
    is_first: bool,
    is_new: bool,
    shows_bar: bool,
) -> None:
    """Take steps, and report as configured; the starting mapper is validated as step 0."""
    progress = tqdm_ray.tqdm(total=trainer.num_steps, desc="train", unit="step") if shows_bar else None
    if progress is not None:
        progress.update(trainer.step)
    validate_every = config.validation.every_steps or trainer.steps_per_epoch
    if is_new:
        _report(trainer, {"step": 0} | _accuracy(validation, trainer), with_checkpoint=is_first)
    started, results = time.monotonic(), []
    while trainer.step < trainer.num_steps:
        results.append(trainer.train_step())
        if progress is not None:
            progress.update(1)
        step, is_last = trainer.step, trainer.step == trainer.num_steps
        is_validated = is_last or step % validate_every == 0
        is_saved = is_validated or step % config.workers.checkpoint_every == 0
        if not is_saved and step % config.workers.report_every:
            continue
        seconds = time.monotonic() - started
        metrics = {
            "step": step,
            "epoch": step / trainer.steps_per_epoch,
            "loss": mean(result.loss for result in results),
            "learning_rate": results[-1].learning_rate,
            "gradient_norm": mean(result.gradient_norm for result in results),
            "mentions_per_s": sum(result.num_mentions for result in results) / seconds,
            "tokens_per_s_of_worker": sum(result.num_tokens for result in results) / seconds,
        }
        if is_validated:
            metrics |= _accuracy(validation, trainer)
        _report(trainer, metrics, with_checkpoint=is_saved and is_first)
        started, results = time.monotonic(), []
    if progress is not None:
        progress.close()


def _report(trainer: MapperTrainer, metrics: dict[str, Any], *, with_checkpoint: bool) -> None:
    """Report to Ray Train, which waits for all workers."""
    metrics = metrics | {SCORE: metrics.get(ACCURACY, -1.0)}
    if not with_checkpoint:
        train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as directory:
        trainer.save(Path(directory))
        train.report(metrics, checkpoint=Checkpoint.from_directory(directory))


def _accuracy(validation: Validation | None, trainer: MapperTrainer) -> dict[str, float]:
    return {} if validation is None else {ACCURACY: validation.accuracy(trainer.mapper)}

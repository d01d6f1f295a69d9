"""Trains the feature mapper through the frozen language model, on any number of equal workers.

Every worker holds all prepared mentions, derives the whole order of the run from its seed, and
computes its share of each batch. The loss of a step is the sum over the label tokens of *all*
workers, divided by the number of these tokens: a run has the same loss curve on one worker and on
several, and may continue from a checkpoint with another number of workers.

Shapes: C vision width, P prefix length, D language-model width, M pictures, L labels.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gemel_engine.config.settings import MapperSettings, OptimisationSettings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evidence.retrieved import PromptItem
from gemel_engine.storage.local import open_regular
from gemel_engine.storage.manifest import file_sha256, read_manifest, write_manifest
from gemel_engine.training.attention import PackedLanguageModel
from gemel_engine.training.packing import pack_prompts, split_into_packs
from gemel_engine.training.prompts import TrainingPrompts
from gemel_engine.vision.mapper import MANIFEST, FeatureMapper

FORMAT_VERSION = 3
_STATE = "training.json"
_OPTIMISER = "optimiser.safetensors"
_PARTS = (_OPTIMISER, MANIFEST)
_PICTURES_PER_BATCH = 1024  # whose names' embeddings are in memory


def initial_mapper(
    settings: MapperSettings, seed: int, prompts: TrainingPrompts, model: PackedLanguageModel
) -> FeatureMapper:
    """Return the mapper before its first step: random, or fitted to pictures in closed form.

    In closed form, the target for a picture is the embeddings of the first P tokens of its entity's
    name; a shorter name is repeated.

    Args:
        settings: Size and initialisation of the mapper.
        seed: Seed of a random start.
        prompts: Prompts of all training examples.
        model: Language model, for its embeddings.

    Raises:
        InputError: No example has a picture.
    """
    numbers = [number for number, example in enumerate(prompts.examples) if example.features is not None]
    if not numbers:
        raise InputError("no training mention has a usable picture: there is nothing to train the feature mapper on")
    features = prompts.features(numbers)
    mapper = FeatureMapper.random(
        features.shape[1], settings.prefix_length, model.width, seed, scaling=settings.scaling
    )
    mapper.fit_scaling(features)
    if settings.initialisation == "ridge":
        tokens = [list(islice(cycle(prompts.name_tokens(number)), settings.prefix_length)) for number in numbers]
        batches = (tokens[i : i + _PICTURES_PER_BATCH] for i in range(0, len(tokens), _PICTURES_PER_BATCH))
        embeddings = (model.embed_tokens(torch.tensor(batch)).float().cpu() for batch in batches)
        mapper.fit_ridge(features, embeddings, settings.ridge_penalty, settings.ridge_gain)
    return mapper


@dataclass(frozen=True, slots=True)
class StepReport:
    """Result of a step.

    Attributes:
        loss: Mean cross-entropy of the label tokens of all workers, in nats.
        learning_rate: Learning rate of this step.
        gradient_norm: Norm of the gradient before clipping.
        num_mentions: Number of mentions in the batch, over all workers.
        num_tokens: Number of positions that this worker computed.
    """

    loss: float
    learning_rate: float
    gradient_norm: float
    num_mentions: int
    num_tokens: int


class MapperTrainer:
    """Takes the gradient steps of one worker.

    Args:
        mapper: Mapper to train, in place.
        model: Frozen language model, on the device where the mapper is to be trained.
        prompts: Prompts of all training examples.
        settings: Optimiser and schedule.
        rank: Number of this worker.
        world_size: Number of workers; more than one need an initialised process group.

    Attributes:
        step: Number of steps taken.
        num_steps: Number of steps of the whole run.
        steps_per_epoch: Number of steps of one pass over the examples.
    """

    def __init__(
        self,
        mapper: FeatureMapper,
        model: PackedLanguageModel,
        prompts: TrainingPrompts,
        settings: OptimisationSettings,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.mapper = mapper.to(model.device)
        self._model = model
        self._prompts = prompts
        self._settings = settings
        self._rank, self._world_size = rank, world_size
        self._module: nn.Module = self.mapper
        if world_size > 1:
            self._module = DistributedDataParallel(self.mapper, broadcast_buffers=False)
        decayed = [parameter for name, parameter in self.mapper.named_parameters() if name.endswith("weight")]
        others = [parameter for name, parameter in self.mapper.named_parameters() if not name.endswith("weight")]
        self._optimiser = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            eps=settings.adam_epsilon,
        )
        self._started_trained = mapper.metadata.trained
        self.step = 0
        self.steps_per_epoch = math.ceil(len(prompts.examples) / settings.batch_size)
        self.num_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps is not None:
            self.num_steps = min(self.num_steps, settings.max_steps)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def train_step(self) -> StepReport:
        """Take the next step, on this worker's share of the batch."""
        batch = self._batch()
        share = [batch[i] for i in range(*self._bounds(len(batch)))]
        num_labels = sum(len(self._prompts.target(number)) for number in batch)
        learning_rate = self._learning_rate()
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._optimiser.zero_grad()
        loss, num_tokens = self._backward(share, num_labels)
        gradient_norm = nn.utils.clip_grad_norm_(
            self.mapper.parameters(), self._settings.max_gradient_norm, error_if_nonfinite=True
        )
        self._optimiser.step()
        self.step += 1
        if self._world_size > 1:
            distributed.all_reduce(loss)
        return StepReport(loss.item(), learning_rate, gradient_norm.item(), len(batch), num_tokens)

    def save(self, directory: Path) -> None:
        """Write a checkpoint: the mapper, the optimiser's state, and last `training.json`."""
        self.mapper.metadata = replace(self.mapper.metadata, trained=self._started_trained or self.step > 0)
        self.mapper.save(directory)
        state = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.mapper.named_parameters()
            for key, value in self._optimiser.state.get(parameter, {}).items()
        }
        save_file(state, directory / _OPTIMISER)
        checksums = {name: file_sha256(directory / name) for name in _PARTS}
        contents = {"step": self.step, "settings": self._trajectory(), "sha256": checksums}
        write_manifest(directory / _STATE, FORMAT_VERSION, contents)

    def load(self, directory: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ArtifactError: It is damaged.
            ConfigurationError: It belongs to a run with another optimiser, schedule or mapper.
        """
        manifest = read_manifest(directory / _STATE, FORMAT_VERSION)
        mapper = FeatureMapper.load(directory)
        ours = replace(self.mapper.metadata, trained=mapper.metadata.trained)
        if manifest.get("settings") != self._trajectory() or mapper.metadata != ours:
            raise ConfigurationError(f"the checkpoint {directory} is of another run: choose another output")
        step = manifest.get("step")
        if not isinstance(step, int) or not 0 <= step <= self.num_steps:
            raise ArtifactError(f"{directory / _STATE} gives the step {step!r}: go back to an earlier checkpoint")
        checksums = manifest.get("sha256")
        if not isinstance(checksums, dict) or checksums.keys() != set(_PARTS):
            raise ArtifactError(
                f"{directory / _STATE} gives the checksums {checksums!r}, not those of {' and '.join(_PARTS)}: "
                "go back to an earlier checkpoint"
            )
        try:
            if any(file_sha256(directory / name) != checksum for name, checksum in checksums.items()):
                raise ArtifactError(f"the files in {directory} are of two checkpoints: go back to an earlier one")
            with open_regular(directory / _OPTIMISER) as file:
                state = load(file.read())
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{directory / _OPTIMISER} cannot be read ({error}): go back to an earlier checkpoint"
            ) from error
        self.mapper.load_state_dict(mapper.state_dict())
        self.mapper.metadata = mapper.metadata
        self.step = step
        for name, parameter in self.mapper.named_parameters():
            found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            if (self.step or found) and not _is_state_of(parameter, found):
                raise ArtifactError(
                    f"{directory / _OPTIMISER} has no state of {name}: go back to an earlier checkpoint"
                )
            on_device = {key: value if key == "step" else value.to(parameter.device) for key, value in found.items()}
            if on_device:
                self._optimiser.state[parameter] = on_device

    def _trajectory(self) -> dict[str, Any]:
        """Return the settings that a continuation must share; the size of packs may change."""
        return {name: value for name, value in asdict(self._settings).items() if name != "max_pack_tokens"}

    def _backward(self, share: Sequence[int], num_labels: int) -> tuple[Tensor, int]:
        """Accumulate the gradients of a share; return its part of the loss, and its positions."""
        prompts = self._prompts
        labelled = sorted((prompts[number] for number in share), key=lambda prompt: prompt.demonstrations)
        limit, length = self._settings.max_pack_tokens, prompts.prefix_length
        packs = list(split_into_packs(labelled, prompts.demonstration, length, limit - len(prompts.builder.beginning)))
        loss, num_tokens = torch.zeros((), device=self._model.device), 0
        for number, pack in enumerate(packs):
            packed = pack_prompts(pack, prompts.demonstration, length, prompts.builder.beginning)
            is_last = number == len(packs) - 1
            with nullcontext() if is_last else self._no_sync():
                prefixes = self._module(self._features(packed.pictures.tolist()))
                # The zero term gives a pack without a picture a gradient, too.
                part = self._model.label_losses(packed, prefixes).sum() / num_labels + 0 * prefixes.sum()
                # Workers' gradients are averaged, and the loss is a sum over workers.
                (part * self._world_size).backward()
            loss += part.detach()
            num_tokens += len(packed.token_ids)
        if not packs:  # the other workers wait for this one's gradient
            (0 * self._module(self._features([])).sum()).backward()
        return loss, num_tokens

    def _features(self, pictures: list[int]) -> Tensor:
        if not pictures:
            return torch.zeros(0, self.mapper.metadata.vision_width)
        return self._prompts.features(pictures)

    def _no_sync(self) -> AbstractContextManager[None]:
        return self._module.no_sync() if isinstance(self._module, DistributedDataParallel) else nullcontext()

    def _batch(self) -> list[int]:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                epoch_order(
                    [self._prompts.beginning(number) for number in range(len(self._prompts.examples))],
                    self._settings.mentions_per_form,
                    f"{self._settings.seed} {epoch}",
                ),
            )
        start = position * self._settings.batch_size
        return self._epoch[1][start : start + self._settings.batch_size]

    def _bounds(self, size: int) -> tuple[int, int]:
        return self._rank * size // self._world_size, (self._rank + 1) * size // self._world_size

    def _learning_rate(self) -> float:
        """Return the rate of this step: a linear rise over the warm-up, then a linear fall to 0."""
        num_warmup = math.ceil(self._settings.warmup_fraction * self.num_steps)
        if self.step < num_warmup:
            return self._settings.learning_rate * (self.step + 1) / num_warmup
        return self._settings.learning_rate * (self.num_steps - self.step) / max(1, self.num_steps - num_warmup)


def _is_state_of(parameter: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Return whether this is AdamW's state of a parameter."""
    shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return {name: tensor.shape for name, tensor in state.items()} == shapes and all(
        tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()) for tensor in state.values()
    )


def epoch_order(
    beginnings: Sequence[tuple[str, tuple[PromptItem, ...]]], mentions_per_form: int, seed: str
) -> list[int]:
    """Return a random order of all mentions, with runs of mentions of one surface form.

    Mentions of a form with the same demonstrations are neighbours: where groups are left out, a
    form has several lists of demonstrations.

    Args:
        beginnings: `TrainingPrompts.beginning` of each mention.
        mentions_per_form: Largest number of mentions in a run.
        seed: Seed of the order.
    """
    generator = random.Random(seed)
    numbers_of_form: dict[str, list[int]] = defaultdict(list)
    for number, (form, _) in enumerate(beginnings):
        numbers_of_form[form].append(number)
    chunks = []
    for numbers in numbers_of_form.values():
        generator.shuffle(numbers)
        numbers.sort(key=lambda number: beginnings[number])
        chunks += [numbers[i : i + mentions_per_form] for i in range(0, len(numbers), mentions_per_form)]
    generator.shuffle(chunks)
    return [number for chunk in chunks for number in chunk]

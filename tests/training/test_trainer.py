"""Steps of mapper training on tiny real models: what changes, what must not, and that it can be interrupted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from support.models import save_tiny_model
from support.names import ENTITY_NAMES
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedTokenizerFast

from gemel_engine.config.components import PromptSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import MapperSettings, OptimisationSettings, TrainConfig
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.errors import ArtifactError, ConfigurationError
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.storage.manifest import read_manifest, write_manifest
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.training import prompts as prompts_module
from gemel_engine.training.attention import PackedLanguageModel
from gemel_engine.training.packing import SegmentKey
from gemel_engine.training.prompts import TrainingExample, TrainingPrompts
from gemel_engine.training.trainer import FORMAT_VERSION, MapperTrainer, epoch_order, initial_mapper
from gemel_engine.types import Mention
from gemel_engine.vision.mapper import FeatureMapper

C = 64
PROMPT = PromptSettings(max_prompt_tokens=600, query_reserve=200)
SETTINGS = OptimisationSettings(epochs=4, batch_size=4, mentions_per_form=2, learning_rate=1e-2)


def make_prompts(
    artifacts: dict[str, Path], prompt: PromptSettings = PROMPT, prefix_length: int = 2
) -> TrainingPrompts:
    """Fourteen mentions of seven surface forms; every third has no picture."""
    generator = np.random.default_rng(3)
    examples = [
        TrainingExample(
            Mention(f"m{n}", f"They saw the {ENTITY_NAMES[n // 2]} again.", ENTITY_NAMES[n // 2]),
            f"Q{n // 2}",
            generator.normal(size=C).astype(np.float32) if n % 3 else None,
            Retrieved(tuple(PromptItem(row) for row in (n // 2 + 7, n // 2 + 8, n // 2 + 9 + n % 2))),
        )
        for n in range(14)
    ]
    opened = Artifacts(
        load_tokenizer(str(artifacts["language_model"])),
        KnowledgeBase.open(artifacts["knowledge_base"]),
        DemonstrationIndex.open(artifacts["demonstrations"]),
        None,
    )
    return TrainingPrompts(examples, opened, prompt, prefix_length)


def test_the_closed_form_writes_a_short_name_over_and_over(artifacts: dict[str, Path]) -> None:
    prefix_length = 40
    prompts = make_prompts(artifacts, prefix_length=prefix_length)
    model = PackedLanguageModel(str(artifacts["language_model"]))
    settings = MapperSettings(prefix_length=prefix_length, initialisation="ridge", ridge_penalty=1e-6)
    mapper = initial_mapper(settings, 0, prompts, model)
    assert mapper.metadata.origin == "ridge"
    name = prompts.name_tokens(1)
    assert len(name) < prefix_length
    expected = model.embed_tokens(torch.tensor((name * prefix_length)[:prefix_length]))
    # With fewer pictures than features the regression passes through every one.
    torch.testing.assert_close(mapper(prompts.features([1]))[0], expected, atol=1e-3, rtol=1e-3)


def make_trainer(
    artifacts: dict[str, Path],
    settings: OptimisationSettings = SETTINGS,
    *,
    rank: int = 0,
    world_size: int = 1,
    activation_checkpointing: bool = False,
    device: str = "cpu",
) -> tuple[MapperTrainer, PackedLanguageModel]:
    model = PackedLanguageModel(
        str(artifacts["language_model"]), device=device, activation_checkpointing=activation_checkpointing
    )
    prompts = make_prompts(artifacts)
    mapper = initial_mapper(MapperSettings(prefix_length=2, scaling="z_score"), settings.seed, prompts, model)
    return MapperTrainer(mapper, model, prompts, settings, rank=rank, world_size=world_size), model


def losses(trainer: MapperTrainer, num_steps: int) -> list[float]:
    return [trainer.train_step().loss for _ in range(num_steps)]


def weights(trainer: MapperTrainer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in trainer.mapper.parameters()]


@pytest.mark.gpu
def test_only_the_mapper_changes_and_learns(artifacts: dict[str, Path], device: str) -> None:
    trainer, model = make_trainer(artifacts, replace(SETTINGS, epochs=10), device=device)
    frozen = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    before = weights(trainer)
    curve = losses(trainer, trainer.num_steps)
    assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.3
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(artifacts: dict[str, Path], tmp_path: Path) -> None:
    whole, _ = make_trainer(artifacts)
    curve = losses(whole, 9)
    first, _ = make_trainer(artifacts)
    losses(first, 5)
    first.save(tmp_path)
    second, _ = make_trainer(artifacts)
    second.load(tmp_path)
    assert second.step == 5
    assert losses(second, 4) == curve[5:]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_a_run_goes_on_with_smaller_packs(artifacts: dict[str, Path], tmp_path: Path) -> None:
    first, _ = make_trainer(artifacts)
    losses(first, 2)
    first.save(tmp_path)
    second, _ = make_trainer(artifacts, replace(SETTINGS, max_pack_tokens=60))
    second.load(tmp_path)
    assert losses(second, 2) == pytest.approx(losses(first, 2), abs=1e-4)


def test_a_checkpoint_of_another_run_is_refused(artifacts: dict[str, Path], tmp_path: Path) -> None:
    trainer, _ = make_trainer(artifacts)
    trainer.save(tmp_path)
    other, _ = make_trainer(artifacts, replace(SETTINGS, learning_rate=1e-4))
    with pytest.raises(ConfigurationError, match="is of another run"):
        other.load(tmp_path)


@pytest.mark.parametrize("checksums", [None, [], {}, {"optimiser.safetensors": "0"}])
def test_a_checkpoint_without_the_checksums_of_its_files_is_refused(
    artifacts: dict[str, Path], tmp_path: Path, checksums: object
) -> None:
    trainer, _ = make_trainer(artifacts)
    trainer.save(tmp_path)
    manifest = read_manifest(tmp_path / "training.json", FORMAT_VERSION)
    write_manifest(tmp_path / "training.json", FORMAT_VERSION, manifest | {"sha256": checksums})
    with pytest.raises(ArtifactError, match=r"training.json gives the checksums .*: go back to an earlier checkpoint"):
        trainer.load(tmp_path)


def test_a_run_of_a_ridge_start_goes_on_without_another_regression(artifacts: dict[str, Path], tmp_path: Path) -> None:
    model, prompts = PackedLanguageModel(str(artifacts["language_model"])), make_prompts(artifacts)
    settings = MapperSettings(prefix_length=2, scaling="z_score", initialisation="ridge")
    first = MapperTrainer(initial_mapper(settings, 0, prompts, model), model, prompts, SETTINGS)
    losses(first, 2)
    first.save(tmp_path)
    second = MapperTrainer(FeatureMapper.load(tmp_path), model, prompts, SETTINGS)
    second.load(tmp_path)
    assert losses(second, 2) == losses(first, 2)
    assert second.mapper.metadata == replace(first.mapper.metadata, trained=True)


def test_few_demonstrations_are_held_in_memory(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "_CACHED_DEMONSTRATIONS", 2)
    prompts = make_prompts(artifacts)
    first, second, third = (SegmentKey(row, False, "") for row in (7, 8, 9))
    kept = prompts.demonstration(first)
    assert prompts.demonstration(first) is kept
    assert prompts.demonstration(second) != prompts.demonstration(third)
    again = prompts.demonstration(first)
    assert again is not kept
    assert again == kept


def test_neither_packs_nor_activation_checkpointing_change_a_step(artifacts: dict[str, Path]) -> None:
    plain, _ = make_trainer(artifacts)
    expected = losses(plain, 6)
    packed, _ = make_trainer(artifacts, replace(SETTINGS, max_pack_tokens=90))
    recomputed, _ = make_trainer(artifacts, activation_checkpointing=True)
    for trainer in (packed, recomputed):
        assert losses(trainer, 6) == pytest.approx(expected, abs=1e-4)
        for a, b in zip(weights(plain), weights(trainer), strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_a_step_without_any_picture_changes_nothing(artifacts: dict[str, Path]) -> None:
    trainer, _ = make_trainer(artifacts, replace(SETTINGS, batch_size=1, weight_decay=0.0))
    before = weights(trainer)
    trainer._prompts.examples = [
        replace(example, features=None, retrieved=Retrieved()) for example in trainer._prompts.examples
    ]
    assert trainer.train_step().gradient_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))


def run_worker(rank: int, artifacts: dict[str, Path], output: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{output}.rendezvous", rank=rank, world_size=3)
    # Small packs, so that workers make several passes for a gradient, and not equally many.
    trainer, _ = make_trainer(artifacts, replace(SETTINGS, max_pack_tokens=60), rank=rank, world_size=3)
    curve = losses(trainer, 8)
    if rank == 0:
        torch.save([torch.tensor(curve), *weights(trainer)], output)
    del trainer  # were its reducer the last to hold the group, it would wait for the group's threads with Python's lock
    distributed.destroy_process_group()


def test_three_workers_have_the_loss_curve_of_one(artifacts: dict[str, Path], tmp_path: Path) -> None:
    # The last batch of an epoch has two mentions: a worker goes without.
    spawn(run_worker, (artifacts, tmp_path / "three.pt"), nprocs=3)  # type: ignore[no-untyped-call]
    curve, *found = torch.load(tmp_path / "three.pt", weights_only=True)
    alone, _ = make_trainer(artifacts)
    assert curve.tolist() == pytest.approx(losses(alone, 8), abs=1e-4)
    for a, b in zip(weights(alone), found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def test_an_epoch_has_every_mention_once_and_keeps_surface_forms_together() -> None:
    forms = ["a"] * 5 + ["b"] * 3 + ["c"] + ["d"] * 4
    beginnings = [(form, (PromptItem(number % 2),)) for number, form in enumerate(forms)]
    order = epoch_order(beginnings, 3, "0 0")
    assert sorted(order) == list(range(len(forms)))
    assert num_runs([forms[number] for number in order]) <= 6
    assert num_runs([str(beginnings[number]) for number in order]) <= 9  # three chunks hold two lists
    assert order == epoch_order(beginnings, 3, "0 0")
    assert order != epoch_order(beginnings, 3, "0 1")


def num_runs(values: Sequence[str]) -> int:
    return 1 + sum(a != b for a, b in pairwise(values))


def test_the_learning_rate_rises_and_falls_linearly(artifacts: dict[str, Path]) -> None:
    trainer, _ = make_trainer(artifacts, replace(SETTINGS, epochs=2, warmup_fraction=0.25))
    rates = [trainer.train_step().learning_rate for _ in range(trainer.num_steps)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01 * 5 / 6, 0.01 * 4 / 6, 0.01 * 3 / 6, 0.01 * 2 / 6, 0.01 / 6])


@pytest.mark.parametrize("path", sorted(Path("jobs/configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_committed_configuration_makes_a_step(
    path: Path, artifacts: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = load_config(TrainConfig, path)
    family = {"facebook/opt-6.7b": "opt", "Qwen/Qwen3-8B-Base": "qwen3"}.get(config.language_model.name, "llama")
    model = PackedLanguageModel(
        str(save_tiny_model(family, tokenizer, tmp_path)),
        config.language_model.dtype,
        activation_checkpointing=config.language_model.activation_checkpointing,
    )
    prompts = make_prompts(artifacts, config.prompt, config.mapper.prefix_length)
    mapper = initial_mapper(config.mapper, config.optimisation.seed, prompts, model)
    report = MapperTrainer(mapper, model, prompts, config.optimisation).train_step()
    assert math.isfinite(report.loss)
    assert report.gradient_norm > 0
    if config.vision.pretrained is not None:
        assert open_clip.get_pretrained_cfg(config.vision.image_encoder, config.vision.pretrained)

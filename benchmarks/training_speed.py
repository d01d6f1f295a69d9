"""Mapper training against a plain loop, side by side in one process, and against what the machine could do at most.

python benchmarks/training_speed.py [--num-mentions 64]

The plain loop is written as the paper's code is: one whole prompt at a time, logits of every token, a step after 16
prompts. Both train the emoji mapper on the same mentions; rounds alternate, and the medians are compared. A third loop
is ours with PyTorch's kernel in the place of its own attention. The limit is 4·N·T floating-point operations (N
parameters in matrix products, T positions; forward, and backward to activations) at the rate of a matrix product in the
model's type, measured between the rounds.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from record import record
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gemel_engine.artifacts import Artifacts, open_artifacts
from gemel_engine.config import TrainConfig, load_config
from gemel_engine.linker import DemonstrationRetriever
from gemel_engine.mapper_training import MapperTrainer, TrainingExample, TrainingPrompts, epoch_order, initial_mapper
from gemel_engine.model import FrozenLanguageModel
from gemel_engine.packing import LabelledPrompt, pack_prompts
from gemel_engine.types import Mention

RESULTS = Path("benchmarks/results/training_speed.json")
ACCUMULATION = 16

logger = logging.getLogger("training_speed")


def main(*, num_mentions: int = 64, num_rounds: int = 3) -> None:
    """Measure and write the results.

    Args:
        num_mentions: Mentions of a round: the first of an epoch.
        num_rounds: Rounds of either loop.
    """
    config = load_config(TrainConfig, Path("jobs/configs/emoji.toml"))
    artifacts = open_artifacts(config)
    model = FrozenLanguageModel(config.language_model.name, config.language_model.dtype)
    examples = training_examples(config, artifacts)
    layout = config.prompt, config.mapper.prefix_length, config.retrieval.num_demonstrations
    everything = TrainingPrompts(examples, artifacts, *layout)
    beginnings = [everything.beginning(number) for number in range(len(examples))]
    order = epoch_order(beginnings, config.optimisation.mentions_per_form, "0 0")
    prompts = TrainingPrompts([examples[number] for number in order[:num_mentions]], artifacts, *layout)
    mapper = initial_mapper(config.mapper, 0, prompts, model)
    settings = replace(config.optimisation, epochs=1000)
    trainer = MapperTrainer(mapper, model, prompts, settings)
    plain, ours, with_kernel, rates, num_ours = [], [], [], [], 0
    for _ in range(num_rounds):
        rates.append(matmul_rate(model.module.dtype))
        plain.append(timed(lambda: plain_epoch(model, mapper, prompts)))
        rates.append(matmul_rate(model.module.dtype))
        started = time.perf_counter()
        num_ours = epoch(trainer)
        ours.append(time.perf_counter() - started)
        with patch("gemel_engine.model.attention_by_products", sdpa_attention_forward):
            with_kernel.append(timed(lambda: epoch(trainer)))
        seconds = plain[-1], ours[-1], with_kernel[-1]
        logger.info("plain %.1f s, ours %.1f s, with PyTorch's kernel %.1f s, %.0f GFLOP/s", *seconds, rates[-1] / 1e9)
    num_plain = sum(
        len(pack_prompts([prompts[n]], prompts.demonstration, prompts.prefix_length).token_ids)
        for n in range(num_mentions)
    )
    parameters = matrix_parameters(model)
    limit = 4 * parameters * num_ours / statistics.median(rates)
    value = {
        "plain_mentions_per_s": num_mentions / statistics.median(plain),
        "mentions_per_s": num_mentions / statistics.median(ours),
        "ratio": statistics.median(plain) / statistics.median(ours),
        "ratio_to_pytorchs_kernel": statistics.median(with_kernel) / statistics.median(ours),
        "plain_tokens_per_s": num_plain / statistics.median(plain),
        "tokens_per_s": num_ours / statistics.median(ours),
        "tokens_of_plain_loop": num_plain,
        "tokens": num_ours,
        "matmul_gflops": statistics.median(rates) / 1e9,
        "share_of_matmul_limit": limit / statistics.median(ours),
        "plain_share_of_matmul_limit": 4 * parameters * num_plain / statistics.median(rates) / statistics.median(plain),
        "profile": step_profile(trainer),
    }
    command = f"python benchmarks/training_speed.py --num-mentions {num_mentions} --num-rounds {num_rounds}"
    what = (
        f"SmolLM2-135M {config.language_model.dtype}, {config.retrieval.num_demonstrations} demonstrations with "
        f"pictures, batch {settings.batch_size}"
    )
    result = record(value, command, what)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(value, indent=2))


def epoch(trainer: MapperTrainer) -> int:
    """One pass over the mentions; how many positions it computed."""
    return sum(trainer.train_step().num_tokens for _ in range(trainer.steps_per_epoch))


def training_examples(config: TrainConfig, artifacts: Artifacts) -> list[TrainingExample]:
    """The training split, all of which is in the index of the demonstrations, pictures included."""
    index = artifacts.index
    assert index is not None, "the emoji configuration has demonstrations"
    items = [index[row] for row in range(len(index))]
    mentions = [Mention(item.mention_id, item.text, item.mention, group=item.group) for item in items]
    retriever = DemonstrationRetriever(replace(config.retrieval, exclude_group=True), index)
    return [
        TrainingExample(mention, item.entity_id, item.features, tuple(rows))
        for mention, item, rows in zip(
            mentions, items, retriever.retrieve(mentions, [item.features for item in items]), strict=True
        )
    ]


def plain_epoch(model: FrozenLanguageModel, mapper: nn.Module, prompts: TrainingPrompts) -> None:
    """One pass as the paper's code makes it."""
    optimiser = torch.optim.AdamW(mapper.parameters(), lr=0.0)
    for number in range(len(prompts.examples)):
        loss = plain_loss(model, mapper, prompts, prompts[number]) / ACCUMULATION
        loss.backward()  # type: ignore[no-untyped-call]
        if (number + 1) % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(mapper.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()


def plain_loss(
    model: FrozenLanguageModel, mapper: nn.Module, prompts: TrainingPrompts, prompt: LabelledPrompt
) -> torch.Tensor:
    """Loss of one prompt, all of whose logits are computed."""
    parts = []
    for segment in (*map(prompts.demonstration, prompt.demonstrations), prompt.question):
        if segment.picture is not None:
            parts.append(mapper(prompts.features([segment.picture]))[0])
        parts.append(model.embed_tokens(torch.tensor(segment.token_ids)))
    parts.append(model.embed_tokens(torch.tensor(prompt.target)))
    embeddings = torch.cat(parts).to(model.module.dtype)
    labels = torch.full((len(embeddings),), -100)
    labels[-len(prompt.target) :] = torch.tensor(prompt.target)
    logits = model.module(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].float(), labels[1:])


def timed(run: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of the matrix products of a layer."""
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    for _ in range(20):
        a @ b
    seconds = min(timed(lambda: [a @ b for _ in range(50)]) for _ in range(3))
    return 50 * 2 * 1024 * 576 * 1536 / seconds


def matrix_parameters(model: FrozenLanguageModel) -> int:
    """Parameters that every token is multiplied by: those of linear layers but the one that makes logits."""
    head = model.module.get_output_embeddings()
    return sum(
        layer.weight.numel() for layer in model.module.modules() if isinstance(layer, nn.Linear) and layer is not head
    )


def step_profile(trainer: MapperTrainer) -> dict[str, float]:
    """Share of a step's time in each kind of operation."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        trainer.train_step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind(event.key)] += event.self_cpu_time_total
    return {name: round(share / times.total(), 4) for name, share in times.most_common()}


def kind(operation: str) -> str:
    """Group of an operation of torch."""
    groups = {
        "attention": ("attention", "flash", "bmm", "Bmm", "_softmax", "Softmax"),
        "matrix products": ("mm", "addmm", "linear"),
        "copies and layout": ("copy", "cat", "index", "clone", "empty", "fill", "zero", "select", "slice"),
        "optimiser": ("Optimizer", "adam"),
    }
    for name, parts in groups.items():
        if any(part in operation for part in parts):
            return name
    return "elementwise and the rest"


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

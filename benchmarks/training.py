"""Mapper training against a plain loop, side by side in one process, and against what the machine could do at most.

    THP_MEM_ALLOC_ENABLE=1 python -m benchmarks.training [--num-mentions 64] [--cases emoji]

An hour or two on two cores. Needs the models and indexes of `make demo`. The plain loop is written as the paper's code
is: one whole prompt at a time, logits of every token, a step after 16 prompts. Both train the emoji mapper on the same
mentions, others in each round; their turns alternate, and the medians are compared. A third loop is ours with PyTorch's
kernel in the place of its own attention. The limit is 4·N·T floating-point operations (N parameters in matrix products,
T positions; forward, and backward to activations) at the rate of a matrix product in the model's type, measured between
the rounds. Prompts are those of the emoji configuration, and such as the paper has them, of 16 demonstrations. The
variable is what training workers set for themselves. Figures go to `benchmarks/results/training_speed.json`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.corpora import retriever
from benchmarks.record import ResultFile, run
from gemel_engine.assembly import open_artifacts
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import TrainConfig
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.training.attention import PackedLanguageModel
from gemel_engine.training.packing import LabelledPrompt
from gemel_engine.training.prompts import TrainingExample, TrainingPrompts
from gemel_engine.training.trainer import MapperTrainer, epoch_order, initial_mapper
from gemel_engine.types import Mention

ACCUMULATION = 16
# Settings other than those of the emoji configuration.
CASES: dict[str, tuple[str, ...]] = {
    "emoji": (),
    "16_demonstrations": (
        *("--retrieval.num-demonstrations", "16", "--retrieval.num-similar-pictures", "0"),
        *("--optimisation.mentions-per-form", "8"),
    ),
}

logger = logging.getLogger("benchmarks")


def main(*, num_mentions: int = 64, num_rounds: int = 3, cases: tuple[str, ...] = tuple(CASES)) -> None:
    """Measure and write the results.

    Args:
        num_mentions: Mentions of a round.
        num_rounds: Rounds of each loop.
        cases: Which prompts.
    """
    results = ResultFile("training_speed", variables=["THP_MEM_ALLOC_ENABLE"])
    for case in cases:
        config = load_config(TrainConfig, Path("jobs/configs/emoji.toml"), CASES[case])
        value = measure(config, num_mentions, num_rounds)
        what = (
            f"SmolLM2-135M {config.language_model.dtype}, {config.retrieval.num_demonstrations} demonstrations with "
            f"pictures, up to {config.optimisation.mentions_per_form} mentions of a form together, "
            f"batch {config.optimisation.batch_size}"
        )
        results.note({case: value}, what)


def measure(config: TrainConfig, num_mentions: int, num_rounds: int) -> dict[str, Any]:
    """Rates of the loops, and the share that each reaches of the machine's limit."""
    artifacts = open_artifacts(config)
    model = PackedLanguageModel(config.language_model.name, config.language_model.dtype)
    examples = training_examples(config, artifacts)
    layout = config.prompt, config.mapper.prefix_length
    everything = TrainingPrompts(examples, artifacts, *layout)
    beginnings = [everything.beginning(number) for number in range(len(examples))]
    order = epoch_order(beginnings, config.optimisation.mentions_per_form, "0 0")
    mapper = initial_mapper(config.mapper, 0, everything, model)
    settings = replace(config.optimisation, epochs=1000)
    batches = [order[number * num_mentions : (number + 1) * num_mentions] for number in range(num_rounds + 1)]
    prompts = [TrainingPrompts([examples[number] for number in batch], artifacts, *layout) for batch in batches]
    trainers = [MapperTrainer(mapper, model, of_round, settings) for of_round in prompts]
    rounds = [run_round(*of_round, model, mapper) for of_round in zip(trainers, prompts, strict=True)]
    del rounds[0]  # it warms up
    limit = statistics.median(item.flops for item in rounds) / (4 * matrix_parameters(model))  # tokens a second
    tokens_per_s = statistics.median(item.num_tokens / item.seconds for item in rounds)
    plain_tokens_per_s = statistics.median(item.num_plain_tokens / item.plain_seconds for item in rounds)
    return {
        "plain_mentions_per_s": statistics.median(num_mentions / item.plain_seconds for item in rounds),
        "mentions_per_s": statistics.median(num_mentions / item.seconds for item in rounds),
        "ratio": statistics.median(item.plain_seconds / item.seconds for item in rounds),
        "ratios": sorted(item.plain_seconds / item.seconds for item in rounds),
        "ratio_to_pytorchs_kernel": statistics.median(item.kernel_seconds / item.seconds for item in rounds),
        "plain_tokens_per_s": plain_tokens_per_s,
        "tokens_per_s": tokens_per_s,
        "tokens_of_plain_loop": sum(item.num_plain_tokens for item in rounds),
        "tokens": sum(item.num_tokens for item in rounds),
        "matmul_gflops": statistics.median(item.flops for item in rounds) / 1e9,
        "share_of_matmul_limit": tokens_per_s / limit,
        "plain_share_of_matmul_limit": plain_tokens_per_s / limit,
        "profile": step_profile(trainers[-1]),
    }


@dataclass(frozen=True, slots=True)
class Round:
    """The loops on the same mentions.

    Attributes:
        plain_seconds: Of the plain loop.
        seconds: Of ours.
        kernel_seconds: Of ours with PyTorch's kernel.
        num_plain_tokens: Positions that the plain loop computed.
        num_tokens: Positions that ours computed.
        flops: Floating-point operations a second of a matrix product.
    """

    plain_seconds: float
    seconds: float
    kernel_seconds: float
    num_plain_tokens: int
    num_tokens: int
    flops: float


def run_round(trainer: MapperTrainer, prompts: TrainingPrompts, model: PackedLanguageModel, mapper: nn.Module) -> Round:
    """Take the times of the loops in turn."""
    plain_seconds, num_plain_tokens = timed(lambda: plain_epoch(model, mapper, prompts))
    flops = matmul_rate(model.module.dtype)
    seconds, num_tokens = timed(lambda: epoch(trainer))
    with patch("gemel_engine.training.attention.attention_by_products", sdpa_attention_forward):
        kernel_seconds, _ = timed(lambda: epoch(trainer))
    result = Round(plain_seconds, seconds, kernel_seconds, num_plain_tokens, num_tokens, flops)
    logger.info("%s", result)
    return result


def epoch(trainer: MapperTrainer) -> int:
    """One pass over the mentions; how many positions it computed."""
    return sum(trainer.train_step().num_tokens for _ in range(trainer.steps_per_epoch))


def training_examples(config: TrainConfig, artifacts: Artifacts) -> list[TrainingExample]:
    """The training split, all of which is in the index of the demonstrations, pictures included."""
    index = artifacts.index
    assert index is not None, "the emoji configuration has demonstrations"
    items = [index[row] for row in range(len(index))]
    mentions = [Mention(item.mention_id, item.text, item.mention, group=item.group) for item in items]
    settings = replace(config.retrieval, exclude_group=True)
    found = retriever(settings, artifacts).retrieve(mentions, [item.features for item in items])
    return [
        TrainingExample(mention, item.entity_id, item.features, of_mention)
        for mention, item, of_mention in zip(mentions, items, found, strict=True)
    ]


def plain_epoch(model: PackedLanguageModel, mapper: nn.Module, prompts: TrainingPrompts) -> int:
    """One pass as the paper's code makes it; how many positions it computed."""
    optimiser = torch.optim.AdamW(mapper.parameters(), lr=0.0)
    num_tokens = 0
    for number in range(len(prompts.examples)):
        embeddings, labels = plain_inputs(model, mapper, prompts, prompts[number])
        logits = model.module(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1].float(), labels[1:]) / ACCUMULATION
        loss.backward()  # type: ignore[no-untyped-call]
        num_tokens += len(labels)
        if (number + 1) % ACCUMULATION == 0:
            nn.utils.clip_grad_norm_(mapper.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return num_tokens


def plain_inputs(
    model: PackedLanguageModel, mapper: nn.Module, prompts: TrainingPrompts, prompt: LabelledPrompt
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (T, D) and labels (T,) of one whole prompt."""
    parts = []
    for segment in (*map(prompts.demonstration, prompt.demonstrations), prompt.question):
        if segment.picture is not None:
            parts.append(mapper(prompts.features([segment.picture]))[0])
        parts.append(model.embed_tokens(torch.tensor(segment.token_ids)))
    parts.append(model.embed_tokens(torch.tensor(prompt.target)))
    embeddings = torch.cat(parts).to(model.module.dtype)
    labels = torch.full((len(embeddings),), -100)
    labels[-len(prompt.target) :] = torch.tensor(prompt.target)
    return embeddings, labels


def timed(function: Callable[[], int]) -> tuple[float, int]:
    """Seconds that a call takes, and what it gives."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of the matrix products of a layer."""
    a, b = torch.randn(1024, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    for _ in range(20):
        a @ b
    seconds = min(timed(lambda: len([a @ b for _ in range(50)]))[0] for _ in range(3))
    return 50 * 2 * 1024 * 576 * 1536 / seconds


def matrix_parameters(model: PackedLanguageModel) -> int:
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
    run(main)

"""Ours and the others on the same mentions: time, certificates, accuracy, budgets."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.decoding.systems import WORK, Beams, Systems, timed
from gemel_engine.config.components import Objective
from gemel_engine.decoding.engines.base import Rollout, RolloutRequest
from gemel_engine.decoding.scheduler import run_searches
from gemel_engine.decoding.search import NameSearch

UNION = str(WORK / "union")  # made by the part "trie"
NUM_SLOW = 60
NUM_PAIRED = 200
NUM_SCORED = 200
BUDGETS = (1, 2, 4, 8, 16, 64)
NUM_WEIGHTS = 134_515_008 - 49_152 * 576  # of SmolLM2-135M, all but the embeddings, which a prompt's tokens don't meet

logger = logging.getLogger("benchmarks")


def systems(data: Path, num_mentions: int, num_rounds: int) -> dict[str, tuple[Any, str]]:
    """All systems in turn; of `NUM_SLOW` mentions the slow ones have a share in each round, and all in the end."""
    ours = Systems(data)
    beams = Beams(ours.config.language_model, ours.generator)
    mentions = ours.sample(num_mentions)
    prompts = ours.prompts(mentions)
    few = random.Random(0).sample(prompts, NUM_SLOW)
    seconds: dict[str, list[float]] = {"ours": [], "floor": [], "paper_loop": [], "best_transformers": []}
    rates = []
    floor, (cost, predictions) = ours.floor(prompts[:2]), ours.ours(mentions[:2])  # whatever happens only once
    for number in range(num_rounds):
        share = few[number::num_rounds]
        rates.append(matmul_gflops())
        floor, (cost, predictions) = ours.floor(prompts), ours.ours(mentions)
        seconds["floor"].append(floor.seconds / num_mentions)
        seconds["ours"].append(cost.seconds / num_mentions)
        seconds["best_transformers"].append(beams.best(share).seconds / len(share))
        seconds["paper_loop"].append(beams.paper_loop(share).seconds / len(share))
        logger.info("%s", {name: round(values[-1], 2) for name, values in seconds.items()})
    what = f"{num_mentions} mentions of dev, {num_rounds} rounds, 8 demonstrations, float32"
    slow = f"{what}; the slower on {NUM_SLOW} of them, 5 beams, ranked by the mean, as the paper's"
    rate, floor_seconds = median(rates), num_mentions * median(seconds["floor"])

    def speedup(name: str) -> tuple[float, str]:  # a mean, because each of its rounds had other mentions
        return float(np.mean(seconds[name])) / median(seconds["ours"]), slow

    return {
        "seconds_per_mention": (seconds, slow),
        "time_over_floor": (median(a / b for a, b in zip(seconds["ours"], seconds["floor"], strict=True)), what),
        "speedup_over_paper_loop": speedup("paper_loop"),
        "speedup_over_best_transformers": speedup("best_transformers"),
        "prompt_tokens_computed": ({"ours": cost.num_computed, "floor": floor.num_computed}, what),
        "floor_share_of_matmul_rate": (2 * NUM_WEIGHTS * floor.num_computed / floor_seconds / 1e9 / rate, what),
        "matmul_gflops": (rate, f"float32, (2048, 576) by (576, 1536), median of {num_rounds} rounds"),
        "certified_share": (float(np.mean([prediction.certified for prediction in predictions])), what),
        "rollouts_per_mention": (float(np.mean([prediction.num_rollouts for prediction in predictions])), what),
        "accuracy": (ours.accuracy(mentions, cost.entity_ids), what),
    }


def score(data: Path, num_rounds: int) -> dict[str, tuple[Any, str]]:
    """Language model and evidence together over the floor of their prompts, by the settings of the package."""
    ours = Systems(data, with_evidence=True)
    mentions = ours.sample(NUM_SCORED)
    prompts = ours.prompts(mentions)
    ratios = []
    floor, (cost, predictions) = ours.floor(prompts[:2]), ours.ours(mentions[:2])  # whatever happens only once
    for _ in range(num_rounds):
        floor, (cost, predictions) = ours.floor(prompts), ours.ours(mentions)
        ratios.append(cost.seconds / floor.seconds)
    what = f"{NUM_SCORED} mentions of dev, {num_rounds} rounds, settings of the package, all asked, float32"
    return {
        "score_time_over_floor": (median(ratios), what),
        "score_times_over_floor": (ratios, what),
        "score_seconds_per_mention": (cost.seconds / NUM_SCORED, what),
        "score_prompt_tokens_computed": ({"ours": cost.num_computed, "floor": floor.num_computed}, what),
        "score_rollouts_per_mention": (float(np.mean([prediction.num_rollouts for prediction in predictions])), what),
        "score_certified_share": (float(np.mean([prediction.certified for prediction in predictions])), what),
    }


def matmul_gflops() -> float:
    """What the machine multiplies in the shape of the model's widest layers."""
    left, right = torch.rand(2048, 576), torch.rand(576, 1536)
    return 2 * 2048 * 576 * 1536 / timed(lambda: left @ right, 50) / 1e9


def accuracy(data: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """The systems' accuracy on the same `NUM_PAIRED` of the mentions."""
    systems = Systems(data)
    beams = Beams(systems.config.language_model, systems.generator)
    mentions = random.Random(0).sample(systems.sample(num_mentions), NUM_PAIRED)
    prompts = systems.prompts(mentions)
    what = f"{NUM_PAIRED} of the {num_mentions} mentions of dev, the same for all"
    found = {
        "accuracy_ours_paired": systems.ours(mentions)[0].entity_ids,
        "accuracy_best_transformers": beams.best(prompts).entity_ids,
        "accuracy_paper_loop": beams.paper_loop(prompts).entity_ids,
    }
    return {name: (systems.accuracy(mentions, names), what) for name, names in found.items()}


def budgets(
    data: Path, num_mentions: int, objective: Objective, knowledge_base: str | None = None
) -> dict[str, tuple[Any, str]]:
    """What the search would have answered with fewer rollouts, read off one run with the largest budget."""
    ours = Systems(data, knowledge_base, ranking="objective")
    mentions = ours.sample(num_mentions)
    settings = replace(ours.config.search, objective=objective, max_rollouts=max(BUDGETS), width=1)
    names = ours.artifacts.knowledge_base
    retrieved = ours.retriever.retrieve(mentions, [None] * len(mentions))
    searches = {}

    class Watched(NameSearch):
        """Notes its result after each rollout."""

        def observe(self, request: RolloutRequest, rollout: Rollout) -> None:
            super().observe(request, rollout)
            result = self.result()
            trajectory.setdefault(id(self), []).append((result.names[0].name_index, result.num_certified > 0))

    trajectory: dict[int, list[tuple[int, bool]]] = {}
    for position, (mention, rows) in enumerate(zip(mentions, retrieved, strict=True)):
        prompt = ours.generator.prompt(mention, None, rows)[0]
        searches[position] = prompt, Watched(names.trie, ours.generator.terminator, settings)
    started = time.perf_counter()
    queue = ((position, prompt, search) for position, (prompt, search) in searches.items())
    for _ in run_searches(ours.generator.engine, queue, ours.config.language_model.max_num_seqs):
        pass
    logger.info("budgets %s: %.0f s", objective, time.perf_counter() - started)
    table = []
    for budget in BUDGETS:
        found = [trajectory[id(search)][:budget] for _, search in searches.values()]
        ids = [names.entity(names.entities_of_name(seen[-1][0])[0]).entity_id for seen in found]
        table.append(
            {
                "max_rollouts": budget,
                "accuracy": ours.accuracy(mentions, ids),
                "certified_share": float(np.mean([seen[-1][1] for seen in found])),
                "rollouts_per_mention": float(np.mean([len(seen) for seen in found])),
            }
        )
    what = f"{num_mentions} mentions of dev, {names.trie.num_names} names, 8 demonstrations, one rollout at a time"
    return {f"budgets_{objective}{'_union' if knowledge_base else ''}": (table, what)}


def union(data: Path, num_mentions: int) -> dict[str, tuple[Any, str]]:
    """The same mentions against all titles at once."""
    systems = Systems(data, UNION)
    mentions = systems.sample(num_mentions)
    floor = systems.floor(systems.prompts(mentions))
    cost, predictions = systems.ours(mentions)
    what = f"{num_mentions} mentions of dev, {systems.artifacts.knowledge_base.trie.num_names} names, float32"
    return {
        "union_time_over_floor": (cost.seconds / floor.seconds, what),
        "union_certified_share": (float(np.mean([prediction.certified for prediction in predictions])), what),
        "union_rollouts_per_mention": (float(np.mean([prediction.num_rollouts for prediction in predictions])), what),
        "union_accuracy": (systems.accuracy(mentions, cost.entity_ids), what),
    }

"""A corpus in which a few surface forms are very common: what it gains to have it in order."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.corpora import mentions_of, zipf_rows
from benchmarks.decoding.systems import Beams, Systems

T = TypeVar("T")
Prompts = Sequence[tuple[int, ...]]

_CACHE_GIB = 1
_NUM_SHARES = 5
_NUM_MEASURED = 3  # of the shares: each takes twenty minutes
_NUM_PAPER = 3  # mentions for the paper's loop, beside each share

logger = logging.getLogger("benchmarks")


def zipf(data: Path, num_mentions: int = 5000) -> dict[str, tuple[Any, str]]:
    """A corpus in which a few surface forms are very common, ordered by surface form against random order."""
    systems = Systems(data, kv_cache_gib=_CACHE_GIB)
    corpus = mentions_of(zipf_rows(systems.dev, num_mentions))
    ordered = sorted(corpus, key=lambda mention: (mention.mention, mention.mention_id))
    prompts = systems.prompts(corpus)
    few = random.Random(0).sample(prompts, _NUM_PAPER * _NUM_MEASURED)
    beams = Beams(systems.config.language_model, systems.generator)
    seconds: dict[str, list[float]] = {"ordered": [], "random": [], "paper_loop": []}
    computed = {"ordered": 0, "random": 0}
    systems.ours(corpus[:2])  # whatever happens only once
    for number in range(_NUM_MEASURED):  # in turn: a machine's speed changes in an hour
        for name, rows in (("ordered", shares(ordered)[number]), ("random", shares(corpus)[number])):
            cost, _ = systems.ours(rows)
            seconds[name].append(cost.seconds / len(rows))
            computed[name] += cost.num_computed
        seconds["paper_loop"].append(beams.paper_loop(few[number::_NUM_MEASURED]).seconds / _NUM_PAPER)
        logger.info("%s", {name: round(values[-1], 3) for name, values in seconds.items()})
    of_mention = {name: float(np.mean(values)) for name, values in seconds.items()}
    what = (
        f"{num_mentions} mentions, surface forms drawn with probability 1/rank, "
        f"{len({mention.mention for mention in corpus})} distinct, 1 GiB of cache, float32, {_NUM_MEASURED} of "
        f"{_NUM_SHARES} shares in turn, each from an empty cache; the paper's loop on {len(few)}"
    )
    num_tokens = sum(len(prompt) for share in shares(prompts)[:_NUM_MEASURED] for prompt in share)
    prompt_of = {mention.mention_id: prompt for mention, prompt in zip(corpus, prompts, strict=True)}
    curve = cache_curve(shares(prompts), shares([prompt_of[mention.mention_id] for mention in ordered]))
    (of_this_size,) = (point for point in curve if point["gib"] == _CACHE_GIB)
    return {
        "zipf_gain_from_ordering": (of_mention["random"] / of_mention["ordered"], what),
        "zipf_seconds_per_mention": (of_mention, what),
        "zipf_seconds_per_mention_of_shares": (seconds, what),
        "zipf_prompt_tokens": (
            {**computed, "without_cache": num_tokens},
            f"{what}; computed, of the first rollouts' prompts and of the others'; without a cache: of one prompt each",
        ),
        "zipf_speedup_over_paper_loop": (of_mention["paper_loop"] / of_mention["ordered"], what),
        "zipf_ceiling_of_gain": (
            of_this_size["random"] / curve[-1]["ordered"],
            f"{what}; first prompts: tokens computed at random with this cache by those in order with a large one",
        ),
        "zipf_cache_curve": (curve, f"{what}; first prompts of all shares, simulated"),
    }


def shares(items: Sequence[T]) -> list[Sequence[T]]:
    """Cut into `_NUM_SHARES` runs."""
    size = -(-len(items) // _NUM_SHARES)
    return [items[start : start + size] for start in range(0, len(items), size)]


def cache_curve(at_random: Sequence[Prompts], ordered: Sequence[Prompts]) -> list[dict[str, float]]:
    """Prompt tokens computed by cache size: least recently used blocks of 32 tokens leave first."""
    bytes_per_token = 30 * 2 * 3 * 64 * 4  # SmolLM2-135M: layers, keys and values, heads, width, float32
    curve = []
    for gib in (0.25, 0.5, 1, 2, 4, 8):
        num_blocks = int(gib * 2**30 / bytes_per_token / 32)
        computed = [float(sum(computed_tokens(share, num_blocks) for share in rows)) for rows in (at_random, ordered)]
        curve.append(dict(zip(("gib", "random", "ordered"), (gib, *computed), strict=True)))
    return curve


def computed_tokens(prompts: Prompts, num_blocks: int, block_size: int = 32) -> int:
    """Tokens of prompts, read one after another, that a cache of so many blocks does not hold."""
    cache: dict[int, None] = {}
    computed = 0
    for prompt in prompts:
        keys, key = [], 0
        for start in range(0, (len(prompt) - 1) // block_size * block_size, block_size):
            key = hash((key, prompt[start : start + block_size]))
            keys.append(key)
        num_hits = next((number for number, key in enumerate(keys) if key not in cache), len(keys))
        computed += len(prompt) - num_hits * block_size
        for key in reversed(keys):
            cache.pop(key, None)
            cache[key] = None
        while len(cache) > num_blocks:
            del cache[next(iter(cache))]
    return computed

"""Decoding, side by side: ours, the paper's loop, transformers at its best, and the floor; small and huge name sets.

    python -m benchmarks.decoding DATA TITLES [--parts ...]

Some hours for most parts on two cores, a day for all. DATA is a directory of WikiDiverse (see `benchmarks/corpora.py`),
TITLES a Parquet file of names, in a column `name`. Needs the models of `make demo`. Figures go to
`benchmarks/results/decode.json`; a part that has its figures there is skipped, so that it can be interrupted.
Everything in one part runs in one process, on the same weights (float32) and prompts, and is timed in turn with what
it is compared with.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from benchmarks.decoding.comparison import UNION, accuracy, budgets, score, systems, union
from benchmarks.decoding.exact import brute_force
from benchmarks.decoding.trie import trie, trie_speed
from benchmarks.decoding.vllm_beams import vllm_beams
from benchmarks.decoding.zipf import zipf
from benchmarks.record import ResultFile, run

PARTS = (
    "trie",
    "trie_speed",
    "systems",
    "score",
    "zipf",
    "union",
    "accuracy",
    "budgets_sum",
    "budgets_mean",
    "budgets_sum_union",
    "budgets_mean_union",
    "brute_force",
    "vllm_beams",
)


def main(
    data: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    parts: tuple[str, ...] = PARTS,
    num_mentions: int = 500,
    num_rounds: int = 3,
) -> None:
    """Measure what has no result yet.

    Args:
        data: Directory of WikiDiverse.
        titles: Names for a large knowledge base.
        parts: Which parts.
        num_mentions: Number of mentions of dev, drawn with a fixed seed.
        num_rounds: Paired runs of each system.
    """
    results = ResultFile("decode", {"DATA": data, "TITLES": titles})
    measures: dict[str, Callable[[], dict[str, tuple[Any, str]]]] = {
        "trie": lambda: trie(data, titles),
        "trie_speed": trie_speed,
        "systems": lambda: systems(data, num_mentions, num_rounds),
        "score": lambda: score(data, num_rounds),
        "zipf": lambda: zipf(data),
        "union": lambda: union(data, num_mentions),
        "accuracy": lambda: accuracy(data, num_mentions),
        "budgets_sum": lambda: budgets(data, num_mentions, "sum"),
        "budgets_mean": lambda: budgets(data, num_mentions, "mean"),
        "budgets_sum_union": lambda: budgets(data, num_mentions, "sum", UNION),
        "budgets_mean_union": lambda: budgets(data, num_mentions, "mean", UNION),
        "brute_force": lambda: brute_force(data, 30),
        "vllm_beams": lambda: vllm_beams(data, titles),
    }
    for part in parts:
        if any(part in record["command"].split() for record in results.read().values()):
            continue
        if len(parts) > 1:  # each in a process of its own: an engine keeps what it has taken
            options = ["--num-mentions", str(num_mentions), "--num-rounds", str(num_rounds), "--parts", part]
            command = [sys.executable, "-m", "benchmarks.decoding", str(data), str(titles), *options]
            subprocess.run(command, check=True)
            continue
        for name, (value, what) in measures[part]().items():
            results.note({name: value}, what)


if __name__ == "__main__":
    run(main)

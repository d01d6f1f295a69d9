"""Decoding, side by side: ours, the paper's loop, transformers at its best, and the floor; small and huge name sets.

python benchmarks/decode.py WIKIDIVERSE TITLES [--parts ...]

WIKIDIVERSE holds `train.parquet`, `dev.parquet` and `entities.parquet`; TITLES is a Parquet file with a column `name`.
Needs `build/wikidiverse`, which `benchmarks/wikidiverse.py` makes. Results go to `benchmarks/results/decode.json`; a
part that has its results there is skipped, so that it can be interrupted. Everything in one part runs in one process,
on the same weights (float32) and prompts, and is timed in turn with what it is compared with.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from decode_comparison import UNION, accuracy, budgets, systems, union
from decode_exact import brute_force
from decode_trie import trie, trie_speed
from decode_vllm_beams import vllm_beams
from decode_zipf import zipf
from record import record

RESULTS = Path("benchmarks/results/decode.json")
PARTS = (
    "trie",
    "trie_speed",
    "systems",
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

logger = logging.getLogger("decode")


def main(
    wikidiverse: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    parts: tuple[str, ...] = PARTS,
    num_mentions: int = 500,
    num_rounds: int = 3,
) -> None:
    """Measure what has no result yet.

    Args:
        wikidiverse: Directory of the corpus.
        titles: Names for a large knowledge base.
        parts: Which parts.
        num_mentions: Of dev, drawn with a fixed seed.
        num_rounds: Paired runs of each system.
    """
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measures: dict[str, Callable[[], dict[str, tuple[Any, str]]]] = {
        "trie": lambda: trie(wikidiverse, titles),
        "trie_speed": trie_speed,
        "systems": lambda: systems(wikidiverse, num_mentions, num_rounds),
        "zipf": lambda: zipf(wikidiverse),
        "union": lambda: union(wikidiverse, num_mentions),
        "accuracy": lambda: accuracy(wikidiverse, num_mentions),
        "budgets_sum": lambda: budgets(wikidiverse, num_mentions, "sum"),
        "budgets_mean": lambda: budgets(wikidiverse, num_mentions, "mean"),
        "budgets_sum_union": lambda: budgets(wikidiverse, num_mentions, "sum", UNION),
        "budgets_mean_union": lambda: budgets(wikidiverse, num_mentions, "mean", UNION),
        "brute_force": lambda: brute_force(wikidiverse, 30),
        "vllm_beams": lambda: vllm_beams(wikidiverse, titles),
    }
    for part in parts:
        if part in results.get("parts", []):
            continue
        if len(parts) > 1:  # each in a process of its own: an engine keeps what it has taken
            arguments = [str(wikidiverse), str(titles), "--num-mentions", str(num_mentions)]
            arguments += ["--num-rounds", str(num_rounds), "--parts", part]
            subprocess.run([sys.executable, __file__, *arguments], check=True)
            continue
        command = f"python benchmarks/decode.py WIKIDIVERSE TITLES --parts {part}"
        for name, (value, what) in measures[part]().items():
            results[name] = record(value, command, what)
            logger.info("%s: %s", name, value)
        results.setdefault("parts", []).append(part)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

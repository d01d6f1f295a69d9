"""How cost grows: with the rows of a corpus, and with the names of a knowledge base.

python benchmarks/scaling.py WIKIDIVERSE TITLES

WIKIDIVERSE and TITLES as for `benchmarks/decode.py`; needs `build/wikidiverse`, which `benchmarks/wikidiverse.py`
makes. Rows: the whole linking job over 1,000, 5,000 and 20,000 mentions with a tiny random language model, so that what
is not the model shows. Names: decoding 60 mentions against growing knowledge bases, each run between two of the floor.
Results go to `benchmarks/results/scaling.json`, the plot of the second to `docs/cost_by_names.svg`; what is there is
skipped, so that it can be interrupted.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import tyro
from matplotlib.figure import Figure
from record import record
from transformers import AutoModelForCausalLM, LlamaConfig

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.store import MANIFEST
from gemel_engine.tokenizer import load_tokenizer

CONFIG = Path("build/wikidiverse/link.toml")
WORK = Path("build/scaling")
RESULTS = Path("benchmarks/results/scaling.json")
PLOT = Path("docs/cost_by_names.svg")
NUM_ROWS = (16, 1_000, 5_000, 20_000)  # the first for what starting takes
NUM_NAMES = (10_000, 100_000, 1_000_000, None)  # None: all titles
NUM_MENTIONS = 60

logger = logging.getLogger("scaling")


def main(
    wikidiverse: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    names: int | None = None,
) -> None:
    """Measure what has no result yet.

    Args:
        wikidiverse: Directory of the corpus.
        titles: Names for large knowledge bases.
        names: Measure decoding against this many titles alone, print it and note nothing; 0 for all of them.
    """
    if names is not None:
        print(json.dumps(decoding_cost(wikidiverse, knowledge_base(wikidiverse, titles, names or None))))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for num_rows in NUM_ROWS:
        if (key := f"rows_{num_rows}") not in results:
            if num_rows == NUM_ROWS[0]:
                job_cost(wikidiverse, num_rows)  # reads files for the first time
            note(results, key, job_cost(wikidiverse, num_rows), "the whole linking job, a random model of width 64")
    start = results[f"rows_{NUM_ROWS[0]}"]["value"]["seconds"]
    rates = {n: n / (results[f"rows_{n}"]["value"]["seconds"] - start) for n in NUM_ROWS[1:]}
    note(results, "mentions_per_second_after_start", rates, f"less the {start:.0f} s that {NUM_ROWS[0]} rows take")
    for num_names in NUM_NAMES:
        if (key := f"names_{num_names or 'all'}") not in results:
            command = [sys.executable, __file__, str(wikidiverse), str(titles), "--names", str(num_names or 0)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            note(results, key, json.loads(found), f"{NUM_MENTIONS} mentions of dev, 8 demonstrations, float32")
    plot([results[f"names_{num_names or 'all'}"]["value"] for num_names in NUM_NAMES])


def note(results: dict[str, Any], key: str, value: object, what: str) -> None:
    """Write a result."""
    results[key] = record(value, "python benchmarks/scaling.py WIKIDIVERSE TITLES", what)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    logger.info("%s: %s", key, value)


# ---- rows ----


def job_cost(wikidiverse: Path, num_rows: int) -> dict[str, float]:
    """Seconds of the linking job, and the most memory that all its processes held together."""
    directory = WORK / f"rows_{num_rows}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    train = pq.read_table(wikidiverse / "train.parquet", columns=["text", "mention"])
    numbers = np.arange(num_rows)
    texts = train["text"].take(numbers % len(train))
    corpus = {
        "mention_id": [f"m{number}" for number in numbers],
        "text": pc.binary_join_element_wise(texts, pa.array([f"(photo {number})" for number in numbers]), " "),
        "mention": train["mention"].take(numbers % len(train)),
    }
    pq.write_table(pa.table(corpus), directory / "mentions.parquet")
    command = [sys.executable, "jobs/link_corpus.py", str(CONFIG), "--output", f"{directory}/linked"]
    command += ["--input", f"{directory}/mentions.parquet", "--language-model.name", str(tiny_model())]
    command += ["--search.max-rollouts", "2", "--retrieval.num-demonstrations", "4", "--rows-per-shard", "500"]
    started = time.perf_counter()
    with (directory / "log.txt").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as job:
        peak = most_memory(job)
    seconds = time.perf_counter() - started
    assert job.returncode == 0, f"see {directory}/log.txt"
    report = json.loads((directory / "linked/_report.json").read_text())
    return {
        "rows": report["rows"],
        "seconds": seconds,
        "peak_gib": peak / 2**30,
        "generation_seconds": report["stage_seconds"]["generation"],
        "prompt_tokens_computed_per_mention": (report["prompt_tokens"] - report["cached_tokens"]) / report["rows"],
    }


def most_memory(job: subprocess.Popen[bytes]) -> int:
    """Bytes, counted once where processes share them, at the highest of samples taken until the job ends."""
    peak = 0
    while True:
        try:
            job.wait(2)
        except subprocess.TimeoutExpired:
            peak = max(peak, memory(job.pid))
        else:
            return peak


def memory(pid: int) -> int:
    """Bytes of a process and all below it; what they share is counted once."""
    total, root = 0, psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            total += process.memory_full_info().pss
    return total


def tiny_model() -> Path:
    """A random language model with the tokenizer of the real one."""
    directory = WORK / "tiny_model"
    if not (directory / "config.json").exists():
        tokenizer = load_tokenizer(load_config(LinkConfig, CONFIG).language_model.name)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=4096,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
        tokenizer.save_pretrained(directory)
    return directory


# ---- names ----


def knowledge_base(wikidiverse: Path, titles: Path, num_names: int | None) -> Path:
    """The entities of the corpus and the first titles that are none of their names, in a fixed random order."""
    directory = WORK / f"knowledge_base_{num_names or 'all'}"
    if (directory / MANIFEST).exists():
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    known = pq.read_table(wikidiverse / "entities.parquet", columns=["entity_id", "name"])
    names = pq.read_table(titles, columns=["name"])["name"]
    names = names.filter(pc.invert(pc.is_in(pc.utf8_lower(names), pc.utf8_lower(known["name"]).combine_chunks())))
    if num_names is not None:
        names = names.take(np.random.default_rng(0).permutation(len(names))[: num_names - len(known)])
    added = pa.table({"entity_id": [f"T{row}" for row in range(len(names))], "name": names})
    tokenizer = load_tokenizer(load_config(LinkConfig, CONFIG).language_model.name)
    both = pa.concat_tables([known, added], promote_options="permissive")
    build_knowledge_base(both, tokenizer, directory, KnowledgeBaseSettings(on_bad_name="skip"))
    return directory


def decoding_cost(wikidiverse: Path, directory: Path) -> dict[str, float]:
    """Ours between two runs of the floor."""
    from decode_systems import Systems  # starts vLLM's imports, which the job's own processes do without

    systems = Systems(wikidiverse, str(directory))
    mentions = systems.sample(NUM_MENTIONS)
    prompts = systems.prompts(mentions)
    systems.floor(prompts[:2])  # whatever happens only once
    before = systems.floor(prompts).seconds
    cost, predictions = systems.ours(mentions)
    floor = (before + systems.floor(prompts).seconds) / 2
    return {
        "names": systems.artifacts.knowledge_base.trie.num_names,
        "seconds_per_mention": cost.seconds / NUM_MENTIONS,
        "time_over_floor": cost.seconds / floor,
        "rollouts_per_mention": float(np.mean([prediction.num_rollouts for prediction in predictions])),
        "certified_share": float(np.mean([prediction.certified for prediction in predictions])),
        "accuracy": systems.accuracy(mentions, cost.entity_ids),
    }


def plot(points: list[dict[str, float]]) -> None:
    """Time over the floor by number of names."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([point["names"] for point in points], [point["time_over_floor"] for point in points], marker="o")
    axes.set(xscale="log", xlabel="names in the knowledge base", ylabel="time over reading each prompt once")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(PLOT, metadata={"Date": None})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

"""What exactly-once output costs: the linking job beside a plain Ray Data pipeline of the same stages.

    python -m benchmarks.runs overhead [--num-mentions 192] [--corpora no_pictures]

Some twenty minutes on two cores. The stages wait as long as the demo's models take for a row on two cores, instead of
working: a machine whose speed drifts by half between two runs could not show a difference of some percent. All else is
the job's own: checks, the sort, blocks, actors, marks, parts, shards, the report. Mentions of the emoji corpus are
linked once with their pictures, and once without any, which the job sorts by surface form first. The plain pipeline has
the same blocks, stages and actors, checks nothing, leaves no marks, writes with Ray Data's `write_parquet`, and gets a
corpus that is sorted already. Both have a process of their own, which starts Ray; they take turns in being first. What
the job checks before it starts anything, imports included, takes as long for any corpus and is noted apart. Three pairs
of each; what is there is skipped, so that it can be interrupted. Figures go to `benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from ray.data import Dataset

from benchmarks.corpora import EMOJI, emoji
from benchmarks.record import ResultFile
from gemel_engine.config.settings import JobConfig, LinkConfig
from gemel_engine.decoding.engines.base import CacheStatistics
from gemel_engine.evidence.retrieved import PromptItem, Retrieved
from gemel_engine.linking import stages
from gemel_engine.linking.job import describe_run, link_corpus
from gemel_engine.linking.stages import GenerateEntityNames
from gemel_engine.pipeline import chain
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.pipeline.output import read_columns
from gemel_engine.pipeline.ray_data import actor_pool, connect
from gemel_engine.pipeline.stages import IMAGE_COLUMNS, EncodeImages, Retrieve, read_mentions
from gemel_engine.types import PREDICTION_SCHEMA, Candidate, Mention, Prediction

System = Literal["ours", "plain"]
Pictures = Literal["pictures", "no_pictures"]

WORK = Path("build/overhead")
NUM_PAIRS = 3
SECONDS_PER_ROW = {"image": 0.07, "retrieval": 0.01, "generation": 0.3}
VISION_WIDTH, NUM_DEMONSTRATIONS = 1280, 10

logger = logging.getLogger("benchmarks")


class WaitingEncodeImages(EncodeImages):
    """The stage with a model that only takes its time."""

    def __init__(self, config: JobConfig, contents: object = None) -> None:
        self._output, self._policy, self._encoder = config.output, config.image_source, self  # type: ignore[assignment]
        self._skips_kept = True

    def encode(self, files: Iterable[object]) -> Iterator[NDArray[np.float32] | None]:
        """Yield features for each file."""
        for file in files:
            time.sleep(SECONDS_PER_ROW["image"] if file is not None else 0)
            yield None if file is None else np.ones(VISION_WIDTH, np.float32)


class WaitingRetrieve(Retrieve):
    """The stage with an index that only takes its time."""

    def __init__(self, config: JobConfig, contents: object = None) -> None:
        self._output, self._retriever = config.output, self  # type: ignore[assignment]
        self._skips_kept = True

    def retrieve(self, mentions: Sequence[Mention], features: Sequence[object]) -> list[Retrieved]:
        """Return demonstrations for each mention."""
        time.sleep(SECONDS_PER_ROW["retrieval"] * len(mentions))
        return [Retrieved(tuple(map(PromptItem, range(NUM_DEMONSTRATIONS)))) for _ in mentions]


class WaitingGenerateEntityNames(GenerateEntityNames):
    """The stage with a language model that only takes its time."""

    def __init__(self, config: LinkConfig, contents: object = None) -> None:
        self._output, self._carried, self._generator = config.output, config.output_columns, self  # type: ignore[assignment]
        self._checks_prompts = False
        self.engine = self
        self.cache_statistics = CacheStatistics()

    def generate(self, mentions: Sequence[Mention], *_: object) -> list[Prediction]:
        """Return a prediction for each mention."""
        time.sleep(SECONDS_PER_ROW["generation"] * len(mentions))
        return [
            Prediction(
                mention.mention_id,
                entity_id=mention.mention,
                entity_name=mention.mention,
                log_prob=-0.5,
                certified=True,
                num_rollouts=1,
                candidates=tuple(Candidate(str(n), f"{mention.mention} {n}", -0.5 - n) for n in range(5)),
                demonstration_ids=tuple(f"{mention.mention_id}-{n}" for n in range(NUM_DEMONSTRATIONS)),
            )
            for mention in mentions
        ]


class BareEncodeImages(WaitingEncodeImages):
    """The stage without marks."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Encode a batch's pictures."""
        return self._encode(batch)


class BareRetrieve(WaitingRetrieve):
    """The stage without marks."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Retrieve a batch's demonstrations."""
        return self._retrieve(batch)


class BareGenerateEntityNames(WaitingGenerateEntityNames):
    """The stage without marks."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Link a batch."""
        return self._generate(batch)


def main(
    *,
    num_mentions: int = 192,
    corpora: tuple[Pictures, ...] = ("pictures", "no_pictures"),
    measure: tuple[System, Pictures] | None = None,
) -> None:
    """Exactly-once output: the job beside a plain pipeline.

    Args:
        num_mentions: Number of mentions of each run.
        corpora: What is linked.
        measure: Measure one system on one corpus once, print its seconds, and note nothing.
    """
    if measure is not None:
        print(json.dumps(seconds_of(*measure)))
        return
    results = ResultFile("overhead")
    for pictures in corpora:
        write_corpora(num_mentions, pictures)
        pairs = [pair(number, num_mentions, pictures) for number in range(NUM_PAIRS)]
        what = (
            f"{num_mentions} emoji mentions in shards of {emoji().rows_per_shard}, "
            f"{pictures.replace('_', ' ')}, stages that wait {SECONDS_PER_ROW} s a row, {NUM_PAIRS} pairs in turn"
        )
        overheads = [1 - found["plain"]["run"] / found["ours"]["run"] for found in pairs]
        values: dict[str, object] = {
            "check_seconds": statistics.median(found["ours"]["checks"] for found in pairs),
            "seconds": statistics.median(found["ours"]["run"] for found in pairs),
            "plain_seconds": statistics.median(found["plain"]["run"] for found in pairs),
            "overhead": statistics.median(overheads),
            "overheads": overheads,
        }
        results.note({f"{pictures}_{name}": value for name, value in values.items()}, what)


def pair(number: int, num_mentions: int, pictures: Pictures) -> dict[str, dict[str, float]]:
    """Return the seconds of both, one right after the other."""
    order: tuple[System, ...] = ("ours", "plain") if number % 2 else ("plain", "ours")
    path = WORK / f"{pictures}-{num_mentions}-{number}.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    if not found:
        for system in order:
            command = [sys.executable, "-m", "benchmarks.runs", "overhead", "--measure", system, pictures]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[system] = json.loads(output.splitlines()[-1])
        path.write_text(json.dumps(found))
    logger.info("%s, pair %d: %s", pictures, number, found)
    return found


def write_corpora(num_mentions: int, pictures: Pictures) -> None:
    """Write the mentions in random order, for ours, and in the order in which ours links them."""
    WORK.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(EMOJI / "train.parquet")
    table = table.take(np.random.default_rng(0).permutation(len(table))[:num_mentions])
    if pictures == "no_pictures":
        table = table.drop_columns([name for name in IMAGE_COLUMNS if name in table.column_names])
    pq.write_table(table, corpus("ours", pictures))
    if pictures == "no_pictures":
        table = table.sort_by([("mention", "ascending"), ("mention_id", "ascending")])
    pq.write_table(table, corpus("plain", pictures))


def corpus(system: System, pictures: Pictures) -> Path:
    """Return what a system reads."""
    return WORK / f"{pictures}-{system}.parquet"


def seconds_of(system: System, pictures: Pictures) -> dict[str, float]:
    """Link a corpus with a system: seconds of the checks, and from the start of Ray to the last file."""
    output = WORK / "output"
    shutil.rmtree(output, ignore_errors=True)
    config = replace(
        emoji(),
        input=str(corpus(system, pictures)),
        output=str(output),
        max_failed_fraction=1.0,
    )
    started = time.perf_counter()
    if system == "ours":
        os.environ["RAY_ADDRESS"] = "local"  # so few rows would be linked without Ray
        vars(chain).update(EncodeImages=WaitingEncodeImages, Retrieve=WaitingRetrieve)
        vars(stages).update(GenerateEntityNames=WaitingGenerateEntityNames)
        describe_run(config)
    checked = time.perf_counter()
    if system == "ours":
        link_corpus(config)
    else:
        plain_pipeline(config).write_parquet(str(output))
    seconds = time.perf_counter() - checked
    num_rows = read_columns(f"{output}/data" if system == "ours" else str(output), ("mention_id",)).num_rows
    assert num_rows == pq.read_metadata(config.input).num_rows, f"{num_rows} rows"
    return {"checks": checked - started, "run": seconds}


def plain_pipeline(config: LinkConfig) -> Dataset:
    """Return the stages of `linking_stages`, and nothing that makes a rerun possible."""
    plan = plan_shards(config.input, config.rows_per_shard)
    connect()
    dataset: Dataset = ray.data.from_items([asdict(shard) for shard in plan], override_num_blocks=len(plan))
    read = partial(read_mentions, output=config.output, also=("image_features", *IMAGE_COLUMNS))
    dataset = dataset.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    pools = config.resources
    dataset = dataset.map_batches(BareEncodeImages, fn_constructor_args=(config,), **actor_pool(pools.images))
    dataset = dataset.map_batches(BareRetrieve, fn_constructor_args=(config,), **actor_pool(pools.retrieval))
    dataset = dataset.map_batches(
        BareGenerateEntityNames, fn_constructor_args=(config,), **actor_pool(pools.generation)
    )
    return dataset.select_columns(PREDICTION_SCHEMA.names)

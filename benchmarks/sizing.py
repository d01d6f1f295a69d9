"""What a cluster has to do for a corpus: tokens, operations, memory, traffic, and what is short first.

python benchmarks/sizing.py WIKIDIVERSE

On paper: from block lengths of WikiDiverse, which are counted, sizes of the models, which are public, and what a GPU's
vendor says of it. Two cases bound what a corpus costs: no surface form comes twice, so that whole prompts are computed;
and all come very often, so that of a prompt only its question is. Where evidence decides alone, the language model has
nothing to do: the share of such mentions is that of WikiDiverse dev, in `score.json`. What a rollout costs the host, in
`hostcost.json`, bounds what one engine takes, whatever the GPU. Then the job's own pipeline is run with stages that
wait as long as the models would take, with as many actors as this machine bears, to see whether Ray keeps up. Results
go to `benchmarks/results/sizing.json`; `make docs` makes tables of them.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro
from ray.data import ActorPoolStrategy, Dataset
from record import record

from gemel_engine.config.components import PromptSettings
from gemel_engine.decoding.prompt import PromptBuilder
from gemel_engine.tokenizer import load_tokenizer

RESULTS = Path("benchmarks/results/sizing.json")
HOST_COST, SCORE = Path("benchmarks/results/hostcost.json"), Path("benchmarks/results/score.json")
TOKENIZER = "build/models/smollm2-135m"
PREFIX_LENGTH = 4
NAME_TOKENS = 6  # of a rollout, terminator included
FOLLOW_UP_TOKENS = 16  # half a block of 32, which a follow-up rollout computes again
NUM_FOLLOW_UPS = 3
EFFICIENCY = 0.4  # share of a GPU's rate that is reached; an assumption until it is measured
PICTURE_BYTES, ROW_BYTES, OUTPUT_BYTES = 100_000, 400, 700
DECODING_SECONDS = 0.008  # one picture of that size on one CPU core
S3_GETS_PER_PREFIX = 5_500  # a second, as Amazon documents
BLOCK_ROWS = 512

logger = logging.getLogger("sizing")


@dataclass(frozen=True, slots=True)
class Model:
    """A language model with its image encoder.

    Attributes:
        weights: Parameters that a token meets.
        kv_bytes: Bytes of keys and values of one token, 16-bit.
        image_weights: Parameters of the image encoder.
        image_tokens: Patches that it reads.
    """

    name: str
    weights: float
    kv_bytes: int
    num_demonstrations: int
    image_weights: float
    image_tokens: int


@dataclass(frozen=True, slots=True)
class Gpu:
    """Dense 16-bit operations a second, and bytes of memory, as the vendor gives them."""

    name: str
    rate: float
    memory: float


MODELS = (
    Model("OPT-6.7B, CLIP ViT-L/14", 6.7e9, 2 * 2 * 32 * 4096, 16, 304e6, 257),
    Model("8B (Llama 3.1), SigLIP SO400M/14 at 384", 8.0e9, 2 * 2 * 32 * 8 * 128, 8, 428e6, 729),
)
GPUS = (Gpu("A100 80 GB", 312e12, 80e9), Gpu("H100 80 GB", 989e12, 80e9))


def main(wikidiverse: tyro.conf.Positional[Path], *, num_actors: int = 32) -> None:
    """Write the tables.

    Args:
        wikidiverse: Directory of that corpus.
        num_actors: Generation actors of the pipeline that only waits.
    """
    blocks = block_lengths(wikidiverse)
    rows = [costs(model, gpu, blocks) for model in MODELS for gpu in GPUS]
    pipeline = waiting_pipeline(num_actors, seconds_per_row=1 / rows[1]["mentions_per_second_shared"])
    command = "python benchmarks/sizing.py WIKIDIVERSE"
    what = f"on paper, block lengths of WikiDiverse, {EFFICIENCY:.0%} of the GPUs' rate assumed"
    results: dict[str, Any] = {
        "block_tokens": record(blocks, command, "mean, SmolLM2's tokenizer, without pictures"),
        "costs": record(rows, command, what),
        "pipeline": record(pipeline, command, f"{num_actors} actors that wait, on this machine"),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def block_lengths(wikidiverse: Path) -> dict[str, float]:
    """Mean tokens of a demonstration and of a question."""
    builder = PromptBuilder(load_tokenizer(TOKENIZER), PromptSettings())
    train = pq.read_table(wikidiverse / "train.parquet").slice(0, 2000).to_pylist()
    return {
        "demonstration": float(
            np.mean(
                [len(builder.demonstration(r["text"], r["mention"], r["entity_name"], None).token_ids) for r in train]
            )
        ),
        "question": float(np.mean([len(builder.question(r["text"], r["mention"], None).token_ids) for r in train])),
    }


def costs(model: Model, gpu: Gpu, blocks: dict[str, float]) -> dict[str, Any]:
    """Of one mention with a picture, and what follows for many GPUs."""
    question = blocks["question"] + PREFIX_LENGTH
    prompt = model.num_demonstrations * (blocks["demonstration"] + PREFIX_LENGTH) + question
    decoded = (1 + NUM_FOLLOW_UPS) * NAME_TOKENS + NUM_FOLLOW_UPS * FOLLOW_UP_TOKENS
    image = 2 * model.image_weights * model.image_tokens
    share = json.loads(SCORE.read_text())["wikidiverse.decided_by_evidence"]["value"]
    host_seconds = json.loads(HOST_COST.read_text())["picture_840x4096_ms"]["value"] / 1e3 * (1 + NUM_FOLLOW_UPS)
    rates, cascade = {}, {}
    for case, tokens in (("distinct", prompt + decoded), ("shared", question + decoded)):
        rates[case] = EFFICIENCY * gpu.rate / (2 * model.weights * tokens + image)
        cascade[case] = EFFICIENCY * gpu.rate / ((1 - share) * 2 * model.weights * tokens + image)
    cache = gpu.memory * 0.9 - 2 * (model.weights + model.image_weights)
    return {
        "model": model.name,
        "gpu": gpu.name,
        "prompt_tokens": prompt,
        "tokens_computed_distinct": prompt + decoded,
        "tokens_computed_shared": question + decoded,
        "teraflop_distinct": (2 * model.weights * (prompt + decoded) + image) / 1e12,
        "teraflop_shared": (2 * model.weights * (question + decoded) + image) / 1e12,
        "kv_tokens": cache / model.kv_bytes,
        "mentions_per_second_distinct": rates["distinct"],
        "mentions_per_second_shared": rates["shared"],
        "decided_by_evidence": share,
        "mentions_per_second_distinct_cascade": cascade["distinct"],
        "mentions_per_second_shared_cascade": cascade["shared"],
        "searches_per_second_host": 1 / host_seconds,
        "many": [of_many(num_gpus, rates) for num_gpus in (8, 64, 512)],
    }


def of_many(num_gpus: int, rates: dict[str, float]) -> dict[str, float]:
    """What so many GPUs ask of the rest, at the faster of the two cases, and how long they take for 100M mentions."""
    fastest = num_gpus * rates["shared"]
    return {
        "gpus": num_gpus,
        "mentions_per_second": fastest,
        "gigabytes_read_per_second": fastest * (PICTURE_BYTES + ROW_BYTES) / 1e9,
        "s3_prefixes": fastest / S3_GETS_PER_PREFIX,
        "cores_for_pictures": fastest * DECODING_SECONDS,
        "hours_for_100m_distinct": 1e8 / (num_gpus * rates["distinct"]) / 3600,
        "hours_for_100m_shared": 1e8 / fastest / 3600,
    }


class Waiting:
    """A stage that takes as long as a model would."""

    def __init__(self, seconds_per_row: float) -> None:
        self._seconds_per_row = seconds_per_row

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Wait."""
        time.sleep(self._seconds_per_row * batch.num_rows)
        return batch


def waiting_pipeline(num_actors: int, seconds_per_row: float) -> dict[str, float]:
    """Rows a second of a pipeline in which so many actors wait, and the share of it that they allow."""
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    num_blocks = 12 * num_actors
    dataset: Dataset = ray.data.from_items([{"shard": n} for n in range(num_blocks)], override_num_blocks=num_blocks)

    def read(batch: pa.Table) -> pa.Table:
        text = "a sentence of a hundred characters, as captions are, about what is to be seen on a picture beside"
        return pa.table({"text": [text] * BLOCK_ROWS, "mention": ["picture"] * BLOCK_ROWS})

    pool = ActorPoolStrategy(min_size=num_actors, max_size=num_actors)
    dataset = dataset.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.01)
    dataset = dataset.map_batches(
        Waiting,
        fn_constructor_args=(seconds_per_row,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.01,
        compute=pool,
    )
    times = []
    for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        times.append(time.monotonic())
    ray.shutdown()
    # In full swing: neither the start of the actors nor their end, when some have nothing left to do.
    first, last = num_blocks // 4, 3 * num_blocks // 4
    found = (last - first) * BLOCK_ROWS / (times[last] - times[first])
    possible = num_actors / seconds_per_row
    return {"actors": num_actors, "rows_per_second": found, "possible": possible, "share": found / possible}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

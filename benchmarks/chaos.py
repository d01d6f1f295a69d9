"""Linking runs whose processes are killed at random: is the output the undisturbed one, row for row?

PYTHONPATH=tests python benchmarks/chaos.py [--runs N]

Ten runs with six kills each, over 320 mentions with tiny random models: half of them on two nodes of a Ray cluster with
input, artifacts and output on a real S3 server, half on Ray as the driver starts it, with local files; two with vLLM,
one of them with a model split over two processes. What is killed when follows from the number of the run. A finished
run is kept in `build/chaos`, so that the benchmark can be interrupted; when all are finished, the results go to
`benchmarks/results/chaos.json`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tyro
from record import record
from support.chaos import Blow, Chaos, Corpus, Damage, Target, link, nodes
from support.models import (
    save_artifacts,
    save_mention_encoder,
    save_tiny_model,
    tiny_tokenizer,
)
from support.s3_server import serve_s3

WORK = Path("build/chaos").absolute()
RESULTS = Path("benchmarks/results/chaos.json")
COMMAND = "PYTHONPATH=tests python benchmarks/chaos.py"
NUM_RUNS = 10
NUM_ROWS = 320
WITH_VLLM = (3, 6)
WITH_SPLIT_MODEL = 6

logger = logging.getLogger("chaos")


def main(runs: int = NUM_RUNS) -> None:
    """Do what has no result yet.

    Args:
        runs: Do at most so many now.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    artifacts = tiny_artifacts()
    left = [number for number in range(NUM_RUNS) if not result_of(number).exists()]
    for number in left[:runs]:
        found = run(number, artifacts)
        result_of(number).write_text(json.dumps(found, indent=2))
        logger.info("run %d: %s", number, found)
    if not left[runs:]:
        note([json.loads(result_of(number).read_text()) for number in range(NUM_RUNS)])


def result_of(number: int) -> Path:
    """Where a finished run is kept."""
    return WORK / f"run-{number}.json"


def targets_of(number: int) -> list[Target]:
    """What is killed in a run."""
    targets: list[Target] = ["image encoder", "retrieval", "generation", "generation"]
    targets.append("node" if is_on_nodes(number) else "task")
    targets.append("driver, asked to stop" if number % 4 == 2 else "driver")
    if number == WITH_SPLIT_MODEL:
        targets.append("engine worker")
    return targets


def is_on_nodes(number: int) -> bool:
    """Whether a run is on a cluster, and on S3."""
    return number % 2 == 1


def run(number: int, artifacts: dict[str, Path]) -> dict[str, Any]:
    """One run and its comparison with the undisturbed one of its engine."""
    directory = WORK / f"run-{number}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    engine = "vllm" if number in WITH_VLLM else "transformers"
    options = ["--language-model.tensor-parallel-size=2"] if number == WITH_SPLIT_MODEL else []
    expected = undisturbed(engine, artifacts)
    started = time.monotonic()
    with serve_s3() as server, nodes(2) if is_on_nodes(number) else nullcontext() as cluster:
        root = server.uri if cluster is not None else str(directory)
        corpus = Corpus.write(f"{root}/corpus", artifacts, NUM_ROWS)
        output = f"{root}/output"
        environment = {} if cluster is None else {"RAY_ADDRESS": cluster.address}
        command = corpus.command(directory / "link.toml", output, *options, engine=engine)
        chaos = Chaos(command, output, directory / "log.txt", environment, cluster, [])
        chaos.run(Blow.draw(targets_of(number), seed=number))
        damage = Damage.of(output, expected)
    return {
        "seed": number,
        "engine": engine,
        "on": "two nodes and S3" if cluster is not None else "one node and local files",
        "kills": chaos.kills,
        "drivers": chaos.num_drivers,
        "seconds": time.monotonic() - started,
        **asdict(damage),
    }


def undisturbed(engine: str, artifacts: dict[str, Path]) -> str:
    """The output of an engine that nobody disturbs."""
    directory = WORK / f"undisturbed-{engine}"
    if not (directory / "output/_report.json").exists():
        corpus = Corpus.write(f"{directory}/corpus", artifacts, NUM_ROWS)
        link(corpus, directory, engine=engine)
    return f"{directory}/output"


def tiny_artifacts() -> dict[str, Path]:
    """Models and artifacts of the tests, made once."""
    directory = WORK / "artifacts"
    paths = WORK / "artifacts.json"
    if not paths.exists():
        shutil.rmtree(directory, ignore_errors=True)
        for name in ("language_model", "mention_encoder", "artifacts"):
            (directory / name).mkdir(parents=True)
        language_model = save_tiny_model("llama", tiny_tokenizer(), directory / "language_model")
        mention_encoder = save_mention_encoder(directory / "mention_encoder")
        made = save_artifacts(directory / "artifacts", language_model, mention_encoder)
        paths.write_text(json.dumps({name: str(path) for name, path in made.items()}))
    return {name: Path(path) for name, path in json.loads(paths.read_text()).items()}


def note(runs: list[dict[str, Any]]) -> None:
    """Write the results."""
    what = (
        f"{NUM_ROWS} rows a run in shards of 16, tiny random models, float32; seeds 0 to {NUM_RUNS - 1}, of which "
        f"{sum(run['on'].startswith('two') for run in runs)} on two nodes and S3, "
        f"{sum(run['engine'] == 'vllm' for run in runs)} with vLLM; the others with the engine transformers"
    )
    kills = [kill for run in runs for kill in run["kills"]]
    values: dict[str, object] = {"kills": len(kills), "runs": len(runs)}
    values["kills_by_target"] = {target: kills.count(target) for target in sorted(set(kills))}
    values["drivers"] = sum(run["drivers"] for run in runs)
    for name in ("rows_lost", "rows_twice", "rows_different", "innocent_poison"):
        values[name] = sum(run[name] for run in runs)
    results = {name: record(value, COMMAND, what) for name, value in values.items()}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    logger.info("%s", values)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

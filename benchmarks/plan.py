"""How well `gemel plan` predicts: time, memory and output of a run ten times its sample, beside what the run took.

python benchmarks/plan.py WIKIDIVERSE

WIKIDIVERSE is the directory of the corpus; needs `build/wikidiverse`, which `benchmarks/wikidiverse.py` makes. Of some
mentions of dev a tenth is linked as the sample, once in windows and once in as many single rows, which is what one
would do without knowing of the order; then all of them. Tokens are compared beside times, since they don't depend on
what else the machine does. Results go to `benchmarks/results/plan.json`; what is there is skipped, so that it can be
interrupted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import tyro
from record import record, run_script

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linking.plan import link_windows
from gemel_engine.pipeline.corpus import plan_shards

CONFIG = Path("build/wikidiverse/link.toml")
WORK = Path("build/plan")
RESULTS = Path("benchmarks/results/plan.json")
COMMAND = "python benchmarks/plan.py WIKIDIVERSE"

logger = logging.getLogger("plan")


def main(wikidiverse: tyro.conf.Positional[Path], *, num_mentions: int = 1000, rows_per_shard: int = 128) -> None:
    """Measure what has no result yet.

    Args:
        wikidiverse: Directory of the corpus.
        num_mentions: Of dev, drawn with a fixed seed.
        rows_per_shard: Of the run that is predicted.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    dev = pq.read_table(wikidiverse / "dev.parquet").drop_columns(["image_uri"])
    dev = dev.take(np.sort(np.random.default_rng(0).permutation(len(dev))[:num_mentions]))
    pq.write_table(dev, WORK / "dev.parquet")
    sample_rows = len(dev) // 10
    settings = ["--input", f"{WORK}/dev.parquet", "--output", f"{WORK}/linked", "--rows-per-shard", str(rows_per_shard)]
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    what = f"{len(dev)} mentions of WikiDiverse dev, 8 demonstrations, SmolLM2-135M in float32, one actor"
    if "planned" not in results:
        note(results, "planned", planned(settings, sample_rows), f"{what}; sample of at most {sample_rows}")
    if "single_rows" not in results:
        note(results, "single_rows", single_rows(settings, sample_rows), f"{what}; {sample_rows} rows drawn singly")
    if "run" not in results:
        note(results, "run", linked(settings), f"{what}; the whole run")
    note(results, "compared", compared(results), what)


def planned(settings: Sequence[str], sample_rows: int) -> dict[str, Any]:
    """What `gemel plan` says."""
    options = ["--sample-rows", str(sample_rows), "--write-to", f"{WORK}/plan.json"]
    spent = run("-m", "gemel_engine.cli.main", "plan", str(CONFIG), *options, *settings)
    plan: dict[str, Any] = json.loads((WORK / "plan.json").read_text())
    return plan | {"sampling_seconds": spent}


def single_rows(settings: Sequence[str], sample_rows: int) -> dict[str, float]:
    """Seconds of generation for a row, from as many rows as the windows have, drawn one by one."""
    config = replace(load_config(LinkConfig, CONFIG, settings), output=f"{WORK}/single_rows")
    plan = plan_shards(config.input, config.rows_per_shard)
    drawn = np.random.default_rng(0).permutation(sum(shard.stop - shard.start for shard in plan))[:sample_rows]
    sample = link_windows(config, plan, np.array_split(drawn, 17))
    ray.shutdown()
    return {
        "generation_seconds_per_row": sum(sample.stage_seconds["generation"][1:]) / sum(sample.rows[1:]),
        "computed_tokens_per_row": sample.tally.computed_tokens / sample.tally.rows,
    }


def linked(settings: Sequence[str]) -> dict[str, Any]:
    """What the run took."""
    shutil.rmtree(WORK / "linked", ignore_errors=True)
    spent = run("jobs/link_corpus.py", str(CONFIG), *settings)
    report: dict[str, Any] = json.loads((WORK / "linked/_report.json").read_text())
    output_bytes = sum(path.stat().st_size for path in (WORK / "linked/data").iterdir())
    return report | {"process_seconds": spent, "output_bytes": output_bytes}


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """Predicted over actual, and whether the actual time lies within the interval."""
    plan, report = results["planned"]["value"], results["run"]["value"]
    (cluster,) = plan["clusters"]
    seconds = cluster["seconds"]
    single = results["single_rows"]["value"]
    per_row = report["stage_seconds"]["generation"] / report["rows"]
    tokens_per_row = (report["prompt_tokens"] - report["cached_tokens"]) / report["rows"]
    return {
        "seconds_predicted": seconds["value"],
        "seconds_interval": [seconds["low"], seconds["high"]],
        "seconds_actual": report["seconds"],
        "seconds_ratio": seconds["value"] / report["seconds"],
        "within_interval": seconds["low"] <= report["seconds"] <= seconds["high"],
        "generation_seconds_per_row_ratio": plan["seconds_per_row"]["generation"]["value"] / per_row,
        "generation_seconds_per_row_ratio_single_rows": single["generation_seconds_per_row"] / per_row,
        "computed_tokens_per_row_ratio": plan["computed_tokens_per_row"] / tokens_per_row,
        "computed_tokens_per_row_ratio_single_rows": single["computed_tokens_per_row"] / tokens_per_row,
        "peak_bytes_ratio": {stage: plan["peak_bytes"][stage] / peak for stage, peak in report["peak_bytes"].items()},
        "output_bytes_ratio": plan["output_bytes"] / report["output_bytes"],
    }


def run(*command: str) -> float:
    """Run a script of the project with this Python; its output goes to a log. Returns its seconds."""
    started = time.perf_counter()
    run_script(WORK / "log.txt", *command)
    return time.perf_counter() - started


def note(results: dict[str, Any], key: str, value: object, what: str) -> None:
    """Write a result."""
    results[key] = record(value, COMMAND, what)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    logger.info("%s: %s", key, value)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

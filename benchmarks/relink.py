"""What a change of the knowledge base costs: updating it, and linking again what the change can touch.

python benchmarks/relink.py WIKIDIVERSE

WIKIDIVERSE holds `train.parquet`, `dev.parquet` and `entities.parquet`; needs `build/wikidiverse`, which
`benchmarks/wikidiverse.py` makes. Of the entities, one in a hundred is added, one renamed and one retired; or one is
retired and nothing else changes. The linking job links a sample of dev before the change, carries that run on after it,
and links everything after it. With `build/decode/union`, which `benchmarks/decode.py` makes, the first change is also
made to its millions of names. Results go to `benchmarks/results/relink.json`; what is there is skipped, so that it can
be interrupted.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from record import record, run_script

from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.knowledge_base.store import MANIFEST
from gemel_engine.knowledge_base.update import local_knowledge_base, open_knowledge_base, update_knowledge_base
from gemel_engine.tokenizer import load_tokenizer

CONFIG = Path("build/wikidiverse/link.toml")
LARGE = Path("build/decode/union")
WORK = Path("build/relink")
RESULTS = Path("benchmarks/results/relink.json")
SHARE, SEED = 0.01, 0

run = partial(run_script, WORK / "log.txt")
logger = logging.getLogger("relink")


def main(wikidiverse: tyro.conf.Positional[Path], *, num_mentions: int = 100, large: bool = False) -> None:
    """Measure what has no result yet.

    Args:
        wikidiverse: Directory of the corpus.
        num_mentions: Of dev, drawn with a fixed seed.
        large: Change the large knowledge base, print what that took and note nothing.
    """
    if large:
        print(json.dumps(cost_of_update()))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    changes = prepare(wikidiverse, num_mentions)
    what = f"{num_mentions} mentions of dev, 8 demonstrations, float32, one run of each job"
    for name in changes:
        if name not in results:
            note(results, name, cost_of_relinking(name), what)
    if "large" not in results and LARGE.exists():
        command = [sys.executable, __file__, str(wikidiverse), "--large"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        note(results, "large", json.loads(found), f"{SHARE:.0%} of {LARGE} added, renamed and retired each, one run")


def note(results: dict[str, Any], name: str, value: object, what: str) -> None:
    """Write a result."""
    results[name] = record(value, "python benchmarks/relink.py WIKIDIVERSE", what)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    logger.info("%s: %s", name, value)


def prepare(wikidiverse: Path, num_mentions: int) -> dict[str, pa.Table]:
    """Build the knowledge base before the changes, its updates and the sample, where they are missing.

    After the changes the entities are those of the corpus, but for the retired ones.
    """
    entities = pq.read_table(wikidiverse / "entities.parquet", columns=["entity_id", "name"])
    count = round(SHARE * len(entities))
    drawn = random.Random(SEED).sample(range(len(entities)), 3 * count)
    is_added, is_renamed, is_retired = (
        pa.array(np.isin(np.arange(len(entities)), drawn[start : start + count])) for start in (0, count, 2 * count)
    )
    old_names = pc.binary_join_element_wise(entities["name"], pa.scalar("as it was called before"), ", ")
    before = entities.set_column(1, "name", pc.if_else(is_renamed, old_names, entities["name"]))
    retired = entities.filter(is_retired).append_column("retired", pa.array([True] * count))
    new = entities.filter(pc.or_(is_added, is_renamed))
    changes = {
        "added_renamed_retired": pa.concat_tables([new, retired], promote_options="default"),
        "retired": retired,
    }
    model = load_config(LinkConfig, CONFIG).language_model.name
    if not (WORK / "before" / MANIFEST).exists():
        pq.write_table(before.filter(pc.invert(is_added)), WORK / "before.parquet")
        run(
            "-m",
            "gemel_engine.cli.main",
            "build-kb",
            f"{WORK}/before.parquet",
            f"{WORK}/before",
            "--tokenizer",
            model,
            "--no-evidence",
        )
    for name, table in changes.items():
        if not (WORK / name / MANIFEST).exists():
            pq.write_table(table, WORK / f"{name}.parquet")
            arguments = (f"{WORK}/before", f"{WORK}/{name}.parquet", f"{WORK}/{name}")
            run("-m", "gemel_engine.cli.main", "update-kb", *arguments, "--tokenizer", model)
    if not (WORK / "sample.parquet").exists():
        dev = pq.read_table(wikidiverse / "dev.parquet").drop_columns(["image_uri"])
        rows = sorted(random.Random(SEED).sample(range(dev.num_rows), min(num_mentions, dev.num_rows)))
        pq.write_table(dev.take(pa.array(rows)), WORK / "sample.parquet")
    return changes


def cost_of_relinking(name: str) -> dict[str, float | int | None]:
    """A carried-on run beside one that links everything: what they asked of the model, and whether they agree."""
    link("before", "linked_before")
    link(name, f"{name}_carried_on", "--previous", f"{WORK}/linked_before")
    link(name, f"{name}_in_full")
    carried_on, in_full = (report(f"{name}_{kind}") for kind in ("carried_on", "in_full"))
    counts = carried_on.pop("carried_over")
    ours, theirs = (predictions(f"{name}_{kind}") for kind in ("carried_on", "in_full"))
    certified = [mention for mention in ours if ours[mention]["certified"] and theirs[mention]["certified"]]
    num_equal = sum(
        ours[mention]["entity_id"] == theirs[mention]["entity_id"]
        and abs(ours[mention]["log_prob"] - theirs[mention]["log_prob"]) < 1e-3
        for mention in certified
    )
    return {
        **{key: counts[key] for key in ("num_changed_entities", "num_added_names")},
        **{key: counts[key] for key in ("rows_kept", "rows_extended", "rows_linked")},
        "rows": len(ours),
        "certified_in_both": len(certified),
        "equal_of_these": num_equal,
        "rollouts": carried_on["rollouts"],
        "rollouts_in_full": in_full["rollouts"],
        "prompt_tokens_computed": carried_on["prompt_tokens"] - carried_on["cached_tokens"],
        "prompt_tokens_computed_in_full": in_full["prompt_tokens"] - in_full["cached_tokens"],
        "generation_seconds": carried_on["stage_seconds"]["generation"],
        "generation_seconds_in_full": in_full["stage_seconds"]["generation"],
        "job_seconds": carried_on["seconds"],
        "job_seconds_in_full": in_full["seconds"],
    }


def cost_of_update() -> dict[str, float]:
    """Seconds of changing the large knowledge base, and of merging the change where it is opened first."""
    entities = open_knowledge_base(str(LARGE)).table().select(["entity_id", "name"])
    count = round(SHARE * len(entities))
    drawn = entities.take(np.random.default_rng(SEED).choice(len(entities), 2 * count, replace=False))
    names = pc.binary_join_element_wise(drawn["name"].slice(0, count), pa.scalar("renamed", pa.large_string()), " ")
    renamed = pa.table({"entity_id": drawn["entity_id"].slice(0, count), "name": names})
    new_ids = pa.array([f"N{row}" for row in range(count)], pa.large_string())
    new_names = pa.array([f"an entity that is new, number {row}" for row in range(count)], pa.large_string())
    retired = drawn.slice(count).append_column("retired", pa.array([True] * count))
    changes = pa.concat_tables(
        [renamed, pa.table({"entity_id": new_ids, "name": new_names}), retired], promote_options="default"
    )
    tokenizer = load_tokenizer(load_config(LinkConfig, CONFIG).language_model.name)
    for directory in ("large", "cache"):
        shutil.rmtree(WORK / directory, ignore_errors=True)
    started = time.perf_counter()
    settings = KnowledgeBaseSettings(on_bad_name="skip")
    update_knowledge_base(str(LARGE), changes, tokenizer, WORK / "large", settings)
    update_seconds = time.perf_counter() - started
    started = time.perf_counter()
    merged = local_knowledge_base(str(WORK / "large"), WORK / "cache")
    merge_seconds = time.perf_counter() - started
    return {
        "names": open_knowledge_base(str(merged)).trie.num_names,
        "changes": len(changes),
        "update_seconds": update_seconds,
        "merge_seconds": merge_seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def link(knowledge_base: str, output: str, *overrides: str) -> None:
    """Run the linking job, unless it has finished; an interrupted run goes on, and its costs are those of the rest."""
    if not (WORK / output / "_report.json").exists():
        arguments = ("--input", f"{WORK}/sample.parquet", "--output", f"{WORK}/{output}")
        settings = ("--knowledge-base", f"{WORK}/{knowledge_base}", "--search.ranking", "objective", *overrides)
        run("jobs/link_corpus.py", str(CONFIG), *arguments, *settings)


def report(output: str) -> dict[str, Any]:
    """`_report.json` of a run."""
    return dict(json.loads((WORK / output / "_report.json").read_text()))


def predictions(output: str) -> dict[str, dict[str, Any]]:
    """Rows of a run by mention."""
    return {row["mention_id"]: row for row in pq.read_table(WORK / output / "data").to_pylist()}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

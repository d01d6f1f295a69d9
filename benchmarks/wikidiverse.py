"""Accuracy on WikiDiverse dev, text only, by number and choice of demonstrations and by terminator.

python benchmarks/wikidiverse.py DATA --language-model MODEL --mention-encoder MODEL

DATA holds `train.parquet`, `dev.parquet` and `entities.parquet`. A fixed sample of dev is linked by the linking job,
once for each setting; settings that `benchmarks/results/wikidiverse.json` already has are skipped, so that it can be
interrupted. Nothing is chosen on test.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from record import record, run_script

RESULTS = Path("benchmarks/results/wikidiverse.json")
WORK = Path("build/wikidiverse")
SEED = 0

run = partial(run_script, WORK / "log.txt")
logger = logging.getLogger("wikidiverse")


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    num_demonstrations: int
    policy: str
    terminator: str

    @property
    def name(self) -> str:
        """Key in the results."""
        kind = f"{self.num_demonstrations}_{self.policy}" if self.num_demonstrations else "0"
        return f"{kind}_{self.terminator}"


# The cheap and telling ones first. Random demonstrations are measured with the default terminator alone: with EOS the
# search spends its whole budget, and neither is a setting to use.
SETTINGS = [
    Setting(0, "similar", "newline"),
    Setting(8, "similar", "newline"),
    Setting(4, "similar", "newline"),
    Setting(0, "similar", "eos"),
    Setting(4, "random", "newline"),
    Setting(8, "similar", "eos"),
    Setting(4, "similar", "eos"),
    Setting(8, "random", "newline"),
]


def main(
    data: tyro.conf.Positional[Path], *, language_model: str, mention_encoder: str, num_mentions: int = 300
) -> None:
    """Measure all settings that have no result yet.

    Args:
        data: Directory of the corpus.
        language_model: Local directory, or name on the model hub.
        mention_encoder: Local directory, or name on the model hub.
        num_mentions: Size of the sample of dev.
    """
    prepare(data, language_model, mention_encoder, num_mentions)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    gold = {row["mention_id"]: row["entity_id"] for row in pq.read_table(WORK / "sample.parquet").to_pylist()}
    if "baseline_without_model" not in results:
        results["baseline_without_model"] = noted({"accuracy": baseline(data)}, language_model, mention_encoder)
        save(results)
    for setting in SETTINGS:
        if setting.name not in results:
            results[setting.name] = noted(measure(setting, gold), language_model, mention_encoder)
            save(results)
        logger.info("%s %s", setting.name, results[setting.name]["value"])


def prepare(data: Path, language_model: str, mention_encoder: str, num_mentions: int) -> None:
    """Build the knowledge base, the demonstration index, the sample and the configuration, where they are missing."""
    WORK.mkdir(parents=True, exist_ok=True)
    entities = str(data / "entities.parquet")
    if not (WORK / "knowledge_base").exists():
        run(
            "-m",
            "gemel_engine.cli.main",
            "build-kb",
            entities,
            str(WORK / "knowledge_base"),
            "--tokenizer",
            language_model,
            "--no-evidence",  # the model and its demonstrations alone are measured
        )
    if not (WORK / "demonstrations/index.json").exists():
        train = str(data / "train.parquet")
        target = str(WORK / "demonstrations")
        run(
            "-m",
            "gemel_engine.cli.main",
            "build-demonstrations",
            train,
            entities,
            target,
            "--mention-encoder",
            mention_encoder,
        )
    if not (WORK / "sample.parquet").exists():
        dev = pq.read_table(data / "dev.parquet").drop_columns(["image_uri"])
        rows = sorted(random.Random(SEED).sample(range(dev.num_rows), num_mentions))
        pq.write_table(dev.take(pa.array(rows)), WORK / "sample.parquet")
    (WORK / "link.toml").write_text(
        f"""input = "{WORK}/sample.parquet"
output = "{WORK}/linked"
knowledge_base = "{WORK}/knowledge_base"
demonstrations = "{WORK}/demonstrations"
rows_per_shard = 100

[language_model]
name = "{language_model}"
dtype = "float32"

[retrieval]
mention_encoder = "{mention_encoder}"

[resources.retrieval]
num_cpus = 0.25
num_threads = 2

[resources.generation]
num_threads = 2
"""
    )


def measure(setting: Setting, gold: dict[str, str]) -> dict[str, float | None]:
    """Link the sample with one setting; an interrupted run goes on, and its costs are those of the rest."""
    output = WORK / "linked" / setting.name
    run(
        "jobs/link_corpus.py",
        str(WORK / "link.toml"),
        *("--output", str(output)),
        *("--retrieval.num-demonstrations", str(setting.num_demonstrations)),
        *("--retrieval.policy", setting.policy),
        *("--prompt.terminator", setting.terminator),
        *("--search.ranking", "objective"),  # the default when the table was made
    )
    report = json.loads((output / "_report.json").read_text())
    linked = pq.read_table(output / "data", columns=["mention_id", "entity_id"]).to_pylist()
    return {
        "accuracy": sum(gold[row["mention_id"]] == row["entity_id"] for row in linked) / len(gold),
        "certified_share": report["certified_share"],
        "rollouts_per_mention": report["rollouts_per_mention"],
        "prefix_cache_hit_rate": report["prefix_cache_hit_rate"],
        "generation_seconds_per_mention": report["stage_seconds"]["generation"] / report["rows_linked_now"],
    }


def baseline(data: Path) -> float:
    """Accuracy of `guesses` on the sample."""
    sample = pq.read_table(WORK / "sample.parquet").to_pylist()
    guessed = guesses(data, [row["mention"] for row in sample])
    return sum(bool(guess == row["entity_id"]) for guess, row in zip(guessed, sample, strict=True)) / len(sample)


def guesses(data: Path, surface_forms: Sequence[str]) -> list[str | None]:
    """The commonest training entity of each surface form, else the entity of that name."""
    counts: dict[str, Counter[str]] = {}
    for row in pq.read_table(data / "train.parquet", columns=["mention", "entity_id"]).to_pylist():
        counts.setdefault(row["mention"], Counter())[row["entity_id"]] += 1
    entities = pq.read_table(data / "entities.parquet", columns=["entity_id", "name"]).to_pylist()
    entity_of_name = {row["name"]: row["entity_id"] for row in entities}
    return [counts[form].most_common(1)[0][0] if form in counts else entity_of_name.get(form) for form in surface_forms]


def noted(value: dict[str, float | None], language_model: str, mention_encoder: str) -> dict[str, Any]:
    """A result with what made it."""
    num_mentions = pq.read_metadata(WORK / "sample.parquet").num_rows
    command = (
        f"python benchmarks/wikidiverse.py DATA --language-model {language_model} "
        f"--mention-encoder {mention_encoder} --num-mentions {num_mentions}"
    )
    return record(value, command, f"{num_mentions} mentions of dev, seed {SEED}, text only")


def save(results: dict[str, Any]) -> None:
    """Write the results."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

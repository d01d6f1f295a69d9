"""One factor at a time: prefix length, start, feature scaling, demonstrations with and without their pictures.

python benchmarks/mapper_ablation.py [--rows ...]

Each row trains the emoji mapper for a few small steps with one setting changed, and links 300 mentions of dev with it
over all names. Otherwise the settings are those of `jobs/configs/emoji.toml`, which the row "base" changes in nothing:
P = 4, the closed form of ridge regression as the start, features z-scored and brought to one length, 2 demonstrations
and one more by its picture (every row but that of 0 has that one). A random start is tried with higher learning rates,
too. All rows train with the language model in float32, in which every CPU is fast. Rows that
`benchmarks/results/mapper_ablation.json` has are skipped, so that the table can be made over days.
"""

from __future__ import annotations

import json
import logging
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro
from emoji_mapper import CORPUS
from record import record, run_script, to_digits

WORK = Path("build/mapper_ablation")
RESULTS = Path("benchmarks/results/mapper_ablation.json")
NUM_MENTIONS = 300
SEED = 1
BATCH_SIZE, NUM_STEPS = 8, 24  # 3 to 6 minutes on two cores with AVX2

RATES = ("1e-4", "5e-4", "2.5e-3")  # for a random start; the configuration's was chosen for the closed form

_WITHOUT_PICTURES = ("--prompt.no-demonstration-pictures",)
_RANDOM = ("--mapper.initialisation", "random")

# Settings that training and linking share, and those of training alone, for each row.
ROWS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "base": ((), ()),
    "P = 1": ((), ("--mapper.prefix-length", "1")),
    "P = 8": ((), ("--mapper.prefix-length", "8")),
    "random start": ((), _RANDOM),
    **{f"random start, rate {rate}": ((), (*_RANDOM, "--optimisation.learning-rate", rate)) for rate in RATES},
    "features as they are": ((), ("--mapper.scaling", "none")),
    "features z-scored": ((), ("--mapper.scaling", "z_score")),
    "0 demonstrations": (("--retrieval.num-demonstrations", "0", "--retrieval.num-similar-pictures", "0"), ()),
    "2 demonstrations without pictures": (_WITHOUT_PICTURES, ()),
    **{
        f"{number} demonstrations{what}": (("--retrieval.num-demonstrations", str(number), *flags), ())
        for number in (4, 8)
        for what, flags in (("", ()), (" without pictures", _WITHOUT_PICTURES))
    },
}

_EXAMPLE_SETTINGS = ("--retrieval.num-demonstrations", "--mapper.prefix-length")

logger = logging.getLogger("mapper_ablation")


def main(*, rows: tuple[str, ...] = tuple(ROWS)) -> None:
    """Measure the rows that have no result yet.

    Args:
        rows: Which rows of the table.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    gold = write_sample()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in rows:
        if name not in results:
            results[name] = measure(name, gold)
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            logger.info("%s: %s", name, results[name]["value"])


def write_sample() -> dict[str, str]:
    """Draw the mentions of dev; returns their answers."""
    rows = pq.read_table(CORPUS / "dev.parquet")
    drawn = random.Random(SEED).sample(range(len(rows)), NUM_MENTIONS)
    sample = rows.take(sorted(drawn))
    if not (WORK / "sample.parquet").exists():  # a run that was interrupted goes on with the file that it began with
        pq.write_table(sample, WORK / "sample.parquet")
    return {row["mention_id"]: row["entity_id"] for row in sample.to_pylist()}


def measure(name: str, gold: dict[str, str]) -> dict[str, Any]:
    """Train and link one row."""
    shared, own = ROWS[name]
    directory = WORK / name.replace(" ", "_").replace("=", "is")
    # Runs share prepared examples where those do not differ: in the number of demonstrations and the prefix length.
    changed = [(key, value) for key, value in pairwise((*shared, *own)) if key in _EXAMPLE_SETTINGS]
    examples = "_".join(f"{key.rpartition('.')[2]}_{value}" for key, value in changed) or "base"
    training = [
        *("jobs/train.py", "jobs/configs/emoji.toml", "--output", f"{directory}/training", *shared, *own),
        *("--language-model.dtype", "float32", "--optimisation.batch-size", str(BATCH_SIZE)),
        *("--optimisation.epochs", "1", "--optimisation.max-steps", str(NUM_STEPS)),
        *("--workers.report-every", str(NUM_STEPS)),
        # Without validation the last step's mapper is kept, whatever it is worth.
        *("--validation.num-mentions", "0", "--examples", f"{WORK}/examples/{examples}"),
    ]
    linking = [
        *("jobs/link_corpus.py", "examples/emoji/link.toml", "--input", f"{WORK}/sample.parquet"),
        *("--output", f"{directory}/linked", *shared),
        *("--vision.feature-mapper", f"{directory}/training/feature_mapper"),
    ]
    for command in (training, linking):
        run_script(WORK / "log.txt", *command)
    report = json.loads((directory / "training/_report.json").read_text())
    right = right_of(directory / "linked/data", gold)
    value = {
        "accuracy_all": sum(right) / NUM_MENTIONS,
        "steps": report["steps"],
        "loss": report["loss"],
        "right": to_digits(right),
    }
    commands = " && ".join(f"python {' '.join(command)}" for command in (training, linking))
    return record(value, commands, f"{NUM_MENTIONS} mentions of dev, seed {SEED}")


def right_of(linked: Path, gold: dict[str, str]) -> list[bool]:
    """Whether each mention of the sample, in its order, is linked to its entity."""
    rows = pq.read_table(linked, columns=["mention_id", "entity_id"]).to_pylist()
    answers = {row["mention_id"]: row["entity_id"] for row in rows}
    return [answers[mention_id] == entity_id for mention_id, entity_id in gold.items()]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

"""What the picture adds on the emoji corpus: text only, shuffled pictures, closed form, training, centroids.

python benchmarks/emoji_mapper.py [--splits dev test test_unseen] [--rows ...]

Mappers are made by the training job where they are missing. `benchmarks/results/emoji_mapper.json` keeps the answers of
each run, a mapper on a split, so that this can be interrupted; a row of the table is the mean over its runs. The
artists of dev and test drew none of the training pictures; the entities of test_unseen have no training mention.
Settings were chosen on dev alone.
"""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from record import commit, from_digits, machine, to_digits

from gemel_engine.assembly import load_picture_encoder, open_artifacts, start_generator
from gemel_engine.config.components import VisionSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.generator import Artifacts, EntityNameGenerator
from gemel_engine.evaluation.judge import Measured
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.types import Features, Mention
from gemel_engine.vision.mapper import FeatureMapper

CORPUS = Path("examples/emoji")
WORK = Path("build/emoji_mapper")
RESULTS = Path("benchmarks/results/emoji_mapper.json")
SPLITS = ("dev", "test", "test_unseen")
SEEDS = (0, 1, 2)
METRICS = ("accuracy_all", "accuracy_surface_form")
# Overrides of jobs/configs/emoji.toml, for each mapper.
MAPPERS = {
    "closed_form": ("--optimisation.epochs", "0"),
    **{f"trained_{seed}": ("--optimisation.seed", str(seed)) for seed in SEEDS},
    "random_init_trained": ("--mapper.initialisation", "random", "--optimisation.learning-rate", "5e-4"),
    "random_init_rate_2e-5": ("--mapper.initialisation", "random"),  # the closed form's rate
}
# Which runs a row is the mean of.
ROWS: dict[str, tuple[str, ...]] = {
    "text_only": ("text_only",),
    "shuffled": ("shuffled",),
    "closed_form": ("closed_form",),
    "trained": tuple(f"trained_{seed}" for seed in SEEDS),
    "random_init_trained": ("random_init_trained",),
    "random_init_rate_2e-5": ("random_init_rate_2e-5",),
    "centroids": ("centroids",),
}
# The mapper of a run that is not named after one.
MAPPER_OF = {"text_only": None, "shuffled": "trained_0", "centroids": None}

logger = logging.getLogger("emoji_mapper")


@dataclass(frozen=True, slots=True)
class Split:
    """Mentions of a split with what linking needs."""

    mentions: list[Mention]
    entity_ids: list[str]
    features: list[Features]
    candidates: list[tuple[str, ...]]  # the entities that share the surface form, in any split


def main(
    *,
    splits: tuple[str, ...] = SPLITS,
    rows: tuple[str, ...] = tuple(ROWS),
    num_mentions: int = 500,
    mapper: Path | None = None,
) -> None:
    """Measure what has no result yet.

    Args:
        splits: On which splits.
        rows: Which rows of the table.
        num_mentions: At most so many of a split, drawn with a fixed seed.
        mapper: Measure this mapper instead, and write no results: for choosing settings on dev.
    """
    config = load_config(LinkConfig, CORPUS / "link.toml", ("--search.ranking", "objective"))
    bench = _Bench(config, num_mentions)
    if mapper is not None:
        for split in splits:
            print(split, bench.accuracies(split, FeatureMapper.load(mapper)))
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs = results.setdefault("runs", {})
    for row in rows:
        for run in ROWS[row]:  # a mapper on all splits, before the next one is trained
            for split in splits:
                if split not in runs.setdefault(run, {}):
                    runs[run][split] = bench.run(run, split)
                    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        for split in splits:
            table = results if split == "test" else results.setdefault(split, {})
            table[row] = noted([runs[run][split] for run in ROWS[row]], row, split)
            logger.info("%s %s: %s", split, row, {key: value["value"] for key, value in table[row].items()})
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def train(name: str) -> None:
    """Train a mapper, unless that was done."""
    output = WORK / name
    if (output / "_report.json").exists():
        return
    WORK.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "jobs/train.py", "jobs/configs/emoji.toml", "--output", str(output), *MAPPERS[name]]
    with (WORK / f"{name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


class _Bench:
    """Links splits in this process."""

    def __init__(self, config: LinkConfig, num_mentions: int) -> None:
        self._config = config
        self._num_mentions = num_mentions
        self._artifacts = open_artifacts(replace(config, vision=VisionSettings()))  # mappers come one by one
        self._engine = start_generator(config, self._artifacts).engine
        assert self._artifacts.index is not None, "the demo has demonstrations"
        self._retriever = Retriever(
            config.retrieval, self._artifacts.knowledge_base, self._artifacts.index, self._artifacts.evidence
        )
        self._splits: dict[str, Split] = {}

    def run(self, run: str, name: str) -> dict[str, str]:
        """By metric, a digit for each mention of a split: 1 if its answer is right; and what it was measured with."""
        split = self._split(name)
        mapper_name = MAPPER_OF.get(run, run)
        if run == "centroids":
            right = centroids(self._artifacts, split)
        elif mapper_name is None:
            right = self._right(split, None)
        else:
            train(mapper_name)
            mapper = FeatureMapper.load(WORK / mapper_name / "feature_mapper")
            right = self._right(split, mapper, shuffled=run == "shuffled")
        return dict(zip(METRICS, map(to_digits, right), strict=True)) | {"commit": commit(), "machine": machine()}

    def accuracies(self, name: str, mapper: FeatureMapper | None) -> list[float]:
        """Accuracy over all names, and among the surface form's entities."""
        return [float(value) for value in self._right(self._split(name), mapper).mean(axis=1)]

    def _right(self, split: Split, mapper: FeatureMapper | None, *, shuffled: bool = False) -> NDArray[np.bool_]:
        artifacts = replace(self._artifacts, feature_mapper=mapper)
        config = self._config
        max_in_flight = config.language_model.max_num_seqs
        generator = EntityNameGenerator(artifacts, self._engine, config.prompt, config.search, max_in_flight)
        features: list[Features | None] = [None if mapper is None else item for item in split.features]
        if shuffled:
            random.Random(0).shuffle(features)
        retrieved = self._retriever.retrieve(split.mentions, features)
        of_all = generator.generate(split.mentions, features, retrieved)
        found = [prediction.entity_id for prediction in of_all]
        # The best of all names, where it is proved and one of the surface form's, is the best of these too.
        rows = [
            row
            for row, prediction in enumerate(of_all)
            if not (prediction.certified and prediction.entity_id in split.candidates[row])
        ]
        restricted = generator.generate(
            [replace(split.mentions[row], candidate_ids=split.candidates[row]) for row in rows],
            [features[row] for row in rows],
            [retrieved[row] for row in rows],
        )
        found_of_form = list(found)
        for row, prediction in zip(rows, restricted, strict=True):
            found_of_form[row] = prediction.entity_id
        return np.array(
            [
                [entity_id == gold for entity_id, gold in zip(ids, split.entity_ids, strict=True)]
                for ids in (found, found_of_form)
            ]
        )

    def _split(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = self._read(name)
        return self._splits[name]

    def _read(self, name: str) -> Split:
        table = pq.read_table(CORPUS / f"{name}.parquet")
        drawn = random.Random(0).sample(range(len(table)), min(self._num_mentions, len(table)))
        rows = sorted(table.take(drawn).to_pylist(), key=lambda row: (row["mention"], row["mention_id"]))
        mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
        encoded = load_picture_encoder(self._config.vision).encode([row["image_bytes"] for row in rows])
        features = [item for item in encoded if isinstance(item, np.ndarray)]
        entities = entities_of_forms()
        return Split(
            mentions,
            [row["entity_id"] for row in rows],
            features,
            [entities[mention.mention] for mention in mentions],
        )


def entities_of_forms() -> dict[str, tuple[str, ...]]:
    """All entities that a surface form stands for in any split."""
    entities = defaultdict(set)
    for name in ("train", *SPLITS):
        for row in pq.read_table(CORPUS / f"{name}.parquet", columns=["mention", "entity_id"]).to_pylist():
            entities[row["mention"]].add(row["entity_id"])
    return {form: tuple(sorted(ids)) for form, ids in entities.items()}


def centroids(artifacts: Artifacts, split: Split) -> NDArray[np.bool_]:
    """Without a language model: the entity whose training pictures' mean is nearest, by cosine of z-scored features."""
    index = artifacts.index
    assert index is not None, "the demo has demonstrations"
    pictures = [(item.entity_id, item.features) for item in (index[row] for row in range(len(index)))]
    training = np.stack([features for _, features in pictures if features is not None])
    mean, deviation = training.mean(axis=0), training.std(axis=0) + 1e-6
    of_entity = defaultdict(list)
    for entity_id, features in pictures:
        of_entity[entity_id].append((features - mean) / deviation)
    ids = sorted(of_entity)
    centres = normalised(np.stack([np.mean(of_entity[entity_id], axis=0) for entity_id in ids]))
    similarities = normalised((np.stack(split.features) - mean) / deviation) @ centres.T
    best_of_all = [ids[column] for column in similarities.argmax(axis=1)]
    number = {entity_id: column for column, entity_id in enumerate(ids)}
    best_of_form = [
        max(candidates, key=lambda entity_id: row[number[entity_id]] if entity_id in number else -1.0)
        for row, candidates in zip(similarities, split.candidates, strict=True)
    ]
    return np.array(
        [
            [found == gold for found, gold in zip(best, split.entity_ids, strict=True)]
            for best in (best_of_all, best_of_form)
        ]
    )


def normalised(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one."""
    lengths: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / lengths


def noted(runs: list[dict[str, str]], row: str, split: str) -> dict[str, Any]:
    """Accuracies of a row, the mean over its runs with a bootstrap 95% interval over mentions, and what made them."""
    command = f"python benchmarks/emoji_mapper.py --rows {row} --splits {split}"
    commits = ", ".join(dict.fromkeys(run["commit"][:12] for run in runs))
    machines = "; ".join(dict.fromkeys(run["machine"] for run in runs))
    result = {}
    for metric in METRICS:
        of_runs = np.array([from_digits(run[metric]) for run in runs])
        measured = Measured.of(of_runs.mean(axis=0))
        result[metric] = {
            "value": measured.value,
            "command": command,
            "commit": commits,
            "conditions": f"{measured.num_mentions} mentions of {split}, {len(runs)} run(s), {machines}",
            "interval": [measured.low, measured.high],
            "of_runs": of_runs.mean(axis=1).tolist(),
        }
    return result


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

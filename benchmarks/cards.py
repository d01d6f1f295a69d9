"""Accuracy on WikiDiverse dev with entity cards in the prompt, by number and order of cards and demonstrations.

python benchmarks/cards.py DATA --language-model MODEL --mention-encoder MODEL [--num-mentions 400] [--settings ...]

DATA holds `train.parquet`, `dev.parquet` and `entities.parquet` (names alone). Each of the settings, such as
"num_demonstrations=4 num_cards=4", is linked by one process with one engine; those that
`benchmarks/results/cards.json` has for the same mentions are skipped. "zero_shot=1" leaves the training mentions out:
neither demonstrations nor form statistics. The default settings, `--settings` "zero_shot=0" and "zero_shot=1", give the
figures `cards` and `zero_shot`. Surface forms are linked in random order and noted after each batch, so that what a
stopped run has noted is a sample, too.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from record import record, to_digits

from gemel_engine.config.components import EngineSettings, KnowledgeBaseSettings, RetrievalSettings, ScoreSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.linker import Linker
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.pipeline.knowledge_bases import build
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.reading import read_demonstrations, read_names
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import Mention, Prediction

RESULTS = Path("benchmarks/results/cards.json")
WORK = Path("build/cards")
SEED = 0
BATCH = 50  # mentions between two notes
FIGURES = {"zero_shot=0": "cards", "zero_shot=1": "zero_shot"}

logger = logging.getLogger("cards")


def main(
    data: tyro.conf.Positional[Path],
    *,
    language_model: str,
    mention_encoder: str,
    num_mentions: int | None = None,
    settings: tuple[str, ...] = (),
) -> None:
    """Link dev with each of the settings.

    Args:
        data: Directory of the corpus.
        language_model: Local directory, or name on the model hub.
        mention_encoder: Local directory, or name on the model hub.
        num_mentions: Size of a fixed sample of dev; None: all of it.
        settings: Settings of retrieval, each as `name=value` pairs with spaces; none: the defaults, with and without
            training mentions.
    """
    prepare(data, language_model, mention_encoder)
    rows = pq.read_table(data / "dev.parquet").to_pylist()
    if num_mentions is not None:
        rows = random.Random(SEED).sample(rows, num_mentions)
    rows.sort(key=lambda row: (row["mention"], row["mention_id"]))
    buckets = buckets_of(rows, data)
    linker = opened(data, language_model, mention_encoder)
    command = (
        f"python benchmarks/cards.py DATA --language-model {language_model} --mention-encoder {mention_encoder} "
        + ("" if num_mentions is None else f"--num-mentions {num_mentions} ")
    )
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for text in settings or ("zero_shot=0", "zero_shot=1"):
        key = f"{text} ({len(rows)})"
        if key in results and results[key]["value"]["mentions"] == len(rows):
            continue
        for values in measured(linker, rows, buckets, text):
            what = f"WikiDiverse dev, text only, {values['mentions']} mentions, SmolLM2-135M in float32, 7,642 names"
            note = partial(record, command=f'{command}--settings "{text}"', what=what)
            results[key] = note(values)
            if text in FIGURES:
                figures = {f"{FIGURES[text]}.{name}": value for name, value in values.items() if name != "right"}
                results |= {name: note(value) for name, value in figures.items()}
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
            logger.info("%s %s", key, {name: value for name, value in values.items() if name != "right"})


def opened(data: Path, language_model: str, mention_encoder: str) -> Linker:
    """A linker over the indexes of `prepare`, in which the language model ranks alone."""
    return Linker(
        LinkConfig(
            input=str(data / "dev.parquet"),
            output=str(WORK / "linked"),
            knowledge_base=str(WORK / "knowledge_base"),
            demonstrations=str(WORK / "demonstrations"),
            language_model=EngineSettings(name=language_model, dtype="float32"),
            retrieval=RetrievalSettings(mention_encoder=mention_encoder),
            score=ScoreSettings(kind="language_model"),
        )
    )


def prepare(data: Path, language_model: str, mention_encoder: str) -> None:
    """Build the knowledge base with its evidence index and the demonstration index, where they are missing."""
    encoders = EntityEncoders(mention_encoder=mention_encoder)
    build_knowledge_base(data / "entities.parquet", WORK / "knowledge_base", language_model, encoders)
    build_demonstrations(data, WORK / "demonstrations", mention_encoder)


def build_knowledge_base(entities: Path, directory: Path, language_model: str, encoders: EntityEncoders) -> None:
    """Build a knowledge base with its evidence index in a language model's tokens, where it is missing."""
    if not (directory / "knowledge_base.json").exists():
        build(str(entities), str(directory), load_tokenizer(language_model), KnowledgeBaseSettings(), encoders)


def build_demonstrations(data: Path, directory: Path, mention_encoder: str) -> None:
    """Build the demonstration index of a corpus' training mentions, where it is missing."""
    if not (directory / "index.json").exists():
        names = read_names(str(data / "entities.parquet"))
        demonstrations = read_demonstrations(str(data / "train.parquet"), names)
        DemonstrationIndex.build(directory, demonstrations, MentionEncoder(mention_encoder))


def buckets_of(rows: Sequence[dict[str, Any]], data: Path) -> list[str]:
    """The bucket of each mention, by what training has seen of it."""
    train = pq.read_table(data / "train.parquet", columns=["mention", "entity_id"]).to_pylist()
    forms, entities = {row["mention"] for row in train}, {row["entity_id"] for row in train}
    names = {row["entity_id"]: row["name"] for row in pq.read_table(data / "entities.parquet").to_pylist()}

    def bucket(row: dict[str, Any]) -> str:
        if row["mention"] in forms:
            return "form_seen"
        if row["entity_id"] in entities:
            return "entity_seen_form_unseen"
        is_name = row["mention"].casefold() == names[row["entity_id"]].casefold()
        return "unseen_name_is_form" if is_name else "unseen_other_name"

    return [bucket(row) for row in rows]


def measured(
    linker: Linker, rows: Sequence[dict[str, Any]], buckets: Sequence[str], text: str, *, with_pictures: bool = False
) -> Iterator[dict[str, object]]:
    """Link the mentions in batches, and yield the figures of those linked so far after each."""
    changes = {name: int(value) for name, value in (pair.split("=") for pair in text.split())}
    is_zero_shot = bool(changes.pop("zero_shot", 0))
    config, artifacts = linker.config, linker.generator.artifacts
    settings = RetrievalSettings(**{**asdict(config.retrieval), **changes})
    index = None if is_zero_shot else artifacts.index
    linker.retriever = Retriever(settings, artifacts.knowledge_base, index, artifacts.evidence)
    forms = sorted({row["mention"] for row in rows})
    place = dict(zip(forms, random.Random(SEED).sample(range(len(forms)), len(forms)), strict=True))
    order = sorted(range(len(rows)), key=lambda number: (place[rows[number]["mention"]], number))
    before, started = linker.generator.engine.cache_statistics.num_prompt_tokens, time.perf_counter()
    predictions: dict[int, Prediction] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in (rows[n] for n in batch)]
        pictures = [rows[number].get("image_bytes") if with_pictures else None for number in batch]
        predictions |= dict(zip(batch, linker.link(mentions, pictures), strict=True))
        num_tokens = linker.generator.engine.cache_statistics.num_prompt_tokens - before
        yield {
            **accuracies(predictions, rows, buckets),
            "prompt_tokens": round(num_tokens / len(predictions), 1),
            "seconds": round(time.perf_counter() - started, 1),
        }


def accuracies(
    predictions: dict[int, Prediction], rows: Sequence[dict[str, Any]], buckets: Sequence[str]
) -> dict[str, object]:
    """Accuracy in all and by bucket, rollouts for a mention, and a digit for each linked mention in the rows' order."""
    right, of_bucket = [], defaultdict(list)
    for number, prediction in sorted(predictions.items()):
        right.append(prediction.entity_id == rows[number]["entity_id"])
        of_bucket[buckets[number]].append(right[-1])
    return {
        "all": round(float(np.mean(right)), 4),
        **{bucket: round(float(np.mean(values)), 4) for bucket, values in sorted(of_bucket.items())},
        "rollouts": round(float(np.mean([found.num_rollouts or 0 for found in predictions.values()])), 2),
        "certified": round(float(np.mean([bool(found.certified) for found in predictions.values()])), 4),
        "mentions": len(predictions),
        "right": to_digits(right),
    }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

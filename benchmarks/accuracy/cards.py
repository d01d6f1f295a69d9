"""Accuracy with entity cards in the prompt, by number and order of cards and demonstrations.

    python -m benchmarks.accuracy cards DATA [--num-mentions 400] [--settings ...]
    python -m benchmarks.accuracy emoji SPLIT [--num-mentions 100] [--name emoji.test] [--combined] [--settings ...]

WikiDiverse dev takes up to an hour for each of the settings on two cores, 100 mentions of the emoji corpus a few
minutes. The language model ranks all names alone. Each of the settings, such as "num_demonstrations=4 num_cards=4", is
linked by one process with one engine; those of WikiDiverse that `benchmarks/results/cards.json` has for the same number
of mentions are skipped. "zero_shot=1" leaves the training mentions out: neither demonstrations nor form statistics. The
default settings, `--settings` "zero_shot=0" and "zero_shot=1", give the figures `cards` and `zero_shot`. Surface forms
are linked in random order and noted after each batch, so that what a stopped run has noted is a sample, too.

The emoji corpus is linked with its pictures and the demo's feature mapper, which was trained without cards. With
`--combined` the score ranks, all of whose weights are those of the package; these figures go to
`benchmarks/results/score.json`.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.corpora import (
    EMOJI,
    SEED,
    Row,
    buckets_of,
    emoji,
    in_order,
    mentions_of,
    read_rows,
    retriever,
    wikidiverse,
)
from benchmarks.record import ResultFile, mean, to_digits
from gemel_engine.config.components import ScoreSettings
from gemel_engine.linker import Linker
from gemel_engine.types import Prediction

BATCH = 50  # mentions between two notes
FIGURES = {"zero_shot=0": "cards", "zero_shot=1": "zero_shot"}


def main(
    data: tyro.conf.Positional[Path], *, num_mentions: int | None = None, settings: tuple[str, ...] = tuple(FIGURES)
) -> None:
    """Cards in prompts: link WikiDiverse dev with each of the settings.

    Args:
        data: Directory of WikiDiverse.
        num_mentions: Size of a fixed sample of dev; None: all of it.
        settings: Settings of retrieval, each as `name=value` pairs with spaces.
    """
    rows = in_order(read_rows(data / "dev.parquet", num_mentions))
    buckets = buckets_of(rows, data)
    linker = Linker(replace(wikidiverse(data), score=ScoreSettings(kind="language_model")))
    results = ResultFile("cards", {"DATA": data})
    for text in settings:
        key = f"{text} ({len(rows)})"
        if results.read().get(key, {"value": {"mentions": 0}})["value"]["mentions"] == len(rows):
            continue
        for values in measured(linker, rows, buckets, text):
            figures: dict[str, object] = {key: values}
            if text in FIGURES:
                figures |= {f"{FIGURES[text]}.{name}": value for name, value in values.items() if name != "right"}
            what = f"WikiDiverse dev, text only, {values['mentions']} mentions, SmolLM2-135M in float32, 7,642 names"
            results.note(figures, what)


def emoji_main(
    split: tyro.conf.Positional[Literal["dev", "sample", "test", "test_unseen"]],
    *,
    num_mentions: int = 100,
    name: str | None = None,
    combined: bool = False,
    settings: tuple[str, ...] = ("num_cards=3 num_own_cards=1",),
) -> None:
    """Cards in prompts with pictures: link a fixed sample of the emoji corpus with each of the settings.

    Args:
        split: Table of the example; `sample` is the demo's, of test.
        num_mentions: Size of the sample.
        name: Name of the figure of the last settings among the results; None: none.
        combined: Whether the score ranks.
        settings: Settings of retrieval, each as `name=value` pairs with spaces.
    """
    rows = in_order(read_rows(EMOJI / f"{split}.parquet", num_mentions))
    linker = Linker(replace(emoji(), score=ScoreSettings(kind="combined" if combined else "language_model")))
    results = ResultFile("score" if combined else "cards")
    for text in settings:
        for values in measured(linker, rows, [split] * len(rows), text):
            figures = {f"emoji {split}: {text} ({len(rows)})": values}
            if name is not None and text == settings[-1]:
                figures[name] = values["all"]
            what = f"{values['mentions']} mentions of {split}, all names, SmolLM2-135M in float32, the demo's mapper"
            results.note(figures, what)


def measured(linker: Linker, rows: Sequence[Row], buckets: Sequence[str], text: str) -> Iterator[dict[str, Any]]:
    """Link the mentions in batches, and yield the figures of those linked so far after each."""
    changes: dict[str, Any] = {name: int(value) for name, value in (pair.split("=") for pair in text.split())}
    is_zero_shot = bool(changes.pop("zero_shot", 0))
    artifacts, engine = linker.generator.artifacts, linker.generator.engine
    linker.retriever = retriever(
        replace(linker.config.retrieval, **changes), replace(artifacts, index=None) if is_zero_shot else artifacts
    )
    has_pictures = linker.config.vision.image_encoder is not None
    forms = sorted({row["mention"] for row in rows})
    place = dict(zip(forms, random.Random(SEED).sample(range(len(forms)), len(forms)), strict=True))
    order = sorted(range(len(rows)), key=lambda number: (place[rows[number]["mention"]], number))
    before, started = engine.cache_statistics.num_prompt_tokens, time.perf_counter()
    predictions: dict[int, Prediction] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        pictures = [rows[number]["image_bytes"] if has_pictures else None for number in batch]
        linked = linker.link(mentions_of(rows[number] for number in batch), pictures)
        predictions |= dict(zip(batch, linked, strict=True))
        yield {
            **accuracies(predictions, rows, buckets),
            "prompt_tokens": round((engine.cache_statistics.num_prompt_tokens - before) / len(predictions), 1),
            "seconds": round(time.perf_counter() - started, 1),
        }


def accuracies(predictions: dict[int, Prediction], rows: Sequence[Row], buckets: Sequence[str]) -> dict[str, object]:
    """Return accuracy in all and by bucket, rollouts for a mention, and a digit for each one in the rows' order."""
    right, of_bucket = [], defaultdict(list)
    for number, prediction in sorted(predictions.items()):
        right.append(prediction.entity_id == rows[number]["entity_id"])
        of_bucket[buckets[number]].append(right[-1])
    return {
        "all": mean(right),
        **{bucket: mean(values) for bucket, values in sorted(of_bucket.items())},
        "rollouts": mean([found.num_rollouts or 0 for found in predictions.values()], 2),
        "certified": mean([bool(found.certified) for found in predictions.values()]),
        "mentions": len(predictions),
        "right": to_digits(right),
    }

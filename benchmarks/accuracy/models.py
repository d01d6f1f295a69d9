"""Several language models on the same mentions: ranked by the model alone, and by the combined score.

    python -m benchmarks.accuracy models DATA MODEL... [--num-mentions 200] [--num-emoji 100]

Some hours for each model on two cores. A MODEL is a local directory, by whose name its rows are called. Each links a
fixed sample of the emoji corpus' dev, with pictures, through a feature mapper in closed form of its own, and by text
alone; and one of WikiDiverse dev by text alone. Settings are those of the package and of the demo; the weights of the
score are those of the package. What is built goes to `build/models_compared`, figures to
`benchmarks/results/models.json` after each batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.accuracy.ranking import with_weights
from benchmarks.corpora import (
    EMOJI,
    IMAGE_ENCODER,
    MENTION_ENCODER,
    SEED,
    Row,
    build_knowledge_base,
    emoji,
    mentions_of,
    read_rows,
    wikidiverse,
)
from benchmarks.record import ResultFile, difference, mean, to_digits
from gemel_engine.config.components import EngineSettings, PromptSettings, VisionSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.language_model import FrozenLanguageModel, language_model_fingerprint, needs_bos
from gemel_engine.errors import MentionError
from gemel_engine.linker import Linker
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.tokenizer import encode_text, load_tokenizer
from gemel_engine.vision.mapper import FeatureMapper

WORK = Path("build/models_compared")
PREFIX_LENGTH = 4
BATCH = 25


def main(
    data: tyro.conf.Positional[Path],
    models: tyro.conf.Positional[tuple[Path, ...]],
    *,
    num_mentions: int = 200,
    num_emoji: int = 100,
) -> None:
    """Several language models: link with each of them.

    Args:
        data: Directory of WikiDiverse.
        models: Local directories of language models.
        num_mentions: Size of the sample of WikiDiverse dev.
        num_emoji: Size of the sample of the emoji corpus' dev.
    """
    results = ResultFile("models", {"DATA": data})
    cells: tuple[tuple[str, Path, int, Callable[[Path], LinkConfig]], ...] = (
        ("emoji dev, pictures and text", EMOJI, num_emoji, of_pictures),
        ("emoji dev, text only", EMOJI, num_emoji, without_pictures),
        ("wikidiverse dev, text only", data, num_mentions, partial(of_texts, data)),
    )
    for corpus, tables, size, configured in cells:
        rows = read_rows(tables / "dev.parquet", size)
        for model in models:
            key = f"{model.name}: {corpus}"
            if results.read().get(key, {"value": {"mentions": 0}})["value"]["mentions"] == size:
                continue
            linker = Linker(configured(model))
            for values in measured(linker, rows):
                results.note({key: values}, f"{corpus}, float32")
            del linker


def measured(linker: Linker, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Link the mentions in batches, and yield the figures of those linked so far after each."""
    generators = {"language_model": with_weights(linker, None), "combined": linker.generator}
    right: dict[str, list[bool]] = {name: [] for name in generators}
    rollouts: dict[str, list[int]] = {name: [] for name in generators}
    started = time.perf_counter()
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        mentions = mentions_of(batch)
        pictures = [row["image_bytes"] if linker.config.vision.image_encoder else None for row in batch]
        encoded, retrieved = linker.prepare(mentions, pictures)
        features = [None if isinstance(item, MentionError) else item for item in encoded]
        for name, generator in generators.items():  # the second finds the prompts in the prefix cache
            predictions = generator.generate(mentions, features, retrieved)
            right[name] += [found.entity_id == row["entity_id"] for found, row in zip(predictions, batch, strict=True)]
            rollouts[name] += [found.num_rollouts or 0 for found in predictions]
        digits = {name: to_digits(values) for name, values in right.items()}
        yield {
            **{name: mean(values) for name, values in right.items()},
            "difference": difference(digits["combined"], digits["language_model"]),
            **{f"rollouts_{name}": mean(values, 2) for name, values in rollouts.items()},
            "mentions": start + len(batch),
            "seconds": round(time.perf_counter() - started, 1),
            **{f"right_{name}": values for name, values in digits.items()},
        }


def of_texts(data: Path, model: Path) -> LinkConfig:
    """Return the configuration for WikiDiverse, with what it names."""
    return replace(wikidiverse(data, str(model), WORK / model.name / "wikidiverse"), prompt=prompt(model))


def of_pictures(model: Path) -> LinkConfig:
    """Return the demo's configuration for another language model, with what it names."""
    config, knowledge_base = emoji(), WORK / model.name / "emoji"
    encoders = EntityEncoders(mention_encoder=MENTION_ENCODER, image_encoder=IMAGE_ENCODER)
    build_knowledge_base(EMOJI / "entities.parquet", knowledge_base, str(model), encoders)
    return replace(
        config,
        knowledge_base=str(knowledge_base),
        language_model=EngineSettings(name=str(model), dtype="float32"),
        prompt=prompt(model),
        vision=replace(config.vision, feature_mapper=str(closed_form(model, Path(str(config.demonstrations))))),
    )


def without_pictures(model: Path) -> LinkConfig:
    """Return the same without pictures of mentions and demonstrations."""
    return replace(of_pictures(model), vision=VisionSettings())


def closed_form(model: Path, demonstrations: Path) -> Path:
    """Return a mapper from pictures of training mentions to the model's embeddings of their names, in closed form."""
    path = WORK / model.name / "mapper"
    if (path / "mapper.json").exists():
        return path
    index, tokenizer = DemonstrationIndex.open(demonstrations), load_tokenizer(str(model))
    pictured = [item for item in map(index.__getitem__, range(len(index))) if item.features is not None]
    tokens = [list(islice(cycle(encode_text(tokenizer, item.name)), PREFIX_LENGTH)) for item in pictured]
    embeddings = FrozenLanguageModel(str(model)).embed_tokens(torch.tensor(tokens)).float()
    features = torch.from_numpy(np.stack([item.features for item in pictured if item.features is not None]))
    mapper = FeatureMapper.random(
        features.shape[1],
        PREFIX_LENGTH,
        embeddings.shape[2],
        SEED,
        scaling="z_score_norm",
        language_model_fingerprint=language_model_fingerprint(str(model)),
        image_encoder_fingerprint=index.metadata.image_encoder_fingerprint,
    )
    mapper.fit_scaling(features)
    mapper.fit_ridge(features, [embeddings], penalty=0.1, gain=1.5)  # as the demo's mapper begins
    mapper.save(path)
    return path


def prompt(model: Path) -> PromptSettings:
    """Return GEMEL's prompt, after BOS where the model needs it."""
    return PromptSettings(begin_with_bos=needs_bos(str(model)))

"""Several language models on the same mentions: ranked by the model alone, and by the combined score.

python benchmarks/models.py DATA MODEL... [--num-mentions 200] [--num-emoji 100]

DATA holds WikiDiverse's `train.parquet`, `dev.parquet` and `entities.parquet`; a MODEL is a local directory, by whose
name its row is called. Each links a fixed sample of dev by text alone, and of the emoji corpus' dev with pictures,
through a feature mapper in closed form of its own. Settings are those of the package and of the demo; the weights of
the score are those of the package, which were fitted with SmolLM2-135M. Needs the models and indexes of `make demo`.
What is built goes to `build/models_compared`, results to `benchmarks/results/models.json` after each batch.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import tyro
from cards import build_demonstrations, build_knowledge_base
from record import difference, record, to_digits
from score import with_weights

from gemel_engine.config.components import (
    EngineSettings,
    PromptSettings,
    RetrievalSettings,
    VisionSettings,
)
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.language_model import FrozenLanguageModel, language_model_fingerprint, load_model_config
from gemel_engine.errors import MentionError
from gemel_engine.linker import Linker
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.tokenizer import encode_text, load_tokenizer
from gemel_engine.types import Mention
from gemel_engine.vision.mapper import FeatureMapper

RESULTS = Path("benchmarks/results/models.json")
WORK = Path("build/models_compared")
EMOJI = Path("examples/emoji")
ENCODERS = EntityEncoders(mention_encoder="build/models/minilm", image_encoder="build/models/efficientnet-lite2")
NEED_BOS = ("gemma", "gemma2", "gemma3_text")  # without it, Gemma 3 predicts text hardly better than chance
PREFIX_LENGTH = 4
SEED, BATCH = 0, 25

logger = logging.getLogger("models")


def main(
    data: tyro.conf.Positional[Path],
    models: tyro.conf.Positional[tuple[Path, ...]],
    *,
    num_mentions: int = 200,
    num_emoji: int = 100,
) -> None:
    """Link with each of the models.

    Args:
        data: Directory of WikiDiverse.
        models: Local directories of language models.
        num_mentions: Size of the sample of WikiDiverse dev.
        num_emoji: Size of the sample of the emoji corpus' dev.
    """
    command = f"python benchmarks/models.py DATA {' '.join(map(str, models))} --num-mentions {num_mentions}"
    command += f" --num-emoji {num_emoji}"
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for corpus, table, size in (("wikidiverse", data, num_mentions), ("emoji", EMOJI, num_emoji)):
        rows = random.Random(SEED).sample(pq.read_table(table / "dev.parquet").to_pylist(), size)
        for model in models:
            key = f"{model.name}.{corpus}"
            if results.get(key, {"value": {"mentions": 0}})["value"]["mentions"] == size:
                continue
            linker = Linker(wikidiverse(data, model) if corpus == "wikidiverse" else emoji(model))
            what = f"{corpus} dev, {'pictures and text' if corpus == 'emoji' else 'text only'}, float32"
            for values in measured(linker, rows):
                results[key] = record(values, command, what)
                RESULTS.write_text(json.dumps(results, indent=2) + "\n")
                logger.info("%s %s", key, {name: value for name, value in values.items() if "right" not in name})
            del linker


def measured(linker: Linker, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Link the mentions in batches, and yield the figures of those linked so far after each."""
    generators = {"language_model": with_weights(linker, None), "combined": linker.generator}
    right: dict[str, list[bool]] = {name: [] for name in generators}
    rollouts: dict[str, list[int]] = {name: [] for name in generators}
    started = time.perf_counter()
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in batch]
        encoded, retrieved = linker.prepare(mentions, [row.get("image_bytes") for row in batch])
        features = [None if isinstance(item, MentionError) else item for item in encoded]
        for name, generator in generators.items():  # the second finds the prompts in the prefix cache
            predictions = generator.generate(mentions, features, retrieved)
            right[name] += [found.entity_id == row["entity_id"] for found, row in zip(predictions, batch, strict=True)]
            rollouts[name] += [found.num_rollouts or 0 for found in predictions]
        digits = {name: to_digits(values) for name, values in right.items()}
        yield {
            **{name: round(float(np.mean(values)), 4) for name, values in right.items()},
            "difference": difference(digits["combined"], digits["language_model"]),
            **{f"rollouts_{name}": round(float(np.mean(values)), 2) for name, values in rollouts.items()},
            "mentions": start + len(batch),
            "seconds": round(time.perf_counter() - started, 1),
            **{f"right_{name}": values for name, values in digits.items()},
        }


def wikidiverse(data: Path, model: Path) -> LinkConfig:
    """The configuration for WikiDiverse, with what it names."""
    demonstrations = WORK / "demonstrations"
    build_demonstrations(data, demonstrations, str(ENCODERS.mention_encoder))
    return LinkConfig(
        input=str(data / "dev.parquet"),
        output=str(WORK / "linked"),
        knowledge_base=knowledge_base(model, "wikidiverse", data, replace(ENCODERS, image_encoder=None)),
        demonstrations=str(demonstrations),
        language_model=engine(model),
        prompt=prompt(model),
        retrieval=RetrievalSettings(mention_encoder=ENCODERS.mention_encoder),
    )


def emoji(model: Path) -> LinkConfig:
    """The demo's configuration for another language model, with what it names."""
    config = load_config(LinkConfig, EMOJI / "link.toml")
    return replace(
        config,
        output=str(WORK / "linked"),
        knowledge_base=knowledge_base(model, "emoji", EMOJI, ENCODERS),
        language_model=engine(model),
        prompt=prompt(model),
        vision=VisionSettings(
            image_encoder=ENCODERS.image_encoder,
            feature_mapper=str(closed_form(model, Path(str(config.demonstrations)))),
        ),
    )


def knowledge_base(model: Path, corpus: str, tables: Path, encoders: EntityEncoders) -> str:
    """The knowledge base of a corpus in a model's tokens."""
    path = WORK / model.name / corpus
    build_knowledge_base(tables / "entities.parquet", path, str(model), encoders)
    return str(path)


def closed_form(model: Path, demonstrations: Path) -> Path:
    """A mapper from the pictures of training mentions to the model's embeddings of their names, without a gradient."""
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
    mapper.fit_ridge(features, embeddings, penalty=0.1, gain=1.5)  # as the demo's mapper begins
    mapper.save(path)
    return path


def engine(model: Path) -> EngineSettings:
    """Return settings of vLLM in what CPUs without instructions for bfloat16 are fastest in."""
    return EngineSettings(name=str(model), dtype="float32")


def prompt(model: Path) -> PromptSettings:
    """GEMEL's prompt, after BOS where the model needs it."""
    return PromptSettings(begin_with_bos=load_model_config(str(model)).model_type in NEED_BOS)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

"""How good the probabilities of a calibration are, and how well mentions outside the knowledge base are found.

python benchmarks/calibration.py DATA --language-model MODEL --mention-encoder MODEL

DATA holds `train.parquet`, `dev.parquet` and `entities.parquet` of WikiDiverse. Needs what `make demo` and
`benchmarks/cards.py` build. The dev splits of WikiDiverse (text) and of the emoji corpus are linked by evidence alone, so
that the language model is not asked. Surface forms are divided into two halves: each is judged by what `gemel calibrate`
fits to the other. NIL is learnt from entities held out of the pools, and judged where it is real: a knowledge base
is built without a random fifth of the entities. Results go to `benchmarks/results/calibration.json`.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from cards import WORK as CARDS
from cards import opened, prepare
from numpy.typing import NDArray
from record import record
from sklearn.metrics import roc_auc_score

from gemel_engine.cli.knowledge_bases import EncoderOptions
from gemel_engine.config.components import KnowledgeBaseSettings, ScoreSettings
from gemel_engine.config.loading import config_json, load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.errors import MentionError
from gemel_engine.evaluation.calibrate import calibrate_run
from gemel_engine.evaluation.quality import quality
from gemel_engine.evaluation.run import LinkedRun
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.linker import Linker
from gemel_engine.pipeline.knowledge_bases import build
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import Features, Mention, Prediction, predictions_to_table

WORK = Path("build/calibration")
RESULTS = Path("benchmarks/results/calibration.json")
EMOJI = Path("examples/emoji")
SEED = 0
REMOVED_SHARE = 0.2
NIL_PRECISION = 0.8

logger = logging.getLogger("calibration")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus with what retrieval finds for it in one knowledge base."""

    linker: Linker
    rows: list[dict[str, Any]]
    features: list[Features | None]
    retrieved: list[Retrieved]

    def linked(self, weights: ScoreWeights, calibration: Calibration | None = None) -> list[Prediction]:
        """Predictions by evidence alone: at any probability, it is certain enough."""
        config = self.linker.config
        generator = EntityNameGenerator(
            self.linker.generator.artifacts,
            self.linker.generator.engine,
            config.prompt,
            config.search,
            calibration=calibration,
            weights=replace(weights, risks=((0.0, 0.0),)),
            risk=1.0,
        )
        return generator.generate([mention_of(row) for row in self.rows], self.features, self.retrieved)

    @property
    def gold(self) -> list[str | None]:
        """Entity of each mention; None if the knowledge base lacks it."""
        row_of = self.linker.generator.artifacts.knowledge_base.row_of_entity
        return [row["entity_id"] if row_of(row["entity_id"]) is not None else None for row in self.rows]


def main(data: tyro.conf.Positional[Path], *, language_model: str, mention_encoder: str) -> None:
    """Link, fit and judge.

    Args:
        data: Directory of the corpus.
        language_model: Local directory, or name on the model hub.
        mention_encoder: Local directory, or name on the model hub.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    prepare(data, language_model, mention_encoder)
    of_texts = replace(opened_config(data, language_model, mention_encoder), knowledge_base=str(CARDS / "knowledge_base"))
    emoji = load_config(LinkConfig, EMOJI / "link.toml")
    command = f"python benchmarks/calibration.py DATA --language-model {language_model} --mention-encoder {mention_encoder}"
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, config, directory in (("wikidiverse", of_texts, data), ("emoji", emoji, EMOJI)):
        whole, reduced = prepared(config, directory), prepared(without_entities(name, config, directory), directory)
        values, what = judged(name, whole, reduced, directory)
        noted = {key: record(value, command, what) for key, value in values.items()}
        results[name] = results.get(name, {}) | noted
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        logger.info("%s: %s", name, values)

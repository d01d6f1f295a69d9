"""How good the probabilities of a calibration are, and how well mentions outside the knowledge base are found.

    python -m benchmarks.accuracy calibration DATA

A quarter of an hour on two cores. The dev splits of WikiDiverse (text) and of the emoji corpus are linked by evidence
alone, so that the language model is not asked. Surface forms are divided into two halves: each is judged by what
`gemel calibrate` fits to the other. NIL is learnt from entities held out of the pools, and judged where it is real: a
knowledge base is built without a random fifth of the entities. Figures go to `benchmarks/results/calibration.json`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.accuracy.ranking import by_evidence
from benchmarks.corpora import (
    EMOJI,
    SEED,
    Row,
    build_knowledge_base,
    emoji,
    mentions_of,
    picture_features,
    read_rows,
    retriever,
    wikidiverse,
)
from benchmarks.record import ResultFile
from gemel_engine.assembly import open_artifacts
from gemel_engine.config.loading import config_json
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.evaluation.calibrate import calibrate_run
from gemel_engine.evaluation.quality import quality
from gemel_engine.evaluation.run import LinkedRun
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.types import Features, Mention, Prediction, predictions_to_table

WORK = Path("build/calibration")
REMOVED_SHARE = 0.2
NIL_PRECISION = 0.6  # three times the share of NIL


@dataclass(frozen=True, slots=True)
class Prepared:
    """A corpus with what retrieval finds for it in one knowledge base."""

    config: LinkConfig
    artifacts: Artifacts
    rows: list[Row]
    mentions: list[Mention]
    features: list[Features | None]
    retrieved: list[Retrieved]

    @classmethod
    def of(cls, config: LinkConfig, rows: list[Row], features: list[Features | None]) -> Self:
        """Retrieve, with the features of the mentions' pictures."""
        mentions, artifacts = mentions_of(rows), open_artifacts(config)
        retrieved = retriever(config.retrieval, artifacts).retrieve(mentions, features)
        return cls(config, artifacts, rows, mentions, features, retrieved)

    def linked(self, weights: ScoreWeights, calibration: Calibration | None = None) -> list[Prediction]:
        """Return predictions by evidence alone."""
        generator = by_evidence(self.config, self.artifacts, weights, calibration)
        return generator.generate(self.mentions, self.features, self.retrieved)

    @property
    def are_nil(self) -> NDArray[np.bool_]:
        """Whether the knowledge base lacks the entity of each mention."""
        row_of = self.artifacts.knowledge_base.row_of_entity
        return np.array([row_of(row["entity_id"]) is None for row in self.rows])


def main(data: tyro.conf.Positional[Path]) -> None:
    """Confidence and NIL by evidence: link, fit and judge.

    Args:
        data: Directory of WikiDiverse.
    """
    results = ResultFile("calibration", {"DATA": data})
    for name, config, tables in (("wikidiverse", wikidiverse(data), data), ("emoji", emoji(), EMOJI)):
        config = replace(config, input=str(tables / "dev.parquet"))
        rows = read_rows(tables / "dev.parquet")
        features: list[Features | None] = [None] * len(rows)
        if config.vision.image_encoder is not None:
            features = picture_features(rows, config.vision)
        whole = Prepared.of(config, rows, features)
        reduced = without_entities(config, tables / "entities.parquet", WORK / name)
        values, what = judged(whole, Prepared.of(reduced, rows, features), WORK / name)
        results.note({f"{name}_evidence": values}, what)


def without_entities(config: LinkConfig, entities: Path, directory: Path) -> LinkConfig:
    """The run with a knowledge base that lacks a fifth of the entities."""
    knowledge_base = directory / "knowledge_base"
    if not (knowledge_base / "knowledge_base.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(entities)
        ids = sorted(table["entity_id"].to_pylist())
        kept = pa.array(random.Random(SEED).sample(ids, round(len(ids) * (1 - REMOVED_SHARE))))
        pq.write_table(table.filter(pc.is_in(table["entity_id"], kept)), directory / "entities.parquet")
        encoders = EntityEncoders(
            mention_encoder=config.retrieval.mention_encoder, image_encoder=config.vision.image_encoder
        )
        build_knowledge_base(directory / "entities.parquet", knowledge_base, config.language_model.name, encoders)
    return replace(config, knowledge_base=str(knowledge_base))


def judged(whole: Prepared, reduced: Prepared, directory: Path) -> tuple[dict[str, float], str]:
    """Calibration of each half fitted to the other; NIL in the knowledge base that lacks entities.

    Returns:
        The results, and what was measured.
    """
    forms = np.array([row["mention"] for row in whole.rows])
    distinct = sorted(set(forms.tolist()))
    halves = np.isin(forms, random.Random(SEED).sample(distinct, len(distinct) // 2))
    first = whole.linked(ScoreWeights.open())
    confidence, is_right, raw = np.empty(len(forms)), np.empty(len(forms), bool), np.empty(len(forms))
    nil, called = np.empty(len(forms)), np.empty(len(forms), bool)
    are_nil = reduced.are_nil
    for half in (halves, ~halves):
        fitted = calibrated(whole, first, half, directory)
        assert fitted.weights is not None, "a run with pools"
        plain = whole.linked(fitted.weights)
        answers, found = whole.linked(fitted.weights, fitted), reduced.linked(fitted.weights, fitted)
        for place in np.flatnonzero(~half):
            raw[place], confidence[place] = plain[place].confidence or 0.0, answers[place].confidence or 0.0
            is_right[place] = answers[place].entity_id == whole.rows[place]["entity_id"]
            nil[place], called[place] = found[place].nil_probability or 0.0, bool(found[place].is_nil)
    results = {"accuracy": float(is_right.mean())}
    for prefix, score in (("", confidence), ("raw_", raw)):
        judgement = quality(score, is_right)
        results[f"{prefix}expected_calibration_error"] = judgement.expected_calibration_error
        results[f"{prefix}brier_score"] = judgement.brier_score
        # Risk and coverage are of an order, and only one calibration's probabilities have one.
        areas = [quality(score[half], is_right[half]).area_under_risk_coverage for half in (halves, ~halves)]
        results[f"{prefix}area_under_risk_coverage"] = float(np.mean(areas))
    results["nil_auc"] = float(roc_auc_score(are_nil, nil))
    results["nil_precision"] = float(are_nil[called].mean())
    results["nil_recall"] = float(called[are_nil].mean())
    what = (
        f"{len(forms)} mentions of dev by evidence alone, no language model; each half of the surface forms judged by "
        f"what was fitted to the other; areas are means of both halves; nil: {are_nil.sum()} mentions whose entities "
        f"the knowledge base was built without, learnt from held-out entities, a precision of {NIL_PRECISION} asked for"
    )
    return {name: round(value, 4) for name, value in results.items()}, what


def calibrated(whole: Prepared, first: Sequence[Prediction], half: NDArray[np.bool_], directory: Path) -> Calibration:
    """What `gemel calibrate` fits to half of a run."""
    labels = [row for row, is_labelled in zip(whole.rows, half, strict=True) if is_labelled]
    gold = pa.table({name: [row[name] for row in labels] for name in ("mention_id", "entity_id")})
    pq.write_table(gold, directory / "gold.parquet")
    settings = json.loads(config_json(whole.config))
    run = LinkedRun(str(WORK), settings, {}, predictions_to_table(list(first)))
    return calibrate_run(run, gold=str(directory / "gold.parquet"), nil_precision=NIL_PRECISION)

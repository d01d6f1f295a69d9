"""The score of language model and evidence on WikiDiverse: fit it on train, judge it on dev.

    python -m benchmarks.accuracy score DATA [--num-dev N] [--risk 0.03] [--shipped-weights]

Some half an hour on two cores. Weights are fitted on training mentions whose own group is left out, so that dev judges
them without having been seen, and on those of the emoji and the gazetteer corpus. The weight of the language model
comes from the training mentions that evidence alone is least sure of: `--num-asked` of them are linked.
Figures go to `benchmarks/results/score.json`, the weights to `build/score`; `--ship` writes the weights that the
package ships.
"""

from __future__ import annotations

import logging
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks.accuracy.pools import (
    NUM_EMOJI,
    NUM_GAZETTEER,
    NUM_WIKIDIVERSE,
    WORK,
    certainties,
    fit_corpora,
    wikidiverse_pools,
)
from benchmarks.accuracy.ranking import by_evidence, with_weights
from benchmarks.corpora import SEED, Row, buckets_of, in_order, mentions_of, read_rows, retriever, wikidiverse
from benchmarks.record import ResultFile, difference, mean, to_digits
from gemel_engine.config.components import ScoreSettings, SearchSettings
from gemel_engine.evaluation.fit_score import fit_score
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence import weights as shipped
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.linker import Linker
from gemel_engine.types import predictions_to_table

NUM_ASKED = 10  # candidates of a training mention whose log-probs are asked for

logger = logging.getLogger("benchmarks")


def main(
    data: tyro.conf.Positional[Path],
    *,
    num_train: int = NUM_WIKIDIVERSE,
    num_asked: int = 150,
    num_dev: int | None = None,
    risk: float = 0.03,
    shipped_weights: bool = False,
    ship: bool = False,
) -> None:
    """Language model and evidence: fit, then judge.

    Args:
        data: Directory of WikiDiverse.
        num_train: Number of training mentions that the weights of the evidence are fitted on.
        num_asked: Number of these that the weight of the language model is fitted on.
        num_dev: Size of a fixed sample of dev; None: all of it.
        risk: Risk at which evidence decides alone.
        shipped_weights: Whether to judge the weights of the package instead of fitting.
        ship: Whether the weights become those of the package.
    """
    linker = Linker(replace(wikidiverse(data), score=ScoreSettings(kind="language_model")))
    weights = ScoreWeights.open() if shipped_weights else fitted(linker, data, num_train, num_asked)
    if ship:
        weights.save(shipped.SHIPPED)
    logger.info("%s, language model %.3f", weights.features, weights.language_model)
    rows = in_order(read_rows(data / "dev.parquet", num_dev))
    of_weights = (
        "the weights of the package"
        if shipped_weights
        else f"weights fitted on {num_train} training mentions without their own groups, the language model's on "
        f"{num_asked} of them"
    )
    what = f"WikiDiverse dev, text only, {len(rows)} mentions, 7,642 names, SmolLM2-135M in float32, {of_weights}"
    found = judged(linker, weights, rows, buckets_of(rows, data), risk)
    ResultFile("score", {"DATA": data}).note(found, what)


def fitted(linker: Linker, data: Path, num_train: int, num_asked: int) -> ScoreWeights:
    """Return the weights, from what is stored of an interrupted run if there is such."""
    path = WORK / f"weights_{num_train}_{num_asked}"
    if (path / shipped.MANIFEST).exists():
        return ScoreWeights.open(path)
    train = wikidiverse_pools(data, "train", num_train)
    evidence_alone = fit_score(train.labelled)
    logger.info("evidence alone: %s", evidence_alone.fitted_on)
    has_pool = np.flatnonzero([bool(pool) for pool in train.table["pool"].to_pylist()])
    unsure = has_pool[np.argsort(certainties(train.labelled, evidence_alone), kind="stable")[: 2 * num_asked]].tolist()
    rows = read_rows(data / "train.parquet", num_train)
    asked = sorted(random.Random(SEED).sample(unsure, num_asked), key=lambda row: rows[row]["mention"])
    what = {
        "corpora": f"training mentions: {num_train} of WikiDiverse, {NUM_EMOJI} of emoji, "
        f"again with a sixth of the entities unseen, {NUM_GAZETTEER} of the gazetteer",
        "language_model": Path(linker.config.language_model.name).name,
    }
    asked_path = WORK / f"asked_{num_train}_{num_asked}.parquet"
    if not asked_path.exists():
        pq.write_table(with_log_probs(linker, train.table, rows, asked), asked_path)
    train.table = pq.read_table(asked_path)
    weights = fit_corpora(train.labelled, what)
    weights.save(path)
    return weights


def with_log_probs(linker: Linker, pools: pa.Table, rows: Sequence[Row], asked: Sequence[int]) -> pa.Table:
    """Return pools with the log-probs of the first candidates of some mentions.

    Args:
        linker: Has the language model.
        pools: Pools of all mentions.
        rows: The mentions.
        asked: Numbers of the mentions whose candidates the language model is asked for.
    """
    mentions = mentions_of(rows[row] for row in asked)
    settings = replace(linker.config.retrieval, exclude_group=True)
    retrieved = retriever(settings, linker.generator.artifacts).retrieve(mentions, [None] * len(mentions))
    ids = [tuple(item["entity_id"] for item in pools["pool"][row].as_py()[:NUM_ASKED]) for row in asked]
    # All of these names are asked for, so that their log-probs are known.
    generator = with_weights(linker, None, search=SearchSettings(num_candidates=NUM_ASKED, num_to_certify=NUM_ASKED))
    linked = generator.generate(
        [replace(mention, candidate_ids=candidates) for mention, candidates in zip(mentions, ids, strict=True)],
        [None] * len(mentions),
        retrieved,
    )
    of_asked = dict(zip(asked, predictions_to_table(linked)["candidates"].to_pylist(), strict=True))
    candidates = [of_asked.get(row, known) for row, known in enumerate(pools["candidates"].to_pylist())]
    number = pools.schema.get_field_index("candidates")
    field = pools.schema.field(number)
    return pools.set_column(number, field, pa.array(candidates, field.type))


def judged(
    linker: Linker, weights: ScoreWeights, rows: Sequence[Row], buckets: Sequence[str], risk: float
) -> dict[str, object]:
    """Return the accuracy of evidence alone, and of the score where evidence does not decide at the risk."""
    engine = linker.generator.engine
    mentions, features = mentions_of(rows), [None] * len(rows)
    started = time.perf_counter()
    _, retrieved = linker.prepare(mentions, features)
    retrieval_seconds = time.perf_counter() - started
    of_evidence = by_evidence(linker.config, linker.generator.artifacts, weights).generate(
        mentions, features, retrieved
    )
    before, started = engine.cache_statistics.num_prompt_tokens, time.perf_counter()
    of_score = with_weights(linker, weights, risk).generate(mentions, features, retrieved)
    seconds = time.perf_counter() - started
    tokens = engine.cache_statistics.num_prompt_tokens - before
    gold = [row["entity_id"] for row in rows]
    right = {
        name: np.array([prediction.entity_id == entity for prediction, entity in zip(predictions, gold, strict=True)])
        for name, predictions in (("evidence_alone", of_evidence), ("score", of_score))
    }
    order = np.argsort([prediction.confidence or 0.0 for prediction in of_evidence], kind="stable")
    least_sure = order[: len(order) // 5]
    is_asked = np.array([prediction.decided_by != "evidence" for prediction in of_score])
    asked = [prediction for prediction in of_score if prediction.decided_by != "evidence"]
    measured = quality(np.array([prediction.confidence or 0.0 for prediction in of_score]), right["score"])
    results: dict[str, object] = {
        "wikidiverse.retrieval_seconds": round(retrieval_seconds, 1),
        "wikidiverse.seconds": round(seconds, 1),
        "wikidiverse.prompt_tokens": round(tokens / len(rows), 1),
        "wikidiverse.decided_by_evidence": mean(~is_asked),
        "wikidiverse.risk_of_decided": None if is_asked.all() else mean(~right["score"][~is_asked]),
        "wikidiverse.certified_of_asked": mean([bool(prediction.certified) for prediction in asked]),
        "wikidiverse.rollouts_of_asked": mean([prediction.num_rollouts for prediction in asked], 2),
        "wikidiverse.least_sure_difference": difference(
            to_digits(right["score"][least_sure]), to_digits(right["evidence_alone"][least_sure])
        ),
        "confidence.ece": round(measured.expected_calibration_error, 4),
        "confidence.risk_coverage_area": round(measured.area_under_risk_coverage, 4),
    }
    of_bucket: dict[str, list[int]] = defaultdict(list)
    for number, bucket in enumerate(buckets):
        of_bucket[bucket].append(number)
    for name, values in right.items():
        results[f"wikidiverse.{name}"] = mean(values)
        results[f"wikidiverse.least_sure_{name}"] = mean(values[least_sure])
        for bucket, numbers in of_bucket.items():
            results[f"wikidiverse.{name}.{bucket}"] = mean(values[numbers])
    return results

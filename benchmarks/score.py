"""The score of language model and evidence on WikiDiverse: fit it on train, judge it on dev.

python benchmarks/score.py DATA --language-model MODEL --mention-encoder MODEL [--num-dev N] [--risk 0.03]

DATA and the indexes are those of `benchmarks/cards.py`. Weights are fitted on training mentions whose own group is
left out, so that dev judges them without having been seen. The weight of the language model comes from the training
mentions that evidence alone is least sure of: `--num-asked` of them are linked. The result goes to
`benchmarks/results/score.json`, the weights to `build/score`; `--ship` writes the weights that the package ships.
`--num-compared` mentions of dev are linked once more, side by side: by the score with the cascade and without it, and
by the language model alone.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro
from cards import buckets_of, opened, prepare
from record import difference, record, to_digits
from score_evidence import EMOJI, RESULTS, WORK, Pools, emoji_train, with_pictures, with_pools

from gemel_engine.config.components import SearchSettings
from gemel_engine.decoding.generator import EntityNameGenerator
from gemel_engine.evaluation.fit_score import LabelledPools, fit_score
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence import weights as shipped
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.evidence.weights import ScoreWeights, softmax
from gemel_engine.linker import Linker
from gemel_engine.types import Mention, Prediction, predictions_to_table

SEED = 0
NUM_ASKED = 10  # candidates of a training mention whose log-probs are asked for

logger = logging.getLogger("score")


def main(
    data: tyro.conf.Positional[Path],
    *,
    language_model: str,
    mention_encoder: str,
    num_train: int = 3000,
    num_asked: int = 150,
    num_dev: int | None = None,
    risk: float = 0.03,
    num_compared: int = 200,
    shipped_weights: bool = False,
    ship: bool = False,
) -> None:
    """Fit, then judge.

    Args:
        data: Directory of the corpus.
        language_model: Local directory, or name on the model hub.
        mention_encoder: Local directory, or name on the model hub.
        num_train: Number of training mentions that the weights of the evidence are fitted on.
        num_asked: Number of these that the weight of the language model is fitted on.
        num_dev: Size of a fixed sample of dev; None: all of it.
        risk: Risk at which evidence decides alone.
        num_compared: Number of mentions that are linked with and without the cascade.
        shipped_weights: Whether to judge the weights of the package instead of fitting.
        ship: Whether the weights become those of the package.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    prepare(data, language_model, mention_encoder)
    linker = opened(data, language_model, mention_encoder)
    weights = ScoreWeights.open() if shipped_weights else fitted(linker, data, num_train, num_asked)
    if ship:
        weights.save(shipped.SHIPPED)
    logger.info("%s, language model %.3f", weights.features, weights.language_model)
    rows = pq.read_table(data / "dev.parquet").to_pylist()
    rows = rows if num_dev is None else random.Random(SEED).sample(rows, num_dev)
    rows.sort(key=lambda row: (row["mention"], row["mention_id"]))
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = (
        f"python benchmarks/score.py DATA --language-model {language_model} --mention-encoder {mention_encoder} "
        f"--num-train {num_train} --num-asked {num_asked} --risk {risk}"
        + ("" if num_dev is None else f" --num-dev {num_dev}")
        + f" --num-compared {num_compared}"
        + (" --shipped-weights" if shipped_weights else "")
    )
    of_weights = (
        "the weights of the package"
        if shipped_weights
        else f"weights fitted on {num_train} training mentions without their own groups, the language model's on "
        f"{num_asked} of them"
    )
    what = f"WikiDiverse dev, text only, {len(rows)} mentions, 7,642 names, SmolLM2-135M in float32, {of_weights}"
    sample = sorted(random.Random(SEED).sample(range(len(rows)), min(num_compared, len(rows))))
    for part in (
        partial(judged, linker, weights, rows, buckets_of(rows, data), risk),
        partial(compared, linker, weights, [rows[number] for number in sample], risk),
    ):
        stored |= {name: record(value, command, what) for name, value in part().items()}
        RESULTS.write_text(json.dumps(stored, indent=2) + "\n")


def with_weights(
    linker: Linker, weights: ScoreWeights | None, risk: float = 0.0, search: SearchSettings | None = None
) -> EntityNameGenerator:
    """The generator of a linker with other weights."""
    config = linker.config
    return EntityNameGenerator(
        linker.generator.artifacts,
        linker.generator.engine,
        config.prompt,
        search or config.search,
        max_in_flight=config.language_model.max_num_seqs,
        weights=weights,
        risk=risk,
    )


def fitted(linker: Linker, data: Path, num_train: int, num_asked: int) -> ScoreWeights:
    """The weights, from what is stored of an interrupted run if there is such."""
    path = WORK / f"weights_{num_train}_{num_asked}"
    if (path / shipped.MANIFEST).exists():
        return ScoreWeights.open(path)
    artifacts = linker.generator.artifacts
    rows = random.Random(SEED).sample(pq.read_table(data / "train.parquet").to_pylist(), num_train)
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    gold, forms = [row["entity_id"] for row in rows], [row["mention"] for row in rows]
    settings = replace(linker.config.retrieval, exclude_group=True)
    retriever = Retriever(settings, artifacts.knowledge_base, artifacts.index, artifacts.evidence)
    retrieved = retriever.retrieve(mentions, [None] * len(mentions))
    predictions = with_pools(mentions, retrieved, artifacts.knowledge_base)
    first = fit_score(LabelledPools.of(predictions_to_table(predictions), forms, gold, artifacts.knowledge_base))
    logger.info("evidence alone: %s", first.fitted_on)
    unsure = sorted(range(len(rows)), key=lambda row: certainty(linker, first, forms[row], predictions[row]))[
        : 2 * num_asked
    ]
    asked = sorted(random.Random(SEED).sample(unsure, num_asked), key=lambda row: forms[row])
    # All of these names are asked for, so that their log-probs are known.
    generator = with_weights(linker, None, search=SearchSettings(num_candidates=NUM_ASKED, num_to_certify=NUM_ASKED))
    ids = [tuple(item.entity_id for item in predictions[row].pool[:NUM_ASKED]) for row in asked]
    linked = generator.generate(
        [replace(mentions[row], candidate_ids=candidates) for row, candidates in zip(asked, ids, strict=True)],
        [None] * len(asked),
        [retrieved[row] for row in asked],
    )
    for row, prediction in zip(asked, linked, strict=True):
        predictions[row] = replace(predictions[row], candidates=prediction.candidates)
    what = {
        "corpora": "WikiDiverse train, text only; aliases and pictures on emoji train, on top of the others",
        "language_model": Path(linker.config.language_model.name).name,
    }
    pools = LabelledPools.of(predictions_to_table(predictions), forms, gold, artifacts.knowledge_base)
    encoder = linker.config.retrieval.mention_encoder
    assert encoder is not None
    of_emoji = Pools("emoji_train", EMOJI, encoder, emoji_train, True)
    weights = with_pictures(fit_score(pools, fitted_on=what), of_emoji)
    weights.save(path)
    return weights


def certainty(linker: Linker, weights: ScoreWeights, form: str, prediction: Prediction) -> float:
    """Probability of the best candidate by evidence alone."""
    knowledge_base = linker.generator.artifacts.knowledge_base
    rows = [knowledge_base.row_of_entity(item.entity_id) for item in prediction.pool]
    names = [knowledge_base.entity(row).name for row in rows if row is not None]
    if not names:
        return 0.0
    return float(softmax(weights.bonuses(form, names, [item.reasons for item in prediction.pool])).max())


def judged(
    linker: Linker, weights: ScoreWeights, rows: Sequence[dict[str, Any]], buckets: Sequence[str], risk: float
) -> dict[str, object]:
    """Accuracy of evidence alone, and of the score where evidence does not decide at the risk."""
    artifacts = linker.generator.artifacts
    retriever = Retriever(linker.config.retrieval, artifacts.knowledge_base, artifacts.index, artifacts.evidence)
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    started = time.perf_counter()
    retrieved = retriever.retrieve(mentions, [None] * len(mentions))
    retrieval_seconds = time.perf_counter() - started
    alone = with_weights(linker, replace(weights, risks=((0.0, 0.0),)), risk=1.0)
    features = [None] * len(mentions)
    of_evidence = alone.generate(mentions, features, retrieved)
    before, started = linker.generator.engine.cache_statistics.num_prompt_tokens, time.perf_counter()
    of_score = with_weights(linker, weights, risk).generate(mentions, features, retrieved)
    seconds = time.perf_counter() - started
    tokens = linker.generator.engine.cache_statistics.num_prompt_tokens - before
    gold = [row["entity_id"] for row in rows]
    right = {
        name: np.array([prediction.entity_id == entity for prediction, entity in zip(predictions, gold, strict=True)])
        for name, predictions in (("evidence_alone", of_evidence), ("score", of_score))
    }
    order = np.argsort([prediction.confidence or 0.0 for prediction in of_evidence], kind="stable")
    least_sure = order[: len(order) // 5]
    is_asked = np.array([prediction.decided_by != "evidence" for prediction in of_score])
    of_bucket: dict[str, list[int]] = defaultdict(list)
    for number, bucket in enumerate(buckets):
        of_bucket[bucket].append(number)
    results: dict[str, object] = {
        "wikidiverse.retrieval_seconds": round(retrieval_seconds, 1),
        "wikidiverse.seconds": round(seconds, 1),
        "wikidiverse.prompt_tokens": round(tokens / len(rows), 1),
        "wikidiverse.decided_by_evidence": round(float((~is_asked).mean()), 4),
        "wikidiverse.risk_of_decided": round(float(1 - right["score"][~is_asked].mean()), 4)
        if (~is_asked).any()
        else None,
        "wikidiverse.certified_of_asked": round(
            float(np.mean([bool(p.certified) for p, asked in zip(of_score, is_asked, strict=True) if asked])), 4
        ),
        "wikidiverse.rollouts_of_asked": round(
            float(np.mean([p.num_rollouts for p, asked in zip(of_score, is_asked, strict=True) if asked])), 2
        ),
        "wikidiverse.least_sure_difference": difference(
            to_digits(right["score"][least_sure]), to_digits(right["evidence_alone"][least_sure])
        ),
    }
    measured = quality(np.array([prediction.confidence or 0.0 for prediction in of_score]), right["score"])
    results["confidence.ece"] = round(measured.expected_calibration_error, 4)
    results["confidence.risk_coverage_area"] = round(measured.area_under_risk_coverage, 4)
    for name, values in right.items():
        results[f"wikidiverse.{name}"] = round(float(values.mean()), 4)
        results[f"wikidiverse.least_sure_{name}"] = round(float(values[least_sure].mean()), 4)
        for bucket, numbers in of_bucket.items():
            results[f"wikidiverse.{name}.{bucket}"] = round(float(values[numbers].mean()), 4)
    logger.info("%s", json.dumps(results, indent=1))
    return results


def compared(linker: Linker, weights: ScoreWeights, rows: Sequence[dict[str, Any]], risk: float) -> dict[str, object]:
    """The score with the cascade and without it, and the language model alone, on the same mentions.

    Each begins with an empty prefix cache; seconds have no retrieval in them.
    """
    artifacts = linker.generator.artifacts
    engine: Any = linker.generator.engine
    retriever = Retriever(linker.config.retrieval, artifacts.knowledge_base, artifacts.index, artifacts.evidence)
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    retrieved = retriever.retrieve(mentions, [None] * len(mentions))
    generators = {
        "cascade": with_weights(linker, weights, risk),
        "without_cascade": with_weights(linker, weights),
        "model_alone": with_weights(linker, None),
    }
    found: dict[str, Any] = {"compared.mentions": len(rows)}
    for name, generator in generators.items():
        engine.llm_engine.reset_prefix_cache()
        before, started = replace(engine.cache_statistics), time.perf_counter()
        predictions = generator.generate(mentions, [None] * len(mentions), retrieved)
        found[f"compared.{name}.seconds"] = round(time.perf_counter() - started, 1)
        after = engine.cache_statistics
        tokens = (
            after.num_prompt_tokens - before.num_prompt_tokens - (after.num_cached_tokens - before.num_cached_tokens)
        )
        found[f"compared.{name}.computed_prompt_tokens"] = tokens
        right = [found.entity_id == row["entity_id"] for found, row in zip(predictions, rows, strict=True)]
        found[f"compared.{name}.accuracy"] = round(float(np.mean(right)), 4)
        found[f"compared.{name}.certified_of_asked"] = round(
            float(np.mean([bool(p.certified) for p in predictions if p.decided_by != "evidence"])), 4
        )
    for ratio, quantity in (("tokens_ratio", "computed_prompt_tokens"), ("time_ratio", "seconds")):
        without = found[f"compared.without_cascade.{quantity}"]
        found[f"cascade.{ratio}"] = round(found[f"compared.cascade.{quantity}"] / without, 3)
    logger.info("%s", json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

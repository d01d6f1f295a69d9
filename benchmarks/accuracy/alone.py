"""What evidence alone is worth: each feature, weights of another corpus, entities that training has not seen.

    python -m benchmarks.accuracy alone DATA [--num-train 3000]

Some ten minutes on two cores; no language model takes part. Weights are fitted on training mentions of WikiDiverse,
text only, and of the emoji corpus, with pictures, and judged on dev and test. Candidate pools are kept in
`build/score`, so that an interrupted run goes on: remove it when retrieval has changed. Figures go to
`benchmarks/results/score.json`.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import tyro

from benchmarks.accuracy.pools import (
    NUM_EMOJI,
    Labelled,
    Pools,
    accuracy,
    emoji,
    emoji_train,
    is_right,
    vector,
    with_pictures,
)
from benchmarks.corpora import INDEXES, buckets_of, mentions_of, read_rows, wikidiverse
from benchmarks.record import ResultFile, mean
from gemel_engine.evaluation.fit_score import LabelledPools, conditional_logit, fit_score
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.weights import ScoreWeights, softmax


def main(data: tyro.conf.Positional[Path], *, num_train: int = 3000) -> None:
    """Evidence alone: fit on each corpus, judge on both.

    Args:
        data: Directory of WikiDiverse.
        num_train: Number of training mentions of WikiDiverse that weights are fitted on.
    """
    wikidiverse(data)  # builds its indexes
    train = Pools(f"train_{num_train}", INDEXES, lambda: texts(data, "train", num_train), is_training=True)
    dev = Pools("dev", INDEXES, lambda: texts(data, "dev"))
    of_emoji = emoji_train()
    emoji_of = {split: emoji(split) for split in ("dev", "test", "test_unseen")}
    by_text = fit_score(train.labelled)
    judged = dev.labelled
    results: dict[str, object] = {
        "transfer.emoji": accuracy(emoji_of["test"].labelled, by_text),
        "transfer.lookup_emoji": emoji_of["test"].lookup(),
        "transfer.wikidiverse": accuracy(judged, fit_score(of_emoji.with_unseen)),
        "transfer.lookup_wikidiverse": dev.lookup(),
    }
    whole = with_pictures(by_text, of_emoji)
    for name, split in (("", "test"), ("unseen_", "test_unseen"), ("dev_", "dev")):
        results[f"emoji.{name}evidence_alone"] = accuracy(emoji_of[split].labelled, whole)
    results |= alone(dev, whole, data)
    results |= {f"feature.{name}": value for name, value in worth(train.labelled, judged).items()}
    what = (
        f"evidence alone, no language model; WikiDiverse text only, 7,642 names, weights fitted on {num_train} "
        "training mentions without their own groups and judged on dev; emoji with pictures, 551 names, fitted on "
        f"{NUM_EMOJI} training mentions without their own artists, and again with a third of the entities unseen"
    )
    ResultFile("score", {"DATA": data}).note(results, what)


def texts(data: Path, split: str, num_mentions: int | None = None) -> Labelled:
    """Return mentions of WikiDiverse, or a fixed sample of them, without pictures."""
    rows = read_rows(data / f"{split}.parquet", num_mentions)
    return mentions_of(rows), [None] * len(rows), [row["entity_id"] for row in rows]


def alone(dev: Pools, weights: ScoreWeights, data: Path) -> dict[str, object]:
    """Return accuracy on dev, in all and by bucket, what bounds it, and how good its confidence is."""
    pools = dev.labelled
    right, scores = is_right(pools, vector(weights)), pools.features @ vector(weights)
    sure = np.array([softmax(scores[start:end]).max() for start, end in pairwise(pools.starts)])
    best = [
        int((scores[start:end] > scores[gold]).sum()) if gold >= 0 else -1
        for (start, end), gold in zip(pairwise(pools.starts), pools.gold, strict=True)
    ]
    rank, least_sure = np.array(best), np.argsort(sure, kind="stable")[: len(sure) // 5]
    measured = quality(sure, right)
    results: dict[str, object] = {
        "wikidiverse.evidence_alone": mean(right),
        "wikidiverse.least_sure_evidence_alone": mean(right[least_sure]),
        "confidence.evidence_alone.ece": round(measured.expected_calibration_error, 4),
        "confidence.evidence_alone.risk_coverage_area": round(measured.area_under_risk_coverage, 4),
        **{f"bound.among_best_{k}": mean((rank >= 0) & (rank < k)) for k in (2, 5, 32)},
    }
    for risk in (0.02, 0.03, 0.05):
        threshold = weights.threshold(risk)
        decided = sure >= (2.0 if threshold is None else threshold)
        results[f"cascade.decided_at_{risk}"] = mean(decided)
        results[f"cascade.wrong_of_decided_at_{risk}"] = mean(~right[decided])
    forms, gold = (dev.table[name].to_pylist() for name in ("form", "gold"))
    buckets = np.array(buckets_of([{"mention": f, "entity_id": g} for f, g in zip(forms, gold, strict=True)], data))
    for bucket in sorted(set(buckets.tolist())):
        results[f"wikidiverse.evidence_alone.{bucket}"] = mean(right[buckets == bucket])
    return results


def worth(train: LabelledPools, dev: LabelledPools) -> dict[str, float]:
    """Return accuracy on dev without each feature that WikiDiverse has, and with all of them."""
    used = [number for number in range(len(FEATURES)) if train.features[:, number].any()]
    found = {}
    for left_out in (None, *used):
        columns = [number for number in used if number != left_out]
        weights = np.zeros(len(FEATURES))
        weights[columns] = conditional_logit(train.features[:, columns], train.starts, train.gold)
        name = "none_left_out" if left_out is None else f"without_{FEATURES[left_out]}"
        found[name] = mean(is_right(dev, weights))
    return found

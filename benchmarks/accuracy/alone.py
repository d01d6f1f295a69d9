"""What evidence alone is worth: each feature, weights of another corpus, entities that training has not seen.

    python -m benchmarks.accuracy alone DATA [--num-train 6000]

Some ten minutes on two cores; no language model takes part. The weights of the package are judged on WikiDiverse, text
only, on the emoji corpus, with pictures, and on the gazetteer corpus (`make gazetteer-demo` builds it), with
descriptions; then others, fitted on training mentions of one or two of them. Candidate pools are kept in
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
    NUM_GAZETTEER,
    NUM_WIKIDIVERSE,
    Pools,
    accuracy,
    certainties,
    emoji,
    emoji_train,
    gazetteer,
    is_right,
    joined,
    vector,
    wikidiverse_pools,
)
from benchmarks.corpora import buckets_of, wikidiverse
from benchmarks.record import ResultFile, mean
from gemel_engine.evaluation.fit_score import LabelledPools, conditional_logit, fit_score
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.weights import ScoreWeights


def main(data: tyro.conf.Positional[Path], *, num_train: int = NUM_WIKIDIVERSE) -> None:
    """Evidence alone: fit on each corpus, judge on both.

    Args:
        data: Directory of WikiDiverse.
        num_train: Number of training mentions of WikiDiverse that weights are fitted on.
    """
    wikidiverse(data)  # builds its indexes
    dev, places = wikidiverse_pools(data, "dev"), gazetteer("dev")
    emoji_of = {split: emoji(split) for split in ("dev", "test", "test_unseen")}
    package = ScoreWeights.open()
    results: dict[str, object] = {
        "gazetteer.evidence_alone": accuracy(places.labelled, package),
        "weights": {name: round(weight, 2) for name, weight in package.features.items()},
        **alone(dev, package, data),
    }
    for name, split in (("", "test"), ("unseen_", "test_unseen"), ("dev_", "dev")):
        results[f"emoji.{name}evidence_alone"] = accuracy(emoji_of[split].labelled, package)
    corpora = (
        "evidence alone, no language model; WikiDiverse dev, text only, 7,642 names; emoji with pictures, 551 names; "
        "gazetteer with descriptions, 31,210 names"
    )
    file = ResultFile("score", {"DATA": data})
    file.note(results, f"{corpora}; the weights of the package")
    texts = wikidiverse_pools(data, "train", num_train).labelled
    pictures, of_places = emoji_train().with_unseen, gazetteer("train").labelled
    results = {
        "transfer.emoji": accuracy(emoji_of["test"].labelled, fit_score(joined([texts, of_places]))),
        "transfer.lookup_emoji": emoji_of["test"].lookup(),
        "transfer.wikidiverse": accuracy(dev.labelled, fit_score(joined([pictures, of_places]))),
        "transfer.lookup_wikidiverse": dev.lookup(),
        "transfer.gazetteer": accuracy(places.labelled, fit_score(joined([texts, pictures]))),
        "transfer.lookup_gazetteer": places.lookup(),
    }
    for corpus, fitted_on, judged in (
        ("wikidiverse", texts, dev),
        ("emoji", pictures, emoji_of["dev"]),
        ("gazetteer", of_places, places),
    ):
        for name, value in worth(fitted_on, judged.labelled).items():
            results[f"feature.{corpus}.{name}"] = value
    what = (
        f"{corpora}; fitted on {num_train} training mentions of WikiDiverse without their own groups, {NUM_EMOJI} of "
        "emoji without their own artists, and again with a sixth of the entities unseen, and "
        f"{NUM_GAZETTEER} of the gazetteer"
    )
    file.note(results, what)


def alone(dev: Pools, weights: ScoreWeights, data: Path) -> dict[str, object]:
    """Return accuracy on dev, in all and by bucket, what bounds it, and how good its confidence is."""
    pools = dev.labelled
    right, scores = is_right(pools, vector(weights)), pools.features @ vector(weights)
    sure = certainties(pools, weights)
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


def worth(train: LabelledPools, dev: LabelledPools) -> dict[str, float | None]:
    """Return accuracy on dev with all features, and without each; None for a feature that the corpus lacks."""
    used = [number for number in range(len(FEATURES)) if train.features[:, number].any()]
    found: dict[str, float | None] = {f"without_{name}": None for name in FEATURES}
    for left_out in (None, *used):
        columns = [number for number in used if number != left_out]
        weights = np.zeros(len(FEATURES))
        weights[columns] = conditional_logit(train.features[:, columns], train.starts, train.gold)
        name = "none_left_out" if left_out is None else f"without_{FEATURES[left_out]}"
        found[name] = mean(is_right(dev, weights))
    return found

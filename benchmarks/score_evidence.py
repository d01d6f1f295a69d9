"""What evidence alone is worth: each feature, weights of another corpus, entities that training has not seen.

python benchmarks/score_evidence.py DATA --mention-encoder MODEL --image-encoder MODEL [--num-train N]

DATA is that of `benchmarks/cards.py`, which builds its indexes; the emoji corpus, its knowledge base and its
demonstrations are those of `make demo`. No language model takes part. Candidate pools are kept in `build/score`, so
that an interrupted run goes on and `benchmarks/score.py` finds them. The figures go to `benchmarks/results/score.json`.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from cards import WORK as CARDS
from cards import buckets_of
from numpy.typing import NDArray
from record import record

from gemel_engine.config.components import RetrievalSettings
from gemel_engine.evaluation.fit_score import LabelledPools, conditional_logit, fit_score
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.index import open_evidence
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.evidence.weights import ScoreWeights, softmax
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.types import Features, Mention, PoolEntity, Prediction, predictions_to_table
from gemel_engine.vision.encoder import ImageEncoder, PictureEncoder

RESULTS = Path("benchmarks/results/score.json")
WORK = Path("build/score")
EMOJI = Path("build/emoji")  # of `make demo`
EMOJI_MENTIONS = Path("examples/emoji")
SEED = 0
NUM_EMOJI = 1500
RAISED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # factors of the weight of pictures
OF_TRAINING = frozenset({"form", "similar_form", "training_picture", "frequency"})
MAX_PICTURE_BYTES, PICTURE_BATCH = 10_000_000, 16

Mentions = tuple[list[Mention], list[Features | None], list[str]]  # with their pictures and entities

logger = logging.getLogger("score_evidence")


class Pools:
    """Candidate pools of mentions with labels, kept in a file.

    Args:
        name: Name of the file.
        corpus: Directory of the knowledge base and the demonstrations.
        mention_encoder: Local directory, or name on the model hub.
        mentions: Returns the mentions, if there is no file yet.
        is_training: Whether these are training mentions, whose own groups are left out.
    """

    def __init__(
        self, name: str, corpus: Path, mention_encoder: str, mentions: Callable[[], Mentions], is_training: bool = False
    ) -> None:
        self.knowledge_base = KnowledgeBase.open(corpus / "knowledge_base")
        path = WORK / f"{name}.parquet"
        if not path.exists():
            found, features, gold = mentions()
            settings = RetrievalSettings(
                mention_encoder=mention_encoder, num_demonstrations=0, exclude_group=is_training
            )
            evidence, index = (
                open_evidence(corpus / "knowledge_base"),
                DemonstrationIndex.open(corpus / "demonstrations"),
            )
            retrieved = Retriever(settings, self.knowledge_base, index, evidence).retrieve(found, features)
            table = predictions_to_table(with_pools(found, retrieved, self.knowledge_base))
            forms = [mention.mention for mention in found]
            WORK.mkdir(parents=True, exist_ok=True)
            pq.write_table(table.append_column("form", [forms]).append_column("gold", [gold]), path)
            logger.info("%s: %d mentions", name, len(found))
        self.table = pq.read_table(path)

    @property
    def labelled(self) -> LabelledPools:
        """The pools as they are fitted and judged."""
        forms, gold = (self.table[name].to_pylist() for name in ("form", "gold"))
        return LabelledPools.of(self.table, forms, gold, self.knowledge_base)

    @property
    def with_unseen(self) -> LabelledPools:
        """The pools, and again as if a third of the entities had no training mention.

        Both tell how far a picture of the knowledge base reaches where training has none.
        """
        gold = self.table["gold"].to_pylist()
        entities = sorted(set(gold))
        unseen = set(random.Random(SEED).sample(entities, len(entities) // 3))
        pools = [
            [
                item | {"reasons": _of_knowledge_base(item)} if item["entity_id"] in unseen else item
                for item in pool or ()
            ]
            for pool in self.table["pool"].to_pylist()
        ]
        number = self.table.schema.get_field_index("pool")
        field = self.table.schema.field(number)
        both = pa.concat_tables([self.table, self.table.set_column(number, field, pa.array(pools, field.type))])
        return LabelledPools.of(both, both["form"].to_pylist(), both["gold"].to_pylist(), self.knowledge_base)

    def lookup(self) -> float:
        """Accuracy of the entity that the form's training mentions mean most often, else of an equal name or alias."""
        rows = self.table.select(["pool", "gold"]).to_pylist()
        return float(np.mean([_looked_up(row["pool"] or []) == row["gold"] for row in rows]))


def _of_knowledge_base(item: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The reasons of an entity of a pool that its training mentions have no part in."""
    return [(source, score) for source, score in item["reasons"] if source not in OF_TRAINING]


def _looked_up(pool: Sequence[Mapping[str, Any]]) -> str | None:
    best, entity = (0.0, 0.0, 0.0), None
    for item in pool:
        known = dict(item["reasons"])
        strength = known.get("form", 0.0), known.get("name", 0.0), known.get("alias", 0.0)
        if strength > best:
            best, entity = strength, item["entity_id"]
    return entity


def with_pools(
    mentions: Sequence[Mention], retrieved: Sequence[Retrieved], knowledge_base: KnowledgeBase
) -> list[Prediction]:
    """Predictions that have a pool and nothing else."""
    entity_id = knowledge_base.entity_id
    return [
        Prediction(
            mention.mention_id,
            pool=tuple(PoolEntity(entity_id(item.row), item.score, item.reasons) for item in found.candidates),
        )
        for mention, found in zip(mentions, retrieved, strict=True)
    ]


def with_pictures(weights: ScoreWeights, pools: Pools) -> ScoreWeights:
    """The weights of aliases and pictures, which WikiDiverse as it is here lacks, by another corpus.

    That of pictures is raised to where most mentions are right, those of unseen entities included.
    """
    plain, both = pools.labelled, pools.with_unseen
    added = ("equal_alias", "picture")
    columns = np.column_stack(
        [plain.features @ vector(weights), *(plain.features[:, FEATURES.index(name)] for name in added)]
    )
    scale, alias, picture = conditional_logit(columns, plain.starts, plain.gold).tolist()
    raised = [
        replace(
            weights, features=weights.features | {"equal_alias": alias / scale, "picture": factor * picture / scale}
        )
        for factor in RAISED
    ]
    return max(raised, key=lambda tried: accuracy(both, tried))


def vector(weights: ScoreWeights) -> NDArray[np.float64]:
    """The weights in the order of the features."""
    return np.array([weights.features.get(name, 0.0) for name in FEATURES])


def is_right(pools: LabelledPools, weights: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether the best candidate of each mention by evidence alone is right, (mentions,)."""
    scores, starts = pools.features @ weights, pools.starts
    best = [start + int(scores[start:end].argmax()) for start, end in pairwise(starts)]
    right: NDArray[np.bool_] = np.array(best) == pools.gold
    return right


def wikidiverse(data: Path, split: str, num_mentions: int | None = None) -> Mentions:
    """Mentions of WikiDiverse, or a fixed sample of them, without pictures."""
    rows = pq.read_table(data / f"{split}.parquet").to_pylist()
    rows = rows if num_mentions is None else random.Random(SEED).sample(rows, num_mentions)
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    return mentions, [None] * len(rows), [row["entity_id"] for row in rows]


def emoji_train() -> Mentions:
    """A fixed sample of the emoji corpus' training mentions; the group of a mention is its artist."""
    index = DemonstrationIndex.open(EMOJI / "demonstrations")
    items = [index[row] for row in random.Random(SEED).sample(range(len(index)), NUM_EMOJI)]
    mentions = [Mention(item.mention_id, item.text, item.mention, group=item.group) for item in items]
    return mentions, [item.features for item in items], [item.entity_id for item in items]


def emoji(split: str, image_encoder: str) -> Mentions:
    """Mentions of the emoji corpus with their pictures."""
    rows = pq.read_table(EMOJI_MENTIONS / f"{split}.parquet").to_pylist()
    pictures = PictureEncoder(ImageEncoder(image_encoder), MAX_PICTURE_BYTES, PICTURE_BATCH)
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in rows]
    features = [
        None if isinstance(item, Exception) else item for item in pictures.encode([r["image_bytes"] for r in rows])
    ]
    return mentions, features, [row["entity_id"] for row in rows]


def main(data: tyro.conf.Positional[Path], *, mention_encoder: str, image_encoder: str, num_train: int = 3000) -> None:
    """Fit on each corpus, judge on both.

    Args:
        data: Directory of WikiDiverse.
        mention_encoder: Local directory, or name on the model hub.
        image_encoder: Local directory, or name on the model hub.
        num_train: Number of training mentions of WikiDiverse that weights are fitted on.
    """
    train = Pools(f"train_{num_train}", CARDS, mention_encoder, lambda: wikidiverse(data, "train", num_train), True)
    dev = Pools("dev", CARDS, mention_encoder, lambda: wikidiverse(data, "dev"))
    of_emoji = Pools("emoji_train", EMOJI, mention_encoder, emoji_train, True)
    emoji_of = {
        split: Pools(f"emoji_{split}", EMOJI, mention_encoder, lambda split=split: emoji(split, image_encoder))  # type: ignore[misc]
        for split in ("dev", "test", "test_unseen")
    }
    by_text = fit_score(train.labelled)
    judged, test = dev.labelled, emoji_of["test"].labelled
    results: dict[str, object] = {
        "transfer.emoji": accuracy(test, by_text),
        "transfer.lookup_emoji": round(emoji_of["test"].lookup(), 4),
        "transfer.wikidiverse": accuracy(judged, fit_score(of_emoji.with_unseen)),
        "transfer.lookup_wikidiverse": round(dev.lookup(), 4),
    }
    whole = with_pictures(by_text, of_emoji)
    for name, split in (("", "test"), ("unseen_", "test_unseen"), ("dev_", "dev")):
        results[f"emoji.{name}evidence_alone"] = accuracy(emoji_of[split].labelled, whole)
    results |= alone(dev, whole, data)
    results |= {f"feature.{name}": value for name, value in worth(train.labelled, judged).items()}
    publish(
        results,
        f"--mention-encoder {mention_encoder} --image-encoder {image_encoder} --num-train {num_train}",
        num_train,
    )


def accuracy(pools: LabelledPools, weights: ScoreWeights) -> float:
    """Accuracy of evidence alone."""
    return round(float(is_right(pools, vector(weights)).mean()), 4)


def alone(dev: Pools, weights: ScoreWeights, data: Path) -> dict[str, object]:
    """Accuracy of evidence alone on dev, in all and by bucket, what bounds it, and how good its confidence is."""
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
        "wikidiverse.evidence_alone": round(float(right.mean()), 4),
        "wikidiverse.least_sure_evidence_alone": round(float(right[least_sure].mean()), 4),
        "confidence.evidence_alone.ece": round(measured.expected_calibration_error, 4),
        "confidence.evidence_alone.risk_coverage_area": round(measured.area_under_risk_coverage, 4),
        **{f"bound.among_best_{k}": round(float(((rank >= 0) & (rank < k)).mean()), 4) for k in (2, 5, 32)},
    }
    for risk in (0.02, 0.03, 0.05):
        threshold = weights.threshold(risk)
        decided = sure >= (2.0 if threshold is None else threshold)
        results[f"cascade.decided_at_{risk}"] = round(float(decided.mean()), 4)
        results[f"cascade.wrong_of_decided_at_{risk}"] = round(float(1 - right[decided].mean()), 4)
    forms, gold = (dev.table[name].to_pylist() for name in ("form", "gold"))
    buckets = np.array(buckets_of([{"mention": f, "entity_id": g} for f, g in zip(forms, gold, strict=True)], data))
    for bucket in sorted(set(buckets.tolist())):
        results[f"wikidiverse.evidence_alone.{bucket}"] = round(float(right[buckets == bucket].mean()), 4)
    return results


def worth(train: LabelledPools, dev: LabelledPools) -> dict[str, float]:
    """Accuracy on dev without each feature that WikiDiverse has, and with all of them."""
    used = [number for number in range(len(FEATURES)) if train.features[:, number].any()]
    found = {}
    for left_out in (None, *used):
        columns = [number for number in used if number != left_out]
        weights = np.zeros(len(FEATURES))
        weights[columns] = conditional_logit(train.features[:, columns], train.starts, train.gold)
        name = "none_left_out" if left_out is None else f"without_{FEATURES[left_out]}"
        found[name] = round(float(is_right(dev, weights).mean()), 4)
    return found


def publish(results: Mapping[str, object], arguments: str, num_train: int) -> None:
    """Note the figures among those of the score."""
    what = (
        f"evidence alone, no language model; WikiDiverse text only, 7,642 names, weights fitted on {num_train} "
        "training mentions without their own groups and judged on dev; emoji with pictures, 551 names, fitted on "
        f"{NUM_EMOJI} training mentions without their own artists, and again with a third of the entities unseen"
    )
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = f"python benchmarks/score_evidence.py DATA {arguments}"
    stored |= {name: record(value, command, what) for name, value in results.items()}
    RESULTS.write_text(json.dumps(stored, indent=2) + "\n")
    logger.info("%s", json.dumps(results, indent=1))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

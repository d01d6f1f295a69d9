"""Candidate pools of mentions with labels, the weights that fit them, and what evidence alone answers by them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.corpora import (
    EMOJI,
    EMOJI_INDEXES,
    GAZETTEER_INDEXES,
    IMAGE_ENCODER,
    INDEXES,
    MENTION_ENCODER,
    SEED,
    mentions_of,
    picture_features,
    read_rows,
)
from benchmarks.record import mean
from gemel_engine.config.components import RetrievalSettings, VisionSettings
from gemel_engine.evaluation.fit_score import LabelledPools, fit_score
from gemel_engine.evidence.features import FEATURES
from gemel_engine.evidence.index import open_evidence
from gemel_engine.evidence.retrieved import Retrieved
from gemel_engine.evidence.retriever import Retriever
from gemel_engine.evidence.weights import ScoreWeights, softmax
from gemel_engine.knowledge_base.store import KnowledgeBase
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.types import Features, Mention, PoolEntity, Prediction, predictions_to_table

WORK = Path("build/score")
NUM_WIKIDIVERSE, NUM_EMOJI, NUM_GAZETTEER = 6000, 1500, 1500  # training mentions that weights are fitted on
RAISED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # factors of the weight of pictures
# The gazetteer draws its places evenly, other texts do not. It costs nothing there, and decides where all else is even.
LEAST_POPULARITY = 0.1
OF_TRAINING = frozenset({"form", "similar_form", "training_picture", "frequency"})

Labelled = tuple[list[Mention], list[Features | None], list[str]]  # mentions, their pictures and entities

logger = logging.getLogger("benchmarks")


class Pools:
    """Candidate pools of mentions with labels, kept in a file.

    Args:
        name: Name of the file.
        indexes: Directory of the knowledge base and, if there are any, the demonstrations.
        mentions: Returns the mentions, if there is no file yet.
        is_training: Whether these are training mentions, whose own groups are left out.
    """

    def __init__(
        self, name: str, indexes: Path, mentions: Callable[[], Labelled], *, is_training: bool = False
    ) -> None:
        self.knowledge_base = KnowledgeBase.open(indexes / "knowledge_base")
        path = WORK / f"{name}.parquet"
        if not path.exists():
            found, features, gold = mentions()
            settings = RetrievalSettings(
                mention_encoder=MENTION_ENCODER, num_demonstrations=0, exclude_group=is_training
            )
            evidence = open_evidence(indexes / "knowledge_base")
            demonstrations = indexes / "demonstrations"
            index = DemonstrationIndex.open(demonstrations) if demonstrations.is_dir() else None
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
        """The pools, and again as if a sixth of the entities had no training mention.

        Both tell how far a picture of the knowledge base reaches where training has none. With a third instead of a
        sixth, weights are 0.007 worse on WikiDiverse dev and 0.025 better on unseen entities of emoji dev.
        """
        gold = self.table["gold"].to_pylist()
        entities = sorted(set(gold))
        unseen = set(random.Random(SEED).sample(entities, len(entities) // 6))
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
        """Return the accuracy of the form's most frequent training entity, else of an equal name or alias."""
        rows = self.table.select(["pool", "gold"]).to_pylist()
        return mean([_looked_up(row["pool"] or []) == row["gold"] for row in rows])


def _of_knowledge_base(item: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the reasons of an entity of a pool that its training mentions have no part in."""
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
    """Return predictions that have a pool and nothing else."""
    entity_id = knowledge_base.entity_id
    return [
        Prediction(
            mention.mention_id,
            pool=tuple(PoolEntity(entity_id(item.row), item.score, item.reasons) for item in found.candidates),
        )
        for mention, found in zip(mentions, retrieved, strict=True)
    ]


def wikidiverse_pools(data: Path, split: Literal["train", "dev"], num_mentions: int | None = None) -> Pools:
    """Return the pools of a split of WikiDiverse, or of a fixed sample of it, without pictures."""

    def mentions() -> Labelled:
        rows = read_rows(data / f"{split}.parquet", num_mentions)
        return mentions_of(rows), [None] * len(rows), [row["entity_id"] for row in rows]

    name = split if num_mentions is None else f"{split}_{num_mentions}"
    return Pools(name, INDEXES, mentions, is_training=split == "train")


def emoji_train() -> Pools:
    """Return the pools of a fixed sample of the emoji corpus' training mentions; their groups are their artists."""

    def mentions() -> Labelled:
        index = DemonstrationIndex.open(EMOJI_INDEXES / "demonstrations")
        items = [index[row] for row in random.Random(SEED).sample(range(len(index)), NUM_EMOJI)]
        found = [Mention(item.mention_id, item.text, item.mention, group=item.group) for item in items]
        return found, [item.features for item in items], [item.entity_id for item in items]

    return Pools("emoji_train", EMOJI_INDEXES, mentions, is_training=True)


def emoji(split: str) -> Pools:
    """Return the pools of a split of the emoji corpus, with its pictures."""

    def mentions() -> Labelled:
        rows = read_rows(EMOJI / f"{split}.parquet")
        features = picture_features(rows, VisionSettings(image_encoder=IMAGE_ENCODER))
        return mentions_of(rows), features, [row["entity_id"] for row in rows]

    return Pools(f"emoji_{split}", EMOJI_INDEXES, mentions)


def gazetteer(split: Literal["train", "dev"]) -> Pools:
    """Return the pools of a split of the gazetteer corpus, of train a fixed sample; no training mention is known."""

    def mentions() -> Labelled:
        rows = read_rows(GAZETTEER_INDEXES / f"{split}.parquet", NUM_GAZETTEER)
        return mentions_of(rows), [None] * len(rows), [row["entity_id"] for row in rows]

    return Pools(f"gazetteer_{split}", GAZETTEER_INDEXES, mentions)


def fit_corpora(texts: LabelledPools, what: Mapping[str, object] | None = None) -> ScoreWeights:
    """Fit weights on three corpora at once, each of which has what the others lack.

    The emoji corpus has aliases and pictures, the gazetteer homonyms, descriptions and popularity. The weight of
    pictures is raised to where most of the emoji corpus' training mentions are right, those of unseen entities
    included.

    Args:
        texts: Pools of WikiDiverse.
        what: What to note about the data.
    """
    pictures = emoji_train().with_unseen
    weights = fit_score(joined([texts, pictures, gazetteer("train").labelled]), fitted_on=what)
    fitted = weights.features | {"popularity": max(LEAST_POPULARITY, weights.features["popularity"])}
    raised = [replace(weights, features=fitted | {"picture": factor * fitted["picture"]}) for factor in RAISED]
    return max(raised, key=lambda tried: accuracy(pictures, tried))


def joined(parts: Sequence[LabelledPools]) -> LabelledPools:
    """Return the pools of several corpora as those of one."""
    num_candidates = np.cumsum([0, *(part.starts[-1] for part in parts)])
    num_forms = np.cumsum([0, *(part.forms.max() + 1 for part in parts)])
    return LabelledPools(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.log_probs for part in parts]),
        np.concatenate([[0], *(part.starts[1:] + before for part, before in zip(parts, num_candidates, strict=False))]),
        np.concatenate(
            [np.where(part.gold < 0, -1, part.gold + n) for part, n in zip(parts, num_candidates, strict=False)]
        ),
        np.concatenate([part.forms + before for part, before in zip(parts, num_forms, strict=False)]),
    )


def vector(weights: ScoreWeights) -> NDArray[np.float64]:
    """Return the weights in the order of the features."""
    return np.array([weights.features.get(name, 0.0) for name in FEATURES])


def is_right(pools: LabelledPools, weights: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return whether the best candidate of each mention by evidence alone is right, (mentions,)."""
    scores, starts = pools.features @ weights, pools.starts
    best = [start + int(scores[start:end].argmax()) for start, end in pairwise(starts)]
    right: NDArray[np.bool_] = np.array(best) == pools.gold
    return right


def certainties(pools: LabelledPools, weights: ScoreWeights) -> NDArray[np.float64]:
    """Return the probability of the best candidate of each mention by evidence alone, (mentions,)."""
    scores = pools.features @ vector(weights)
    return np.array([softmax(scores[start:end]).max() for start, end in pairwise(pools.starts)])


def accuracy(pools: LabelledPools, weights: ScoreWeights) -> float:
    """Return the accuracy of evidence alone."""
    return mean(is_right(pools, vector(weights)))

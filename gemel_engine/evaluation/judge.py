"""Judge predictions by gold labels: accuracy with intervals, by kind of mention; compare two runs.

An evaluation uses one of three protocols, which say what must be equal for an answer to be right:

    entity      the entity's id, chosen among all entities of the knowledge base
    name        the entity's name, exactly, chosen among all names (GEMEL's protocol)
    candidates  the entity's id, chosen among the mention's own candidates

Mentions without a gold entity (NIL) are not judged. A row with an `error` is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from gemel_engine.config.bounds import EvaluationProtocol
from gemel_engine.errors import InputError
from gemel_engine.evaluation.pool import are_in_pools

_NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over mentions, or entities, with its 95% bootstrap interval (percentiles)."""

    value: float
    low: float
    high: float
    num_mentions: int

    @classmethod
    def of(cls, values: ArrayLike, seed: int = 0) -> Measured:
        """Return the mean of one number per mention, for at least one mention.

        Drawing n mentions with replacement is a multinomial draw of the count of each distinct
        value, so the cost does not grow with the number of mentions.
        """
        numbers = np.asarray(values, np.float64)
        distinct, counts = np.unique(numbers, return_counts=True)
        drawn = np.random.default_rng(seed).multinomial(len(numbers), counts / len(numbers), _NUM_RESAMPLES)
        low, high = np.percentile(drawn @ distinct / len(numbers), [2.5, 97.5])
        return cls(float(numbers.mean()), float(low), float(high), len(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The accuracy of a run, in total and by kind of mention.

    Attributes:
        protocol: Protocol that decides when an answer is right.
        num_mentions: Number of mentions with a gold entity.
        num_nil: Number of mentions not judged: without a gold entity, or with an unknown one.
        num_unknown: Number of those whose gold entity is not in the knowledge base, if it is given.
        num_errors: Number of judged mentions whose row has an error.
        num_without_gold: Number of predictions without a gold row; they are not judged.
        accuracy: Share of right answers.
        macro_accuracy: Mean over the gold entities of the share of right answers to their mentions,
            so that frequent entities count no more than others.
        hits_at_5: Share of mentions with the gold entity among the first five candidates.
        mean_reciprocal_rank: Mean of 1 / rank of the gold entity among the candidates; 0 where it
            is not among them.
        certified_share: Share of answers that are proved to be the best of all names.
        pool_recall: Share of mentions with the gold entity, by its id, in the candidate pool; None
            if the run has no pools.
        baseline: Accuracy without a model: the most frequent training entity of the surface form,
            else the entity of that name; None without a training split.
        buckets: Accuracy by division of the mentions, then by kind, where the given tables allow
            it.
    """

    protocol: EvaluationProtocol
    num_mentions: int
    num_nil: int
    num_unknown: int
    num_errors: int
    num_without_gold: int
    accuracy: Measured
    macro_accuracy: Measured
    hits_at_5: Measured
    mean_reciprocal_rank: Measured
    certified_share: Measured
    pool_recall: Measured | None
    baseline: Measured | None
    buckets: dict[str, dict[str, Measured]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two runs on the same mentions.

    Attributes:
        difference: Accuracy of the second run minus that of the first, with a paired interval.
        num_changed: Number of mentions whose answers differ.
        won: Ids of the mentions where only the second run is right.
        lost: Ids of the mentions where only the first run is right.
        p_value: Two-sided p-value of McNemar's exact test on the numbers won and lost.
    """

    difference: Measured
    num_changed: int
    won: tuple[str, ...]
    lost: tuple[str, ...]
    p_value: float


class Judge:
    """Judges runs by gold labels.

    Args:
        gold: Table with columns `mention_id`, `entity_id` (null: NIL), and optionally `mention`,
            `candidate_ids` and `has_picture`.
        entities: Table with columns `entity_id`, `name` and optionally `popularity`; required by
            the protocol `name`. A mention whose entity is not in it counts as NIL.
        train: Table with columns `mention` and `entity_id` of the training split.
        protocol: Protocol that decides when an answer is right.

    Raises:
        InputError: A table lacks a column that the protocol needs, or two gold rows have one
            `mention_id`.
    """

    def __init__(
        self,
        gold: pa.Table,
        *,
        entities: pa.Table | None = None,
        train: pa.Table | None = None,
        protocol: EvaluationProtocol = "entity",
    ) -> None:
        self.protocol = protocol
        self._gold = checked_frame(gold, ("mention_id", "entity_id"), "gold")
        self._entities = None if entities is None else checked_frame(entities, ("entity_id", "name"), "entities")
        self._train = None if train is None else checked_frame(train, ("mention", "entity_id"), "train")
        self._check_protocol()
        repeated = self._gold.loc[self._gold["mention_id"].duplicated(), "mention_id"]
        if len(repeated):
            raise InputError(
                f"{len(repeated)} gold rows repeat a mention_id, such as {repeated.iloc[0]!r}: remove them"
            )
        self._num_unknown = 0
        if self._entities is not None:
            unknown = self._gold["entity_id"].notna() & ~self._gold["entity_id"].isin(self._entities["entity_id"])
            self._num_unknown = int(unknown.sum())
            self._gold.loc[unknown, "entity_id"] = None

    def judge(self, predictions: pa.Table) -> pd.DataFrame:
        """Join the gold mentions that are not NIL with their predictions, in the order of the gold.

        Returns:
            The columns of both tables except `pool`; `answer` and `wanted` (ids, or names in the
            protocol `name`); and `rank`: the rank of the wanted entity among the candidates, from
            1; 0 if it is not among them.

        Raises:
            InputError: A mention has no prediction, or there is nothing to judge.
        """
        small = predictions.select([name for name in predictions.column_names if name != "pool"])
        predicted = checked_frame(small, ("mention_id", "entity_id", "candidates", "error"), "predictions")
        judged = self._gold[self._gold["entity_id"].notna()].merge(
            predicted, on="mention_id", how="left", suffixes=("_gold", ""), indicator=True
        )
        missing = judged.loc[judged["_merge"] == "left_only", "mention_id"]
        if len(missing):
            raise InputError(
                f"{len(missing)} gold mentions have no prediction, such as {list(missing[:3])}: link them all, or give "
                "the gold labels of the linked mentions alone"
            )
        if judged.empty:
            raise InputError("nothing to judge: give labels with the ids of entities of the knowledge base")
        judged["wanted"] = self._answers(judged["entity_id_gold"])
        judged["answer"] = self._answers(judged["entity_id"])
        answer_of: Callable[[str], object] = self._names.to_dict().get if self.protocol == "name" else str
        found = ([] if row is None else [answer_of(item["entity_id"]) for item in row] for row in judged["candidates"])
        judged["rank"] = [
            next((rank for rank, answer in enumerate(dict.fromkeys(row), 1) if answer == wanted), 0)
            for row, wanted in zip(found, judged["wanted"], strict=True)
        ]
        return judged

    def outcomes(self, predictions: pa.Table) -> tuple[pa.Table, NDArray[np.bool_], NDArray[np.bool_]]:
        """Select the labelled mentions of a run, including NIL.

        Returns:
            Their predictions (N rows), whether each answer is right (N,), and whether each mention
            is NIL (N,).
        """
        labelled = predictions.filter(pc.is_in(predictions["mention_id"], pa.array(self._gold["mention_id"])))
        wanted = labelled["mention_id"].to_pandas().map(self._gold.set_index("mention_id")["entity_id"])
        is_right = self._answers(labelled["entity_id"].to_pandas()) == self._answers(wanted)
        return labelled, (wanted.notna() & is_right).to_numpy(), wanted.isna().to_numpy()

    def verdicts(self, predictions: pa.Table) -> pa.Table:
        """Return a verdict on each labelled mention of a run.

        Returns:
            Table with columns `mention_id`, `entity_id` and `entity_name` (gold; null for NIL, the
            name also where it is unknown) and `right` (null for NIL).
        """
        labelled, is_right, is_nil = self.outcomes(predictions)
        mention_ids = labelled["mention_id"].to_pandas()
        wanted = mention_ids.map(self._gold.set_index("mention_id")["entity_id"])
        names = wanted.map(self._names) if self._entities is not None else pd.Series([None] * len(wanted))
        return pa.table(
            {
                "mention_id": pa.array(mention_ids, pa.string()),
                "entity_id": pa.array(wanted, pa.string(), from_pandas=True),
                "entity_name": pa.array(names, pa.string(), from_pandas=True),
                "right": pa.array(is_right, pa.bool_(), mask=is_nil),
            }
        )

    def evaluate(self, predictions: pa.Table) -> Evaluation:
        """Judge a run.

        Raises:
            InputError: A mention has no prediction.
        """
        judged = self.judge(predictions)
        right = judged["rank"] == 1
        found = judged["rank"].to_numpy()
        guesses = self._guesses(judged)
        in_pool = are_in_pools(predictions, judged["mention_id"].to_list(), judged["entity_id_gold"].to_list())
        return Evaluation(
            protocol=self.protocol,
            num_mentions=len(judged),
            num_nil=len(self._gold) - len(judged),
            num_unknown=self._num_unknown,
            num_errors=int(judged["error"].notna().sum()),
            num_without_gold=len(set(predictions["mention_id"].to_pylist()) - set(self._gold["mention_id"])),
            accuracy=Measured.of(right),
            macro_accuracy=Measured.of(right.groupby(judged["entity_id_gold"]).mean()),
            hits_at_5=Measured.of((found >= 1) & (found <= 5)),
            mean_reciprocal_rank=Measured.of(np.divide(1.0, found, where=found > 0, out=np.zeros(len(found)))),
            certified_share=Measured.of(judged["certified"].fillna(False).astype(bool)),
            pool_recall=None if in_pool is None else Measured.of(in_pool),
            baseline=None if guesses is None else Measured.of(guesses.to_numpy() == judged["wanted"].to_numpy()),
            buckets={
                kind: {str(label): Measured.of(of_label) for label, of_label in right.groupby(kinds, observed=True)}
                for kind, kinds in self._kinds(judged)
                if kinds.nunique() > 1
            },
        )

    def compare(self, first: pa.Table, second: pa.Table) -> Comparison:
        """Compare two runs on the same mentions.

        Raises:
            InputError: A mention has no prediction in one of them.
        """
        one, two = self.judge(first), self.judge(second)
        right_one, right_two = (one["rank"] == 1).to_numpy(), (two["rank"] == 1).to_numpy()
        won, lost = right_two & ~right_one, right_one & ~right_two
        num_won, num_uneven = int(won.sum()), int((won | lost).sum())
        return Comparison(
            difference=Measured.of(right_two.astype(float) - right_one),
            num_changed=int((one["answer"].fillna("") != two["answer"].fillna("")).sum()),
            won=tuple(one["mention_id"][won]),
            lost=tuple(one["mention_id"][lost]),
            p_value=float(binomtest(num_won, num_uneven).pvalue) if num_uneven else 1.0,
        )

    def _check_protocol(self) -> None:
        if self.protocol == "name" and self._entities is None:
            raise InputError("the protocol name needs the entities' names: give the table of entities")
        has_candidates = "candidate_ids" in self._gold and self._gold["candidate_ids"].notna()
        if self.protocol == "candidates" and not np.all(has_candidates):
            raise InputError("the protocol candidates needs candidate_ids for every mention: use the protocol entity")
        if self.protocol != "candidates" and np.any(has_candidates):
            raise InputError(
                f"some mentions have candidate_ids, so the protocol {self.protocol} would mix two kinds of answers: "
                "use the protocol candidates, or link without candidates"
            )

    def _answers(self, entity_ids: pd.Series) -> pd.Series:
        """Return what the protocol compares: the ids themselves, or the names of the entities."""
        return entity_ids.map(self._names) if self.protocol == "name" else entity_ids

    @cached_property
    def _names(self) -> pd.Series:
        assert self._entities is not None, "asked for only with them"
        return self._entities.drop_duplicates("entity_id").set_index("entity_id")["name"]

    def _guesses(self, judged: pd.DataFrame) -> pd.Series | None:
        """Return the answers of the baseline; None if it can't be computed."""
        if self._train is None or "mention" not in judged:
            return None
        counts = self._train.groupby(["mention", "entity_id"]).size().rename("count").reset_index()
        commonest = counts.sort_values("count", kind="stable", ascending=False).drop_duplicates("mention")
        guesses = judged["mention"].map(commonest.set_index("mention")["entity_id"])
        if self._entities is not None:
            of_name = self._entities.drop_duplicates("name").set_index("name")["entity_id"]
            guesses = guesses.fillna(judged["mention"].map(of_name))
        return self._answers(guesses)

    def _kinds(self, judged: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
        """Yield the name of each division and the kind of each mention, as an ordered category."""
        if self._entities is not None and "popularity" in self._entities and self._entities["popularity"].notna().any():
            popularity = self._entities.drop_duplicates("entity_id").set_index("entity_id")["popularity"]
            of_mention = judged["entity_id_gold"].map(popularity)
            ranks = of_mention.rank(pct=True).fillna(0)
            labels = ["unknown", "lowest quarter", "second", "third", "highest quarter"]
            yield "popularity of the entity", _grouped(ranks, [0, 0.25, 0.5, 0.75], labels)
        if self._train is not None:
            frequency = judged["entity_id_gold"].map(self._train["entity_id"].value_counts()).fillna(0)
            yield "entity in training", _either(frequency > 0, "seen", "never seen")
            if "mention" in judged:
                meanings = self._train.groupby("mention")["entity_id"].nunique()
                num_meanings = judged["mention"].map(meanings).fillna(0)
                labels = ["never seen", "one entity", "several entities"]
                yield "surface form in training", _grouped(num_meanings, [0, 1], labels)
            labels = ["0", "1 to 2", "3 to 9", "10 or more"]
            yield "training mentions of the entity", _grouped(frequency, [0, 2, 9], labels)
        if self._entities is not None and "mention" in judged:
            is_name = judged["mention"].str.casefold() == judged["entity_id_gold"].map(self._names).str.casefold()
            yield "surface form", _either(is_name, "is the name", "is another")
        if "has_picture" in judged:
            yield "picture", _either(judged["has_picture"], "with", "without")


def checked_frame(table: pa.Table, required: tuple[str, ...], what: str) -> pd.DataFrame:
    """Convert a table to a data frame.

    Raises:
        InputError: A required column is missing.
    """
    missing = [column for column in required if column not in table.column_names]
    if missing:
        raise InputError(f"the table of {what} has no column {', '.join(missing)}: add it")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _either(holds: pd.Series, yes: str, no: str) -> pd.Series:
    return pd.Series(pd.Categorical(np.where(holds, yes, no), [yes, no]), index=holds.index)


def _grouped(values: pd.Series, highest: list[float], labels: list[str]) -> pd.Series:
    """Group numbers into intervals that end at each of `highest`; the last one is unbounded."""
    return pd.cut(values, [-np.inf, *highest, np.inf], labels=labels)

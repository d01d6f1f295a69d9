"""Predicts the duration and cost of linking a corpus from the measured cost of a few windows.

An actor spends `per_shard + per_row * n` seconds on a shard of n rows. `per_shard` does not depend
on the length: it contains the first prompts, which find nothing in the prefix cache, and the end of
the batch, when the engine is half empty. Windows of two sizes separate the two coefficients. This
module uses neither Ray nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gemel_engine.errors import ConfigurationError

_PAIRS = 8  # number of windows of each size
_LONG = 3  # length of a long window, in short ones
_SHARE = _PAIRS * (1 + _LONG) + 1  # length of a sample in short windows, warm-up included
_CONFIDENCE = 0.95
_SHARD_SECONDS = 600  # maximum seconds of work that are lost when an actor dies
_SHARDS_PER_ACTOR = 4  # minimum, so that all actors end at about the same time
_SHARD_ROWS = (64, 8192)  # bounds of the proposed size
_SPARE = 1.2  # factor on the size of all pools but generation


def draw_windows(num_rows: int, sample_rows: int, seed: int = 0) -> list[tuple[int, int]]:
    """Draw windows that don't overlap, in random places and order.

    Args:
        num_rows: Number of rows of the corpus.
        sample_rows: Maximum number of rows in all windows.
        seed: Seed of the places and the order.

    Returns:
        Start and stop of each window. The first is short and serves as warm-up; then follow equal
        numbers of short and long windows in random order.

    Raises:
        ConfigurationError: The sample is larger than the corpus, or too small to have windows.
    """
    if sample_rows > num_rows:
        raise ConfigurationError(
            f"sample_rows is {sample_rows}, but the corpus has {num_rows} rows: give at most as many, or just link it"
        )
    short = sample_rows // _SHARE
    if not short:
        raise ConfigurationError(f"sample_rows is {sample_rows}: give at least {_SHARE}, for {2 * _PAIRS + 1} windows")
    generator = np.random.default_rng(seed)
    mixed = generator.permutation([short] * _PAIRS + [_LONG * short] * _PAIRS)
    lengths = np.array([short, *mixed])
    # Distribute the rows outside the windows at random; then draw the order of the windows.
    gaps = np.sort(generator.integers(0, num_rows - lengths.sum() + 1, len(lengths)))
    place = generator.permutation(len(lengths))
    before = np.concatenate([[0], np.cumsum(lengths[place])[:-1]])
    starts = np.empty_like(before)
    starts[place] = gaps + before
    return [(int(start), int(start + length)) for start, length in zip(starts, lengths, strict=True)]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A predicted number with its 95% interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float, plus: float = 0.0) -> Estimate:
        """Return the estimate of `factor` times this number `plus` a constant."""
        return Estimate(*(factor * number + plus for number in (self.value, self.low, self.high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """The cost of a stage for one of its actors, fitted to windows.

    Attributes:
        per_shard: Seconds per shard in addition to its rows.
        per_row: Seconds per row.
        covariance: Variance of `per_shard`, covariance of both, variance of `per_row`.
        row_variance: Residual variance of the seconds of one row.
        num_free: Degrees of freedom: number of windows minus number of fitted coefficients.
    """

    per_shard: float
    per_row: float
    covariance: tuple[float, float, float]
    row_variance: float
    num_free: int

    @classmethod
    def fit(cls, rows: ArrayLike, seconds: ArrayLike) -> StageCost:
        """Fit a line by weighted least squares; the variance is proportional to the rows.

        The line goes through the origin if a coefficient would be negative.

        Args:
            rows: Number of rows of each window (W,); at least three windows, not all of one size.
            seconds: Seconds that the actor spent on each window (W,).
        """
        counts, costs = np.asarray(rows, np.float64), np.asarray(seconds, np.float64)
        weights = 1 / np.sqrt(counts)
        both = np.stack([weights, counts * weights], axis=1)  # (W, 2)
        found = np.linalg.lstsq(both, costs * weights)[0]
        design, line = (both, found) if found.min() >= 0 else (both[:, 1:], np.array([costs.sum() / counts.sum()]))
        num_free = len(counts) - design.shape[1]
        row_variance = float(np.sum((costs * weights - design @ line) ** 2) / num_free)
        covariance = np.zeros((2, 2))
        covariance[-len(line) :, -len(line) :] = row_variance * np.linalg.inv(design.T @ design)
        return cls(
            per_shard=float(line[0]) if len(line) == 2 else 0.0,
            per_row=float(line[-1]),
            covariance=(float(covariance[0, 0]), float(covariance[0, 1]), float(covariance[1, 1])),
            row_variance=row_variance,
            num_free=num_free,
        )

    def seconds(self, num_shards: float, num_rows: float) -> Estimate:
        """Return the predicted seconds for one actor to process these shards and rows."""
        value = num_shards * self.per_shard + num_rows * self.per_row
        of_shards, of_both, of_rows = self.covariance
        variance = num_shards**2 * of_shards + 2 * num_shards * num_rows * of_both + num_rows**2 * of_rows
        deviation = math.sqrt(max(0.0, variance) + num_rows * self.row_variance)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, self.num_free)) * deviation
        return Estimate(value, max(0.0, value - half), value + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """The prediction for one cluster.

    Attributes:
        actors: Number of generation actors.
        seconds: Duration of the job if all actors start at once.
        cost: Price of the actors over that time; None without a price.
        limited_by: Stage that takes longest.
        pools: Proposed number of actors of each other stage: enough to keep up with generation, and
            a reserve.
        rows_per_shard: Proposed setting: each actor gets several shards, and a lost shard costs
            minutes.
    """

    actors: int
    seconds: Estimate
    cost: Estimate | None
    limited_by: str
    pools: dict[str, int]
    rows_per_shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A corpus and the cost of linking it.

    Attributes:
        num_rows: Number of rows.
        num_shards: Number of shards.
        rows_per_shard: Number of rows of each shard but the last of a file.
        start_seconds: Seconds before the first row, which do not depend on the number of rows.
        stages: Cost of each stage, including `generation`.
    """

    num_rows: int
    num_shards: int
    rows_per_shard: int
    start_seconds: float
    stages: Mapping[str, StageCost]

    def on(self, pools: Mapping[str, int], price_per_actor_hour: float | None = None) -> ClusterPlan:
        """Predict a cluster.

        Args:
            pools: Number of actors of each stage.
            price_per_actor_hour: Price per generation-actor hour, including its helper actors.
        """
        seconds = {name: self._stage_seconds(cost, pools[name]) for name, cost in self.stages.items()}
        limited_by = max(seconds, key=lambda name: seconds[name].value)
        total, actors = seconds[limited_by].times(1.0, self.start_seconds), pools["generation"]
        priced = None if price_per_actor_hour is None else total.times(actors * price_per_actor_hour / 3600)
        of_shard = {name: cost.seconds(1, self.rows_per_shard).value for name, cost in self.stages.items()}
        return ClusterPlan(
            actors=actors,
            seconds=total,
            cost=priced,
            limited_by=limited_by,
            pools={
                name: max(1, math.ceil(_SPARE * actors * spent / of_shard["generation"]))
                for name, spent in of_shard.items()
                if name != "generation"
            },
            rows_per_shard=self._proposed_rows_per_shard(actors),
        )

    def _stage_seconds(self, cost: StageCost, actors: int) -> Estimate:
        """Return the predicted seconds of the stage's busiest actor."""
        num_shards = -(-self.num_shards // actors)
        return cost.seconds(num_shards, min(self.num_rows, num_shards * self.rows_per_shard))

    def _proposed_rows_per_shard(self, actors: int) -> int:
        """Return the proposed `rows_per_shard`, a power of two."""
        least, most = _SHARD_ROWS
        in_time = _SHARD_SECONDS / max(self.stages["generation"].per_row, _SHARD_SECONDS / most)
        rows = min(in_time, self.num_rows / (_SHARDS_PER_ACTOR * actors), most)
        return 1 << int(math.log2(max(rows, least)))

"""How long a corpus takes, from what a few windows of it cost: which to link, what they tell, what follows.

An actor spends `per_shard + per_row * n` seconds on a shard of n rows. The first part is what every shard pays however
long it is: prompts that find nothing of theirs in the prefix cache yet, and the end of the batch, when the engine runs
half empty. Windows of two sizes tell the two apart. Knows neither Ray nor files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from gemel_engine.errors import ConfigurationError

_PAIRS = 8  # windows of each size
_LONG = 3  # times a short one
_SHARE = _PAIRS * (1 + _LONG) + 1  # short windows that a sample amounts to, with the one that warms up
_CONFIDENCE = 0.95
_SHARD_SECONDS = 600  # that an actor may lose with its shard
_SHARDS_PER_ACTOR = 4  # at least, so that all end at about the same time
_SHARD_ROWS = (64, 8192)
_SPARE = 1.2  # of the pools before generation


def draw_windows(num_rows: int, sample_rows: int, seed: int = 0) -> list[tuple[int, int]]:
    """Draw windows that don't overlap, in random places and order.

    Args:
        num_rows: Of the corpus.
        sample_rows: At most so many lie in windows.
        seed: Equal seeds draw equal windows.

    Returns:
        Start and stop of each. The first, which is short, is to warm up; then come as many short ones as long ones,
        mixed.

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
    # Rows outside windows fall between them at random; then who stands where is drawn, too.
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
        """The estimate of a number that is this one, scaled and shifted."""
        return Estimate(*(factor * number + plus for number in (self.value, self.low, self.high)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage costs one of its actors, fitted to windows.

    Attributes:
        per_shard: Seconds that each shard costs beside its rows.
        per_row: Seconds.
        covariance: Of these two, as variance, covariance, variance.
        row_variance: Of the seconds of one row, about the line.
        num_free: Windows less fitted numbers.
    """

    per_shard: float
    per_row: float
    covariance: tuple[float, float, float]
    row_variance: float
    num_free: int

    @classmethod
    def fit(cls, rows: ArrayLike, seconds: ArrayLike) -> StageCost:
        """Fit a line by least squares, through the origin where it would begin below; the variance grows with the rows.

        Args:
            rows: Of each window (W,); at least three windows, not all of one size.
            seconds: That its actor took (W,).
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
        """Of an actor that works on so many shards with so many rows in all."""
        value = num_shards * self.per_shard + num_rows * self.per_row
        of_shards, of_both, of_rows = self.covariance
        variance = num_shards**2 * of_shards + 2 * num_shards * num_rows * of_both + num_rows**2 * of_rows
        deviation = math.sqrt(max(0.0, variance) + num_rows * self.row_variance)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, self.num_free)) * deviation
        return Estimate(value, max(0.0, value - half), value + half)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What a cluster makes of the corpus.

    Attributes:
        actors: Of generation.
        seconds: From the start of the job to its end, where all actors start at once.
        cost: Of the actors over that time; None without a price.
        limited_by: The stage that takes longest.
        pools: Actors of each other stage with which it keeps up with generation, and some to spare.
        rows_per_shard: With which every actor has several shards, and loses minutes with one.
    """

    actors: int
    seconds: Estimate
    cost: Estimate | None
    limited_by: str
    pools: dict[str, int]
    rows_per_shard: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A corpus and what it costs.

    Attributes:
        num_rows: Of all.
        num_shards: That it is cut into.
        rows_per_shard: Of all of these but a file's last.
        start_seconds: Before the first row and whatever the number of rows.
        stages: Cost of each stage, `generation` among them.
    """

    num_rows: int
    num_shards: int
    rows_per_shard: int
    start_seconds: float
    stages: Mapping[str, StageCost]

    def on(self, pools: Mapping[str, int], price_per_actor_hour: float | None = None) -> ClusterPlan:
        """Predict a cluster.

        Args:
            pools: Actors of each stage.
            price_per_actor_hour: Of a generation actor and what stands beside it.
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
        """Of the stage's busiest actor."""
        num_shards = -(-self.num_shards // actors)
        return cost.seconds(num_shards, min(self.num_rows, num_shards * self.rows_per_shard))

    def _proposed_rows_per_shard(self, actors: int) -> int:
        """A power of two."""
        least, most = _SHARD_ROWS
        in_time = _SHARD_SECONDS / max(self.stages["generation"].per_row, _SHARD_SECONDS / most)
        rows = min(in_time, self.num_rows / (_SHARDS_PER_ACTOR * actors), most)
        return 1 << int(math.log2(max(rows, least)))

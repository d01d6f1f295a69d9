"""Windows of a corpus and what follows from their costs, against known truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemel_engine.errors import ConfigurationError
from gemel_engine.linking.capacity import Estimate, StageCost, Workload, draw_windows

pytestmark = pytest.mark.unit

LENGTHS = np.array([30, 90] * 8)


@given(sample_rows=st.integers(33, 400), left_over=st.integers(0, 300), seed=st.integers(0, 5))
def test_windows_lie_apart_within_the_corpus(sample_rows: int, left_over: int, seed: int) -> None:
    num_rows = sample_rows + left_over
    windows = draw_windows(num_rows, sample_rows, seed)
    assert windows == draw_windows(num_rows, sample_rows, seed)
    rows = [row for start, stop in windows for row in range(start, stop)]
    assert len(rows) == len(set(rows)) <= sample_rows
    assert 0 <= min(rows) <= max(rows) < num_rows
    short = windows[0][1] - windows[0][0]
    lengths = [stop - start for start, stop in windows[1:]]
    assert sorted(lengths) == [short] * 8 + [3 * short] * 8
    assert 33 * (short + 1) > sample_rows


def test_windows_reach_every_part_of_the_corpus() -> None:
    starts = [start / 10_000 for seed in range(50) for start, _ in draw_windows(10_000, 330, seed)]
    assert np.histogram(starts, 4, (0, 1))[0] == pytest.approx(len(starts) / 4, rel=0.25)


@pytest.mark.parametrize(
    ("sample_rows", "message"), [(101, "the corpus has 100 rows: give at most as many"), (32, "give at least 33")]
)
def test_a_sample_that_has_no_windows_is_refused(sample_rows: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        draw_windows(100, sample_rows)


def test_a_line_is_found() -> None:
    cost = StageCost.fit(LENGTHS, 4 + 0.5 * LENGTHS)
    assert (cost.per_shard, cost.per_row) == pytest.approx((4, 0.5))
    expected = Estimate(2 * 4 + 100 * 0.5, 58.0, 58.0)
    found = cost.seconds(num_shards=2, num_rows=100)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_no_shard_costs_less_than_nothing() -> None:
    cost = StageCost.fit(LENGTHS, LENGTHS**1.2)
    assert cost.per_shard == 0
    assert cost.per_row == pytest.approx((LENGTHS**1.2).sum() / LENGTHS.sum())


def test_intervals_hold_as_often_as_they_say() -> None:
    """A corpus ten times the sample, whose rows' costs vary by as much as their mean."""
    generator = np.random.default_rng(0)

    def work(lengths: np.ndarray) -> np.ndarray:
        return np.array([6 + generator.gamma(1, 0.5, length).sum() for length in lengths])

    held = 0
    for _ in range(400):
        found = StageCost.fit(LENGTHS, work(LENGTHS)).seconds(num_shards=40, num_rows=9600)
        held += found.low <= work(np.full(40, 240)).sum() <= found.high
    assert 0.92 <= held / 400 <= 0.98


def workload(num_rows: int = 10_000, image_seconds: float = 0.1) -> Workload:
    costs = {"image": image_seconds, "generation": 1.0}
    return Workload(
        num_rows=num_rows,
        num_shards=-(-num_rows // 100),
        rows_per_shard=100,
        start_seconds=50,
        stages={name: StageCost.fit(LENGTHS, each * LENGTHS) for name, each in costs.items()},
    )


def test_the_busiest_actor_of_the_slowest_stage_decides() -> None:
    plan = workload().on({"image": 1, "generation": 8})
    assert (plan.limited_by, plan.actors, plan.cost) == ("generation", 8, None)
    assert plan.seconds.value == pytest.approx(50 + 13 * 100)  # 100 shards among 8: one has 13
    assert plan.pools == {"image": 1}
    plan = workload(image_seconds=0.5).on({"image": 1, "generation": 8}, price_per_actor_hour=3.0)
    assert (plan.limited_by, plan.pools) == ("image", {"image": 5})
    assert plan.seconds.value == pytest.approx(50 + 5000)
    assert plan.cost is not None
    assert plan.cost.value == pytest.approx(5050 / 3600 * 8 * 3.0)


def test_proposed_shards_are_many_and_short() -> None:
    assert workload(10_000).on({"image": 1, "generation": 1}).rows_per_shard == 512  # within ten minutes of an actor
    assert workload(10_000).on({"image": 1, "generation": 20}).rows_per_shard == 64  # four or more for each

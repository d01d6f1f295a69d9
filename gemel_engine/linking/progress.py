"""Progress of a linking run as log lines and as Ray metrics.

    ray_gemel_planned_rows_total{output}            number of rows that this run has to link
    ray_gemel_rows_total{output, outcome}           number of finished rows by outcome: `linked`, or
                                                    the kind of the error
    ray_gemel_rollouts_total{output}                number of rollouts
    ray_gemel_prompt_tokens_total{output, found}    number of prompt tokens, `cache` or `computed`
    ray_gemel_stage_seconds_total{output, stage}    busy time of the actors

Prometheus scrapes them from the same endpoint as Ray's own metrics. The driver exports them; it
receives one receipt for each finished row, even if actors die. So they change when a part of a
shard is finished.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ray.util import metrics

from gemel_engine.display import percent
from gemel_engine.errors import shown
from gemel_engine.pipeline.stages import COSTS, PEAKS, STAGE_PEAK_BYTES, STAGE_SECONDS

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10


@dataclass(slots=True)
class Tally:
    """The sums of receipts.

    Attributes:
        rows: Number of finished rows.
        errors: Number of these rows with an error, by kind.
        costs: Sum of each column of `COSTS`.
        peaks: Maximum of each column of `PEAKS`, in bytes.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    costs: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add a receipt, a row of `RECEIPT_SCHEMA`."""
        self.rows += receipt["num_rows"]
        self.errors.update(receipt["error_kinds"])
        self.costs.update({name: receipt[name] for name in COSTS if receipt[name] is not None})
        for name in PEAKS:
            if receipt[name] is not None:
                self.peaks[name] = max(self.peaks.get(name, 0), int(receipt[name]))

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Return the busy time of the actors of each stage."""
        return {stage: self.costs[name] for stage, name in STAGE_SECONDS.items() if name in self.costs}

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Return the largest memory of a process of each stage."""
        return {stage: self.peaks[name] for stage, name in STAGE_PEAK_BYTES.items() if name in self.peaks}

    @property
    def rollouts(self) -> int:
        """Return the number of rollouts that the engine made."""
        return round(self.costs["rollouts"])

    @property
    def computed_tokens(self) -> float:
        """Return the number of prompt tokens that were not in the prefix cache."""
        return self.costs["prompt_tokens"] - self.costs["cached_tokens"]

    @property
    def cache_hit_rate(self) -> float | None:
        """Return the share of prompt tokens found in the prefix cache, None without tokens."""
        return self.costs["cached_tokens"] / self.costs["prompt_tokens"] if self.costs["prompt_tokens"] else None


class Progress:
    """Accumulates receipts; reports progress as log lines and metrics.

    Args:
        output: Output directory of the run, a tag of its metrics.
        num_rows: Number of rows to link.
    """

    def __init__(self, output: str, num_rows: int) -> None:
        self.tally = Tally()
        self._num_rows = num_rows
        self._first: tuple[float, int] | None = None  # time of the first receipt, and its rows
        self._last_line = -float("inf")
        self._tags = {"output": shown(output).strip("'")}
        tags = ("output",)
        self._rows = metrics.Counter("gemel_rows", "Finished rows by outcome", (*tags, "outcome"))
        self._rollouts = metrics.Counter("gemel_rollouts", "Rollouts asked for finished rows", tags)
        self._tokens = metrics.Counter("gemel_prompt_tokens", "Prompt tokens of finished rows", (*tags, "found"))
        self._seconds = metrics.Counter("gemel_stage_seconds", "Time that actors were busy", (*tags, "stage"))
        # A counter, not a gauge: Ray drops a gauge that is not set between two receipts.
        _increase(metrics.Counter("gemel_planned_rows", "Rows that the run has to link", tags), num_rows, self._tags)

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add a row of `RECEIPT_SCHEMA`; write a log line if the last one is old enough."""
        self.tally.add(receipt)
        self._export(receipt)
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.tally.rows
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or self.tally.rows == self._num_rows
        if is_due and not sys.stdout.isatty():  # on a terminal Ray Data draws bars instead
            self._last_line = now
            self._log(now)

    def _export(self, receipt: Mapping[str, Any]) -> None:
        of_receipt = Tally()
        of_receipt.add(receipt)
        outcomes = of_receipt.errors | Counter(linked=of_receipt.rows - of_receipt.errors.total())
        tokens = {"cache": of_receipt.costs["cached_tokens"], "computed": of_receipt.computed_tokens}
        counted: list[tuple[metrics.Counter, str, Mapping[str, float]]] = [
            (self._rows, "outcome", outcomes),
            (self._tokens, "found", tokens),
            (self._seconds, "stage", of_receipt.stage_seconds),
        ]
        for counter, key, values in counted:
            for label, value in values.items():
                _increase(counter, value, self._tags | {key: label})
        _increase(self._rollouts, of_receipt.rollouts, self._tags)

    def _log(self, now: float) -> None:
        tally, rate = self.tally, self._rows_per_second(now)
        busy = sum(tally.stage_seconds.values()) or 1.0
        left = None if rate is None else timedelta(seconds=round((self._num_rows - tally.rows) / rate))
        logger.info(
            "linked %d of %d rows (%.1f%%), %s rows/s, %s left; %d errors; cache hits %s; busy: %s",
            tally.rows,
            self._num_rows,
            100 * tally.rows / self._num_rows,
            "-" if rate is None else f"{rate:.2f}",
            "-" if left is None else left,
            tally.errors.total(),
            percent(tally.cache_hit_rate),
            ", ".join(f"{stage} {100 * spent / busy:.0f}%" for stage, spent in tally.stage_seconds.items()),
            extra={
                "rows": tally.rows,
                "planned_rows": self._num_rows,
                "rows_per_second": rate,
                "seconds_left": None if left is None else left.total_seconds(),
                "errors": dict(tally.errors),
            },
        )

    def _rows_per_second(self, now: float) -> float | None:
        """Return the rate since the first receipt; None in the first second after it."""
        assert self._first is not None, "called when there is a receipt"
        started, rows = self._first
        return (self.tally.rows - rows) / (now - started) if self.tally.rows > rows and now > started + 1 else None


def _increase(counter: metrics.Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray rejects an increase of 0
        counter.inc(value, tags)

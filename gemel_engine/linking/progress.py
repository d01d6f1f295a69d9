"""Progress of a linking run as sums of receipts; `live` shows it, `metrics` exports it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from gemel_engine.display import percent
from gemel_engine.pipeline.stages import COSTS, PEAKS, STAGE_PEAK_BYTES, STAGE_SECONDS


@dataclass(slots=True)
class Tally:
    """The sums of receipts.

    Attributes:
        rows: Number of finished rows.
        errors: Number of these rows with an error, by kind.
        by_evidence: Number of these rows that evidence decided alone.
        costs: Sum of each column of `COSTS`.
        peaks: Maximum of each column of `PEAKS`, in bytes.
    """

    rows: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    by_evidence: int = 0
    costs: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add a receipt, a row of `RECEIPT_SCHEMA`."""
        self.rows += receipt["num_rows"]
        self.errors.update(receipt["error_kinds"])
        self.by_evidence += receipt["num_by_evidence"]
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
    def unfilled_share(self) -> float | None:
        """Return the share of the engines' time with fewer than half of their slots filled, for want of rows."""
        unfilled = self.costs["waiting_seconds"] + self.costs["unfilled_seconds"]
        seconds = self.costs["waiting_seconds"] + self.costs["generation_seconds"]
        return unfilled / seconds if seconds else None

    @property
    def cache_hit_rate(self) -> float | None:
        """Return the share of prompt tokens found in the prefix cache, None without tokens."""
        return self.costs["cached_tokens"] / self.costs["prompt_tokens"] if self.costs["prompt_tokens"] else None


class Progress:
    """Accumulates receipts.

    Args:
        num_rows: Number of rows to link.
    """

    def __init__(self, num_rows: int) -> None:
        self.tally = Tally()
        self.num_rows = num_rows
        self._first: tuple[float, int] | None = None  # time of the first receipt, and its rows

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add a row of `RECEIPT_SCHEMA`."""
        self.tally.add(receipt)
        if self._first is None:
            self._first = time.monotonic(), self.tally.rows

    def line(self) -> str:
        """Return rate, time left and what was counted so far, without the number of rows."""
        tally, rate = self.tally, self.rows_per_second
        if not tally.rows:
            return "models are loading, or the first shards are at work"
        busy = sum(tally.stage_seconds.values()) or 1.0
        left = None if rate is None else timedelta(seconds=round((self.num_rows - tally.rows) / rate))
        by_model = tally.rows - tally.errors.total() - tally.by_evidence
        return ", ".join(
            [
                f"{'-' if rate is None else f'{rate:.2f}'} rows/s",
                f"{'-' if left is None else left} left; {tally.errors.total()} errors",
                f"{tally.by_evidence} decided by evidence",
                f"{by_model} by the model; cache hits {percent(tally.cache_hit_rate)}; busy: "
                + ", ".join(f"{stage} {100 * spent / busy:.0f}%" for stage, spent in tally.stage_seconds.items()),
            ]
        )

    def fields(self) -> dict[str, object]:
        """Return the same as fields of a structured log record."""
        rate = self.rows_per_second
        return {
            "rows": self.tally.rows,
            "planned_rows": self.num_rows,
            "rows_per_second": rate,
            "seconds_left": None if rate is None else round((self.num_rows - self.tally.rows) / rate),
            "errors": dict(self.tally.errors),
            "by_evidence": self.tally.by_evidence,
        }

    @property
    def rows_per_second(self) -> float | None:
        """Return the rate since the first receipt; None in the first second after it."""
        if self._first is None:
            return None
        (started, rows), now = self._first, time.monotonic()
        return (self.tally.rows - rows) / (now - started) if self.tally.rows > rows and now > started + 1 else None

"""Progress of a linking run as sums and as Ray metrics; `live` shows it.

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
    def cache_hit_rate(self) -> float | None:
        """Return the share of prompt tokens found in the prefix cache, None without tokens."""
        return self.costs["cached_tokens"] / self.costs["prompt_tokens"] if self.costs["prompt_tokens"] else None


class Progress:
    """Accumulates receipts and exports metrics.

    Args:
        output: Output directory of the run, a tag of its metrics.
        num_rows: Number of rows to link.
    """

    def __init__(self, output: str, num_rows: int) -> None:
        self.tally = Tally()
        self.num_rows = num_rows
        self._first: tuple[float, int] | None = None  # time of the first receipt, and its rows
        self._tags = {"output": shown(output).strip("'")}
        tags = ("output",)
        self._rows = metrics.Counter("gemel_rows", "Finished rows by outcome", (*tags, "outcome"))
        self._rollouts = metrics.Counter("gemel_rollouts", "Rollouts asked for finished rows", tags)
        self._tokens = metrics.Counter("gemel_prompt_tokens", "Prompt tokens of finished rows", (*tags, "found"))
        self._seconds = metrics.Counter("gemel_stage_seconds", "Time that actors were busy", (*tags, "stage"))
        # A counter, not a gauge: Ray drops a gauge that is not set between two receipts.
        _increase(metrics.Counter("gemel_planned_rows", "Rows that the run has to link", tags), num_rows, self._tags)

    def add(self, receipt: Mapping[str, Any]) -> None:
        """Add a row of `RECEIPT_SCHEMA`."""
        self.tally.add(receipt)
        self._export(receipt)
        if self._first is None:
            self._first = time.monotonic(), self.tally.rows

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


def _increase(counter: metrics.Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray rejects an increase of 0
        counter.inc(value, tags)

"""Progress of a linking run in actors as Ray metrics.

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

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.util import metrics

from gemel_engine.errors import shown
from gemel_engine.linking.progress import Tally


class RayMetrics:
    """Adds receipts to Ray's metrics.

    Args:
        output: Output directory of the run, a tag of its metrics.
        num_rows: Number of rows to link.
    """

    def __init__(self, output: str, num_rows: int) -> None:
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


def _increase(counter: metrics.Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray rejects an increase of 0
        counter.inc(value, tags)

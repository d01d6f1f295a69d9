"""What came of a linking run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.config.settings import LinkConfig
from gemel_engine.display import percent
from gemel_engine.errors import TooManyFailuresError, error_kind, shown
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.linking.progress import Tally
from gemel_engine.pipeline.corpus import Shard, count_rows

if TYPE_CHECKING:
    from gemel_engine.decoding.generator import Artifacts


@dataclass(frozen=True, slots=True, kw_only=True)
class IncrementalReport:
    """What a run took over from the one that it carries on; rows and costs are of the shards finished by this run.

    Attributes:
        num_changed_entities: Entities that were retired or renamed.
        num_added_names: Names that are new.
        rows_kept: Rows that kept their prediction without a question to the language model.
        rows_extended: Rows that were searched over the added names alone.
        rows_linked: Rows that were linked in full.
        rollouts_before: All those behind the rows of the earlier run.
        prompt_tokens_before: Of the earlier run, as its report says.
    """

    num_changed_entities: int
    num_added_names: int
    rows_kept: int
    rows_extended: int
    rows_linked: int
    rollouts_before: int
    prompt_tokens_before: int

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"kept={self.rows_kept} extended={self.rows_extended} linked={self.rows_linked} "
            f"rollouts_before={self.rollouts_before}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """What came of a run.

    Attributes:
        rows: Rows of the output, all shards.
        errors: Rows that ended in an error, by kind.
        certified_share: Share of the linked rows whose name is proved to be the best.
        rollouts_per_mention: Mean over the linked rows.
        shards: Shards of the output.
        shards_skipped: Those that an earlier run had finished.
        rows_linked_now: Rows of the shards that this run finished; what follows is of these.
        seconds: From the start of the job to its last shard.
        mentions_per_second: Rows over seconds, start-up included.
        stage_seconds: Time that each stage's actors were busy.
        peak_bytes: The most memory that a process of each stage has held.
        rollouts: Asked of the engine.
        prompt_tokens: Of all prompts sent to the engine, one for each rollout.
        cached_tokens: Those of them that it had in its cache.
        prefix_cache_hit_rate: Their share.
        feature_mapper: `trained`, or what its weights were set to: `ridge` (in closed form), `random`, `imported`; or
            `none`.
        carried_over: Of the run that this one carries on; None if it does not.
    """

    rows: int
    errors: dict[str, int]
    certified_share: float | None
    rollouts_per_mention: float | None
    shards: int
    shards_skipped: int
    rows_linked_now: int
    seconds: float
    mentions_per_second: float
    stage_seconds: dict[str, float]
    peak_bytes: dict[str, int]
    rollouts: int
    prompt_tokens: int
    cached_tokens: int
    prefix_cache_hit_rate: float | None
    feature_mapper: str
    carried_over: IncrementalReport | None

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"rows={self.rows} errors={sum(self.errors.values())} certified={percent(self.certified_share)} "
            f"mentions_per_s={self.mentions_per_second:.2f} cache_hits={percent(self.prefix_cache_hit_rate)} "
            f"feature_mapper={self.feature_mapper}"
        )


def _report(
    config: LinkConfig,
    artifacts: Artifacts,
    plan: Sequence[Shard],
    remaining: Sequence[Shard],
    tally: Tally,
    table: pa.Table,
    seconds: float,
) -> LinkReport:
    linked = table.filter(pc.is_null(table["error"]))
    rows_now = count_rows(remaining)
    mapper = artifacts.feature_mapper
    return LinkReport(
        rows=table.num_rows,
        errors=dict(Counter(map(error_kind, table["error"].drop_null().to_pylist()))),
        certified_share=pc.mean(linked["certified"]).as_py(),
        rollouts_per_mention=pc.mean(linked["num_rollouts"]).as_py(),
        shards=len(plan),
        shards_skipped=len(plan) - len(remaining),
        rows_linked_now=rows_now,
        seconds=seconds,
        mentions_per_second=rows_now / seconds,
        stage_seconds=tally.stage_seconds,
        peak_bytes=tally.peak_bytes,
        rollouts=tally.rollouts,
        prompt_tokens=round(tally.costs["prompt_tokens"]),
        cached_tokens=round(tally.costs["cached_tokens"]),
        prefix_cache_hit_rate=tally.cache_hit_rate,
        feature_mapper="none" if mapper is None else mapper.metadata.origin,
        carried_over=_incremental_report(config, tally),
    )


def _incremental_report(config: LinkConfig, tally: Tally) -> IncrementalReport | None:
    if (previous := PreviousRun.of(config)) is None:
        return None
    before = previous.report()
    num_linked_before = before["rows"] - sum(before["errors"].values())
    rows_kept, rows_extended = round(tally.costs["rows_kept"]), round(tally.costs["rows_extended"])
    return IncrementalReport(
        **previous.counts(),
        rows_kept=rows_kept,
        rows_extended=rows_extended,
        rows_linked=tally.rows - rows_kept - rows_extended,
        rollouts_before=round((before["rollouts_per_mention"] or 0) * num_linked_before),
        prompt_tokens_before=before["prompt_tokens"],
    )


def _check_failures(config: LinkConfig, report: LinkReport) -> None:
    num_failed = sum(report.errors.values())
    if num_failed > config.max_failed_fraction * report.rows:
        raise TooManyFailuresError(
            f"{num_failed} of {report.rows} rows failed ({report.errors}), more than max_failed_fraction "
            f"{config.max_failed_fraction} allows; the output {shown(config.output)} is complete: see its `error`"
        )

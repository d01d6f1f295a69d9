"""The report of a linking run, which is saved as `_report.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.config.settings import LinkConfig
from gemel_engine.display import counts, percent
from gemel_engine.errors import TooManyFailuresError, error_kind, shown
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.linking.progress import Tally
from gemel_engine.pipeline.corpus import Shard, count_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class IncrementalReport:
    """What an incremental run reused; numbers of rows cover the shards finished by this call.

    Attributes:
        num_changed_entities: Number of entities that were retired or renamed.
        num_added_names: Number of added names.
        rows_kept: Number of rows that kept the previous prediction without a search.
        rows_extended: Number of rows for which only the added names were searched.
        rows_linked: Number of rows that were linked in full.
        rollouts_before: Number of rollouts of all rows of the previous run.
        prompt_tokens_before: Number of prompt tokens in the report of the previous run.
    """

    num_changed_entities: int
    num_added_names: int
    rows_kept: int
    rows_extended: int
    rows_linked: int
    rollouts_before: int
    prompt_tokens_before: int

    def summary(self) -> str:
        """Return one line for a terminal."""
        return (
            f"kept={self.rows_kept} extended={self.rows_extended} linked={self.rows_linked} "
            f"rollouts_before={self.rollouts_before}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """The counts and costs of a run.

    Attributes:
        rows: Number of rows of the output.
        errors: Number of rows with an error, by kind.
        decided_by: Number of rows without an error by what decided them: `score`,
            `language_model` or `evidence`.
        certified_share: Share of the rows that the language model was asked for whose answer is
            certified.
        rollouts_per_mention: Mean number of rollouts of the rows without an error.
        shards: Number of shards of the output.
        shards_skipped: Number of shards that were finished before this call.
        rows_linked_now: Number of rows in the shards finished by this call, to which all fields
            below refer.
        seconds: Duration of the job up to its last shard.
        mentions_per_second: `rows_linked_now` divided by `seconds`.
        stage_seconds: Busy time of the actors of each stage.
        peak_bytes: Largest memory of a process of each stage.
        rollouts: Number of rollouts that the engine made.
        prompt_tokens: Number of tokens of all prompts sent to the engine, one prompt per rollout.
        cached_tokens: Number of these tokens found in the prefix cache.
        prefix_cache_hit_rate: `cached_tokens` divided by `prompt_tokens`; None without tokens.
        engine_unfilled_share: Share of the engines' time, from the first row to the last, in which
            they had fewer than half of their slots filled because no row waited; None without rows.
        feature_mapper: How its weights were made: `trained`, `ridge` (closed form), `random` or
            `imported`; `none` without a mapper.
        carried_over: What an incremental run reused; None for any other run.
    """

    rows: int
    errors: dict[str, int]
    first_error: str | None
    decided_by: dict[str, int]
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
    engine_unfilled_share: float | None
    feature_mapper: str
    carried_over: IncrementalReport | None

    def summary(self) -> str:
        """Return one line for a terminal."""
        by_evidence = self.decided_by.get("evidence", 0)
        return (
            f"rows={self.rows} errors={sum(self.errors.values())} certified={percent(self.certified_share)} "
            f"by_evidence_alone={by_evidence} "
            f"mentions_per_s={self.mentions_per_second:.2f} cache_hits={percent(self.prefix_cache_hit_rate)} "
            f"feature_mapper={self.feature_mapper}"
        )


def make_report(
    config: LinkConfig,
    feature_mapper: str,
    plan: Sequence[Shard],
    remaining: Sequence[Shard],
    tally: Tally,
    table: pa.Table,
    seconds: float,
) -> LinkReport:
    """Return the report of a run whose output is complete."""
    errors = table["error"].drop_null().to_pylist()
    linked = table.filter(pc.is_null(table["error"]))
    asked = linked.filter(pc.not_equal(pc.fill_null(linked["decided_by"], ""), "evidence"))
    rows_now = count_rows(remaining)
    return LinkReport(
        rows=table.num_rows,
        errors=dict(Counter(map(error_kind, errors))),
        first_error=errors[0] if errors else None,
        decided_by=dict(Counter(linked["decided_by"].drop_null().to_pylist())),
        certified_share=pc.mean(asked["certified"]).as_py(),
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
        engine_unfilled_share=tally.unfilled_share,
        feature_mapper=feature_mapper,
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


def check_failures(config: LinkConfig, report: LinkReport) -> None:
    """Raise if more rows failed than the configuration allows."""
    num_failed = sum(report.errors.values())
    if num_failed > config.max_failed_fraction * report.rows:
        raise TooManyFailuresError(
            f"{num_failed} of {report.rows} rows failed ({counts(report.errors)}), more than max_failed_fraction "
            f"{config.max_failed_fraction} allows; the output {shown(config.output)} is complete: see its `error`; the "
            f"first is {report.first_error}"
        )

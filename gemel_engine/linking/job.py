"""The linking job: shards of mentions pass through stages, in actors of Ray or in this process.

    sort → read mentions → EncodeImages → Retrieve → GenerateEntityNames → write parts
    → commit shards

One block is one shard, or a part of it. The stages are in `pipeline.stages` and `linking.stages`,
`on_ray` and `here` run them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gemel_engine import storage
from gemel_engine.config.columns import ColumnNames
from gemel_engine.config.finding import FindConfig
from gemel_engine.config.loading import validated
from gemel_engine.config.machine import warn_of_slow_dtype
from gemel_engine.config.settings import LinkConfig
from gemel_engine.contents import without_missing_evidence
from gemel_engine.errors import ConfigurationError, shown
from gemel_engine.extras import require
from gemel_engine.finding.job import describe_search, find_mentions
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.checks import Checked, checked
from gemel_engine.linking.here import is_run_here, link_here
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.linking.live import LiveView
from gemel_engine.linking.order import ordered_plan, remove_other_sorts
from gemel_engine.linking.progress import Progress
from gemel_engine.linking.report import LinkReport, check_failures, make_report
from gemel_engine.pipeline import output_check
from gemel_engine.pipeline.corpus import (
    Shard,
    count_rows,
    plan_identity,
    plan_shards,
    with_rows_per_shard,
)
from gemel_engine.pipeline.identity import run_digest, run_identity
from gemel_engine.pipeline.output import (
    RunDirectory,
    check_claim,
    check_settings,
    claim_output,
    is_claimed,
    load_plan,
)

logger = logging.getLogger(__name__)


def link_corpus(config: LinkConfig) -> LinkReport:
    """Link a corpus: every input row becomes exactly one output row.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable (raised before any
            work), or more rows failed than `max_failed_fraction` allows (the output is complete).
    """
    with LiveView() as view:
        report = _linked(config, view)
    check_failures(config, report)
    return report


def _linked(config: LinkConfig, view: LiveView) -> LinkReport:
    """Do what `link_corpus` does, up to the check of failures."""
    started = time.monotonic()
    if config.find_mentions:
        view.enter("finding mentions")
    config = with_found_mentions(config)
    view.enter("checking input, models and artifacts")
    config = settled(config)
    check_settings(config.output, config)
    plan, found = checked_plan(config)
    identity = _identity(config, plan, found.contents)
    run = run_digest(identity)
    claim_output(config.output, identity)
    config = without_missing_evidence(config, has_evidence=found.has_evidence)
    if (previous := PreviousRun.of(config)) is not None:
        previous.note_changes(config.knowledge_base)
    view.enter("sorting the corpus by surface form")
    plan = ordered_plan(config, plan)
    finished = output_check.check_finished(config.output, plan, run)
    remaining = [shard for shard in plan if shard.name not in finished]
    progress = Progress(count_rows(remaining))
    if remaining:
        logger.info(
            "linking %d rows in %d shards of %d rows, in %s",
            *(progress.num_rows, len(remaining), config.rows_per_shard, config.language_model.dtype),
        )
        warn_of_slow_dtype(config)
        view.enter("linking", progress)
        for receipt in _receipts(config, remaining, found.contents, run):
            progress.add(receipt)
    view.enter("checking the output")
    rows = output_check.read_complete(config.output, plan, run, ("error", "certified", "num_rollouts", "decided_by"))
    directory = RunDirectory(config.output)
    for working_files in (directory.parts, directory.marks):  # all shards are complete
        storage.remove_tree(working_files)
    remove_other_sorts(config.output, plan)
    report = make_report(
        config, found.feature_mapper, plan, remaining, progress.tally, rows, time.monotonic() - started
    )
    if remaining or not storage.exists(directory.report):  # else keep that of the finishing run
        storage.write_bytes(directory.report, json.dumps(asdict(report), indent=2).encode())
        done = {"rows": report.rows, "planned_rows": count_rows(remaining), "errors": report.errors}
        logger.info("linked %s: %s", shown(config.output), report.summary(), extra=done)
    else:
        logger.info("nothing is left to link: %s has all %d rows", shown(config.output), report.rows)
    if report.carried_over is not None:
        logger.info("carried on %s: %s", shown(str(config.previous)), report.carried_over.summary())
    return report


def _receipts(
    config: LinkConfig, remaining: Sequence[Shard], contents: Contents, run: str
) -> Iterator[Mapping[str, Any]]:
    """Link shards where it suits their number; yield a row of `RECEIPT_SCHEMA` for each part."""
    if is_run_here(config, remaining):
        return link_here(config, remaining, contents, run)
    from gemel_engine.linking.on_ray import link_on_ray

    return link_on_ray(config, remaining, contents, run)


def describe_run(config: LinkConfig) -> str:
    """Make the checks of `link_corpus` and describe what it would do.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable.
    """
    if (search := _search_of(config)) is not None:
        return describe_search(search)
    config = settled(config)
    check_settings(config.output, config)
    plan, found = checked_plan(config)
    finished: set[str] = set()
    if is_claimed(config.output):
        identity = _identity(config, plan, found.contents)
        check_claim(config.output, identity)
        plan = load_plan(config.output, count_rows(plan)) or plan
        finished = output_check.check_finished(config.output, plan, run_digest(identity))
    remaining = [shard for shard in plan if shard.name not in finished]
    num_rows, num_left = count_rows(plan), count_rows(remaining)
    return (
        f"{config.output}: {num_left} of {num_rows} rows are to be linked, in {len(remaining)} of {len(plan)} shards "
        f"of {config.rows_per_shard} rows; the language model computes in {config.language_model.dtype}; "
        "nothing has been done"
    )


def settled(config: LinkConfig) -> LinkConfig:
    """Return a validated configuration whose defaults by machine and corpus are chosen.

    Raises:
        GemelError: A setting is malformed, or the input cannot be read.
    """
    config = validated(config)
    return with_rows_per_shard(config, config.input)


def with_found_mentions(config: LinkConfig) -> LinkConfig:
    """Find the mentions of a corpus of documents; return the configuration that links them.

    Raises:
        GemelError: As for `find_mentions`.
    """
    if (search := _search_of(config)) is None:
        return config
    find_mentions(search)
    return replace(config, input=f"{search.output}/data", columns=ColumnNames(), find_mentions=False)


def _search_of(config: LinkConfig) -> FindConfig | None:
    """Return the search for mentions before a run; None if its input has mentions."""
    if not config.find_mentions:
        return None
    finding = FindConfig(
        input=config.input,
        output=RunDirectory(config.output).mentions,
        knowledge_base=config.knowledge_base,
        demonstrations=config.demonstrations,
        finder=config.finder,
        columns=config.columns,
        max_failed_fraction=config.max_failed_fraction,
    )
    return finding if config.rows_per_shard is None else replace(finding, rows_per_shard=config.rows_per_shard)


def checked_plan(config: LinkConfig) -> tuple[list[Shard], Checked]:
    """Check the configuration, the corpus and the artifacts; return what a run needs of them.

    Returns:
        The corpus in shards, and its models and artifacts.

    Raises:
        GemelError: Something is unusable, or the artifacts do not fit together.
    """
    config = validated(config)
    if config.find_mentions:
        raise ConfigurationError(
            f"find_mentions is set, but this command needs the mentions of {shown(config.input)}: call `gemel "
            "find-mentions` first, and give its output as `input`, without find_mentions"
        )
    storage.check_kept(config.output)
    storage.check_apart(config.output, config.input)
    if config.language_model.engine == "vllm":
        require("vllm", "cpu", "gpu")
    config = settled(config)
    names = config.columns.given()
    plan = plan_shards(config.input, config.rows_per_shard, config.vision.required_columns, names)

    found = checked(config)
    if (previous := PreviousRun.of(config)) is not None:
        previous.check(_identity(config, plan, found.contents))
    return plan, found


def _identity(config: LinkConfig, plan: Sequence[Shard], contents: Contents) -> dict[str, Any]:
    """Return what makes up a run: settings, input files, models, artifacts and the previous run."""
    previous = PreviousRun.of(config)
    return run_identity(config, plan_identity(plan), contents, None if previous is None else previous.identity())

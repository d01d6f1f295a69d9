"""The linking job: Ray Data streams shards of mentions through actors.

    sort → read mentions → EncodeImages → RetrieveDemonstrations → GenerateEntityNames → write parts
    → commit shards

One block is one shard, or a part of it. The stages are in `pipeline.stages` and `linking.stages`.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import Dataset

from gemel_engine import storage
from gemel_engine.config.finding import FindConfig
from gemel_engine.config.loading import validated
from gemel_engine.config.machine import warn_of_slow_dtype
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, shown
from gemel_engine.extras import require
from gemel_engine.finding.job import describe_search, find_mentions
from gemel_engine.fingerprints import Contents
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.linking.live import LiveView
from gemel_engine.linking.progress import Progress, Tally
from gemel_engine.linking.report import LinkReport, check_failures, make_report
from gemel_engine.linking.stages import GenerateEntityNames, read_with_places, write_ordered, write_parts
from gemel_engine.pipeline import output_check
from gemel_engine.pipeline.corpus import (
    Shard,
    count_rows,
    order_by_surface_form,
    plan_identity,
    plan_shards,
    recut,
    with_rows_per_shard,
)
from gemel_engine.pipeline.identity import run_digest, run_identity
from gemel_engine.pipeline.output import (
    RunDirectory,
    check_claim,
    claim_output,
    commit_shard,
    is_claimed,
    load_plan,
    save_plan,
)
from gemel_engine.pipeline.ray_data import actor_pool, connect, encode_and_retrieve, own_errors, rows_of
from gemel_engine.verbosity import is_verbose

if TYPE_CHECKING:
    from gemel_engine.decoding.generator import Artifacts


logger = logging.getLogger(__name__)

_MAX_SORTED_BLOCKS = 256

_ROWS_PER_RANGE = 1 << 18  # rows that are read at once for the sort; row groups are read whole


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
    plan, artifacts, contents = checked_plan(config)

    from gemel_engine.assembly import without_missing_evidence

    identity = _identity(config, plan, contents)
    run = run_digest(identity)
    claim_output(config.output, identity)
    config = without_missing_evidence(config, artifacts)
    if (previous := PreviousRun.of(config)) is not None:
        previous.note_changes(config.knowledge_base)
    view.enter("sorting the corpus by surface form")
    plan = ordered_plan(config, plan)
    finished = output_check.check_finished(config.output, plan, run)
    remaining = [shard for shard in plan if shard.name not in finished]
    tally = Tally()
    if remaining:
        view.enter("starting Ray")
        connect(quiet=not is_verbose())
        progress = Progress(config.output, count_rows(remaining))
        logger.info(
            "linking %d rows in %d shards of %d rows, in %s",
            progress.num_rows,
            len(remaining),
            config.rows_per_shard,
            config.language_model.dtype,
        )
        warn_of_slow_dtype(config)
        view.enter("linking", progress)
        receipts = stream_receipts(config, remaining, contents)
        _commit_as_completed(config.output, remaining, receipts, run, progress)
        tally = progress.tally
    view.enter("checking the output")
    rows = output_check.read_complete(config.output, plan, run, ("error", "certified", "num_rollouts", "decided_by"))
    directory = RunDirectory(config.output)
    for working_files in (directory.parts, directory.marks):  # all shards are complete
        storage.remove_tree(working_files)
    report = make_report(config, artifacts, plan, remaining, tally, rows, time.monotonic() - started)
    if remaining or not storage.exists(directory.report):  # else keep that of the finishing run
        storage.write_bytes(directory.report, json.dumps(asdict(report), indent=2).encode())
        done = {"rows": report.rows, "planned_rows": count_rows(remaining), "errors": report.errors}
        logger.info("linked %s: %s", shown(config.output), report.summary(), extra=done)
    else:
        logger.info("nothing is left to link: %s has all %d rows", shown(config.output), report.rows)
    if report.carried_over is not None:
        logger.info("carried on %s: %s", shown(str(config.previous)), report.carried_over.summary())
    return report


def describe_run(config: LinkConfig) -> str:
    """Make the checks of `link_corpus` and describe what it would do.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable.
    """
    if (search := _search_of(config)) is not None:
        return describe_search(search)
    config = settled(config)
    plan, _, contents = checked_plan(config)
    finished: set[str] = set()
    if is_claimed(config.output):
        identity = _identity(config, plan, contents)
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
    return replace(config, input=f"{search.output}/data", find_mentions=False)


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
        max_failed_fraction=config.max_failed_fraction,
    )
    return finding if config.rows_per_shard is None else replace(finding, rows_per_shard=config.rows_per_shard)


def checked_plan(config: LinkConfig) -> tuple[list[Shard], Artifacts, Contents]:
    """Check the configuration, the corpus and the artifacts; return what a run needs of them.

    Returns:
        The corpus in shards; the opened artifacts; the fingerprint or manifest of each model and
        artifact, by name.

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

    # These import torch, for which a fault of the input does not wait.
    from gemel_engine.assembly import open_artifacts, open_calibration, open_weights, run_contents
    from gemel_engine.compatibility import check_encoders

    artifacts = open_artifacts(config, verify=config.verify_artifacts)
    image_encoder = check_encoders(config, artifacts)
    calibration = open_calibration(config, artifacts)
    if artifacts.evidence is not None:
        open_weights(config, calibration)
    contents = run_contents(
        config,
        artifacts.mention_encoder_fingerprint,
        None if image_encoder is None else image_encoder.fingerprint,
    )
    if (previous := PreviousRun.of(config)) is not None:
        previous.check(_identity(config, plan, contents))
    return plan, artifacts, contents


def ordered_plan(config: LinkConfig, plan: list[Shard]) -> list[Shard]:
    """Sort the corpus by surface form and cut it into shards again.

    Prompts that begin alike are then in the same shard. The sorted rows are written to the output;
    a rerun reuses them. A corpus with pictures or image features, or of one shard, is not sorted.
    """
    if (ordered := load_plan(config.output, count_rows(plan))) is not None:
        return ordered
    if len(plan) == 1 or (places := order_by_surface_form(plan)) is None:
        return plan
    connect(quiet=not is_verbose())
    rows_per_shard = config.rows_per_shard
    assert rows_per_shard is not None, "the plan was cut by it"
    # A sort exchanges data between all pairs of blocks: use few blocks, of several shards each.
    rows_per_block = rows_per_shard * -(-len(places) // (rows_per_shard * _MAX_SORTED_BLOCKS))
    boundaries: list[int | float] = [*range(rows_per_block, len(places), rows_per_block)]
    name = uuid.uuid4().hex
    directory = f"{RunDirectory(config.output).ordered}/{name}"
    dataset: Dataset = ray.data.from_arrow(_placed_ranges(plan, places))
    dataset = dataset.map_batches(read_with_places, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    dataset = dataset.sort("place", boundaries=boundaries or [len(places)])  # none: Ray samples
    dataset = dataset.map_batches(
        partial(write_ordered, directory=directory, rows_per_shard=rows_per_shard),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
    )
    dataset.set_name("sorting")
    num_written = sum(row["num_rows"] for row in rows_of(dataset.iter_batches(batch_size=None, batch_format="pyarrow")))
    assert num_written == len(places), f"{num_written} of {len(places)} rows were sorted"
    ordered = save_plan(config.output, plan_shards(directory, rows_per_shard))
    if name not in ordered[0].uri:
        storage.remove_tree(directory)  # another run of the same command was first
    return ordered


def _placed_ranges(plan: Sequence[Shard], places: NDArray[np.int64]) -> list[pa.Table]:
    """Cut the input files into ranges; return a table of one row for each, with `places`."""
    tables, first = [], 0
    for shard in recut(plan, _ROWS_PER_RANGE):
        num_rows = shard.stop - shard.start
        of_rows = pa.LargeListArray.from_arrays([0, num_rows], places[first : first + num_rows])
        tables.append(pa.Table.from_pylist([asdict(shard)]).append_column("places", of_rows))
        first += num_rows
    return tables


def stream_parts(config: LinkConfig, remaining: Sequence[Shard], contents: Contents | None) -> Dataset:
    """Return the pipeline up to the receipts of written parts; it runs when it is consumed."""
    previous = PreviousRun.of(config)
    annotate = None if previous is None else previous.attach
    dataset = encode_and_retrieve(config, remaining, contents, annotate=annotate)
    dataset = dataset.map_batches(
        GenerateEntityNames, fn_constructor_args=(config, contents), **actor_pool(config.resources.generation)
    )
    dataset = dataset.map_batches(
        partial(write_parts, output=config.output, plan={shard.index: shard for shard in remaining}),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
    )
    dataset.set_name("linking")
    return dataset


def stream_receipts(
    config: LinkConfig, remaining: Sequence[Shard], contents: Contents | None
) -> Generator[dict[str, Any], None, None]:
    """Run the pipeline; yield a row of `RECEIPT_SCHEMA` whenever a part has been written."""
    yield from rows_of(stream_parts(config, remaining, contents).iter_batches(batch_size=None, batch_format="pyarrow"))


def _commit_as_completed(
    output: str, remaining: Sequence[Shard], receipts: Iterable[Mapping[str, Any]], run: str, progress: Progress
) -> None:
    """Commit each shard as soon as receipts cover its rows; add all receipts to `progress`."""
    commit: Any = ray.remote(num_cpus=0)(commit_shard)
    plan = {shard.index: shard for shard in remaining}
    num_missing = {shard.index: shard.stop - shard.start for shard in remaining}
    parts: dict[int, list[str]] = defaultdict(list)
    commits = []
    for receipt in receipts:
        index = receipt["shard"]
        parts[index].append(receipt["part"])
        num_missing[index] -= receipt["num_rows"]
        progress.add(receipt)
        if num_missing[index] == 0:
            commits.append(commit.remote(output, plan[index], parts.pop(index), run))
            done, commits = ray.wait(commits, num_returns=len(commits), timeout=0)
            with own_errors():
                ray.get(done)  # raises the errors of these commits
    with own_errors():
        ray.get(commits)


def _identity(config: LinkConfig, plan: Sequence[Shard], contents: Contents) -> dict[str, Any]:
    """Return what makes up a run: settings, input files, models, artifacts and the previous run."""
    previous = PreviousRun.of(config)
    return run_identity(config, plan_identity(plan), contents, None if previous is None else previous.identity())

"""The linking job: Ray Data streams shards of mentions through actors that encode, retrieve and generate.

    sort → read mentions → EncodeImages → RetrieveDemonstrations → GenerateEntityNames → write parts → commit shards

One block is one shard, or a part of it. The stages stand in `stages.py` and know nothing of this file.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from gemel_engine import errors, output_check, shards, storage
from gemel_engine.config import JobConfig, LinkConfig, PoolSettings, config_json, validated
from gemel_engine.display import make_visible, percent
from gemel_engine.errors import ConfigurationError, TooManyFailuresError, redacted, shown
from gemel_engine.extras import require
from gemel_engine.fingerprints import Contents, run_contents
from gemel_engine.progress import Progress, Tally
from gemel_engine.relinking import EarlierRun
from gemel_engine.shards import Shard
from gemel_engine.stages import (
    IMAGE_COLUMNS,
    EncodeImages,
    GenerateEntityNames,
    RetrieveDemonstrations,
    read_mentions,
    read_with_places,
    write_ordered,
    write_parts,
)

if TYPE_CHECKING:
    from gemel_engine.artifacts import Artifacts

logger = logging.getLogger(__name__)

# Settings that may differ between a run and its continuation: they change no row of the output.
_NOT_IDENTITY = ("resources", "output", "max_failed_fraction", "verify_artifacts", "dry_run")
_OWN_ERROR = re.compile(r"^gemel_engine\.errors\.(\w+): (.*)$", re.MULTILINE)  # in a traceback
_MAX_SORTED_BLOCKS = 256
_CONNECT_SECONDS = 10.0
_ROWS_PER_RANGE = 1 << 18  # read at once to be sorted: row groups may be as large, and are read whole


@dataclass(frozen=True, slots=True, kw_only=True)
class CarriedOver:
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
    carried_over: CarriedOver | None

    def summary(self) -> str:
        """One line for a terminal."""
        return (
            f"rows={self.rows} errors={sum(self.errors.values())} certified={percent(self.certified_share)} "
            f"mentions_per_s={self.mentions_per_second:.2f} cache_hits={percent(self.prefix_cache_hit_rate)} "
            f"feature_mapper={self.feature_mapper}"
        )


def link_corpus(config: LinkConfig) -> LinkReport:
    """Link a corpus: every input row becomes exactly one output row.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable (nothing has been started then), or more
            rows failed than `max_failed_fraction` allows (the output is complete then).
    """
    started = time.monotonic()
    plan, artifacts, contents = checked_plan(config)
    identity = _identity(config, plan, contents)
    run = shards.run_digest(identity)
    shards.claim_output(config.output, identity)
    if (earlier := EarlierRun.of(config)) is not None:
        earlier.note_changes(config.knowledge_base)
    plan = ordered_plan(config, plan)
    finished = output_check.check_finished(config.output, plan, run)
    remaining = [shard for shard in plan if shard.name not in finished]
    tally = Tally()
    if remaining:
        connect()
        tally = _commit_as_completed(config.output, remaining, stream_receipts(config, remaining, contents), run)
    rows = output_check.read_complete(config.output, plan, run, ("error", "certified", "num_rollouts"))
    for working_files in ("_parts", "_marks"):  # of this run and of any other: all shards are complete
        storage.remove_tree(f"{config.output}/{working_files}")
    report = _report(config, artifacts, plan, remaining, tally, rows, time.monotonic() - started)
    if remaining or not storage.exists(f"{config.output}/report.json"):  # else it tells of the run that did the work
        storage.write_bytes(f"{config.output}/report.json", json.dumps(asdict(report), indent=2).encode())
        logger.info("linked %s: %s", shown(config.output), report.summary())
    else:
        logger.info("nothing is left to link: %s has all %d rows", shown(config.output), report.rows)
    if report.carried_over is not None:
        logger.info("carried on %s: %s", shown(str(config.previous)), report.carried_over.summary())
    _check_failures(config, report)
    return report


def describe_run(config: LinkConfig) -> str:
    """What `link_corpus` would do, after all checks that it makes before any work.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable.
    """
    plan, _, contents = checked_plan(config)
    finished: set[str] = set()
    if shards.is_claimed(config.output):
        identity = _identity(config, plan, contents)
        shards.check_claim(config.output, identity)
        plan = shards.load_plan(config.output, shards.num_rows(plan)) or plan
        finished = output_check.check_finished(config.output, plan, shards.run_digest(identity))
    remaining = [shard for shard in plan if shard.name not in finished]
    num_rows, num_left = shards.num_rows(plan), shards.num_rows(remaining)
    return (
        f"{config.output}: {num_left} of {num_rows} rows are to be linked, in {len(remaining)} of {len(plan)} shards; "
        "nothing has been done"
    )


def checked_plan(config: LinkConfig) -> tuple[list[Shard], Artifacts, Contents]:
    """Return the corpus in shards, and the artifacts, all found to be usable and to belong together.

    The last item holds what each model and artifact is, by its name: fingerprints and manifests.

    Raises:
        GemelError: They are not.
    """
    from gemel_engine.artifacts import open_artifacts, open_calibration
    from gemel_engine.linker import check_encoders

    config = validated(config)
    storage.check_kept(config.output)
    storage.check_apart(config.output, config.input)
    if config.language_model.engine == "vllm":
        require("vllm", "cpu", "gpu")
    plan = shards.plan_shards(config.input, config.rows_per_shard, config.vision.required_columns)
    artifacts = open_artifacts(config, verify=config.verify_artifacts)
    image_encoder = check_encoders(config, artifacts)
    open_calibration(config)
    contents = run_contents(
        config,
        None if artifacts.index is None else artifacts.index.metadata.mention_encoder_fingerprint,
        None if image_encoder is None else image_encoder.fingerprint,
    )
    if (earlier := EarlierRun.of(config)) is not None:
        earlier.check(_identity(config, plan, contents))
    return plan, artifacts, contents


def ordered_plan(config: LinkConfig, plan: list[Shard]) -> list[Shard]:
    """Sort the corpus by surface form, so that equal beginnings of prompts meet in one shard, and cut it anew.

    The sorted rows are written to the output; a continued run takes those of the first. A corpus that holds pictures or
    image features, or is of one shard, stays as it is.
    """
    if (ordered := shards.load_plan(config.output, shards.num_rows(plan))) is not None:
        return ordered
    if len(plan) == 1 or (places := shards.order_by_surface_form(plan)) is None:
        return plan
    connect()
    # A sort moves a piece from each block to each other: few blocks, with several shards in each of a large corpus.
    rows_per_block = config.rows_per_shard * -(-len(places) // (config.rows_per_shard * _MAX_SORTED_BLOCKS))
    boundaries: list[int | float] = [*range(rows_per_block, len(places), rows_per_block)]
    name = uuid.uuid4().hex
    directory = f"{config.output}/_ordered/{name}"
    dataset: Dataset = ray.data.from_arrow(_placed_ranges(plan, places))
    dataset = dataset.map_batches(read_with_places, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    dataset = dataset.sort("place", boundaries=boundaries or [len(places)])  # Ray would guess, if none
    dataset = dataset.map_batches(
        partial(write_ordered, directory=directory, rows_per_shard=config.rows_per_shard),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0.25,
    )
    dataset.set_name("sorting")
    num_written = sum(row["num_rows"] for row in _rows(dataset.iter_batches(batch_size=None, batch_format="pyarrow")))
    assert num_written == len(places), f"{num_written} of {len(places)} rows were sorted"
    ordered = shards.save_plan(config.output, shards.plan_shards(directory, config.rows_per_shard))
    if name not in ordered[0].uri:
        storage.remove_tree(directory)  # another run of the same command was first
    return ordered


def _placed_ranges(plan: Sequence[Shard], places: NDArray[np.int64]) -> list[pa.Table]:
    """The input's files in ranges, each as a table of one row with the places of its rows."""
    tables, first = [], 0
    for shard in shards.recut(plan, _ROWS_PER_RANGE):
        num_rows = shard.stop - shard.start
        of_rows = pa.LargeListArray.from_arrays([0, num_rows], places[first : first + num_rows])
        tables.append(pa.Table.from_pylist([asdict(shard)]).append_column("places", of_rows))
        first += num_rows
    return tables


def stream_parts(config: LinkConfig, remaining: Sequence[Shard], contents: Contents | None) -> Dataset:
    """The pipeline, up to the receipts of the parts that it wrote; nothing runs until it is consumed."""
    dataset = encode_and_retrieve(config, remaining, contents)
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
    """Run the pipeline; yields each receipt, a row of `RECEIPT_SCHEMA`, as its part is written."""
    yield from _rows(stream_parts(config, remaining, contents).iter_batches(batch_size=None, batch_format="pyarrow"))


def encode_and_retrieve(
    config: JobConfig, plan: Sequence[Shard], contents: Contents | None, *, with_gold: bool = False
) -> Dataset:
    """Mentions with their image features and the rows of their demonstrations; `with_gold` keeps `entity_id`.

    Each actor compares what it opens with `contents`, the models and artifacts that the run began with.
    """
    with_pictures = config.vision.image_encoder is not None
    columns = ("image_features", *(IMAGE_COLUMNS if with_pictures else ()), *(("entity_id",) if with_gold else ()))
    dataset: Dataset = ray.data.from_items([asdict(shard) for shard in plan], override_num_blocks=len(plan))
    earlier = EarlierRun.of(config) if isinstance(config, LinkConfig) else None
    read = partial(read_mentions, output=config.output, also=columns, earlier=earlier)
    dataset = dataset.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.25)
    if with_pictures:
        pool = actor_pool(config.resources.images)
        dataset = dataset.map_batches(EncodeImages, fn_constructor_args=(config, contents), **pool)
    if config.demonstrations is not None and config.retrieval.num_demonstrations:
        pool = actor_pool(config.resources.retrieval)
        dataset = dataset.map_batches(RetrieveDemonstrations, fn_constructor_args=(config, contents), **pool)
    return dataset


def connect() -> None:
    """Join the cluster that the job was submitted to, or start Ray on this machine.

    Raises:
        ConfigurationError: No cluster answers at RAY_ADDRESS, or Ray cannot be started here.
    """
    if ray.is_initialized():
        return
    root = logging.getLogger()
    ours = root.handlers[:]
    if address := os.environ.get("RAY_ADDRESS"):
        _join_cluster(address)
    else:
        _start_ray()
    of_data = [item for item in logging.getLogger("ray.data").handlers if isinstance(item, logging.StreamHandler)]
    if asked := [handler for handler in root.handlers if handler not in ours]:
        # RAY_LOGGING_CONFIG_ENCODING, such as JSON: Ray writes the logs of all processes in it. One handler is enough.
        root.handlers = asked
        for stream in of_data:
            stream.setFormatter(asked[0].formatter)
    for handler in (*asked, *of_data):
        handler.addFilter(make_visible)
    DataContext.get_current().enable_rich_progress_bars = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # after ray.init, which sets its own


def _join_cluster(address: str) -> None:
    """Join a cluster; where nothing listens, Ray itself would try for a quarter of an hour."""
    try:
        if address not in ("auto", "local"):
            place = urlsplit(address if "://" in address else f"//{address}")
            if place.scheme not in ("", "ray") or not place.hostname or not place.port:
                raise ValueError("it is not of the form host:port")
            socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
        ray.init(log_to_driver=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"RAY_ADDRESS is {shown(address)}, where no cluster can be joined ({redacted(str(error))}): start it, give "
            "host:port of its head, or unset RAY_ADDRESS to work on this machine alone"
        ) from error


def _start_ray() -> None:
    """Start Ray on this machine; it reports failures by exceptions of no kind of their own."""
    os.environ.pop("RAY_ADDRESS", None)  # an empty one
    try:
        ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False)
    except Exception as error:
        remedy = (
            "set TMPDIR, or RAY_TMPDIR, to a directory with a shorter path"
            if "AF_UNIX" in str(error)
            else "see that the machine is not overloaded and that `ulimit -n` is at least 1024, then try again"
        )
        raise ConfigurationError(f"Ray cannot be started on this machine: {remedy} ({error})") from error


def _stop(number: int, _: object) -> NoReturn:
    """What `ray job stop` asks for, some seconds before it kills."""
    logger.warning("stopped; the same command goes on from the shards that are finished")
    sys.exit(128 + number)


def _commit_as_completed(
    output: str, remaining: Sequence[Shard], receipts: Iterable[Mapping[str, Any]], run: str
) -> Tally:
    """Commit each shard as soon as receipts cover its rows; returns their sums."""
    commit: Any = ray.remote(num_cpus=0)(shards.commit_shard)
    plan = {shard.index: shard for shard in remaining}
    num_missing = {shard.index: shard.stop - shard.start for shard in remaining}
    parts: dict[int, list[str]] = defaultdict(list)
    progress = Progress(output, sum(num_missing.values()))
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
                ray.get(done)  # raises what went wrong with them
    with own_errors():
        ray.get(commits)
    return progress.tally


def _rows(batches: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    with own_errors():
        for batch in batches:
            yield from batch.to_pylist()


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise what a task or an actor raised on purpose as itself, where Ray reports it as an error of its own.

    Ray keeps the text of the remote traceback in every case, but not the exception.
    """
    try:
        yield
    except RayError as error:
        kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
        for name, message in reversed(_OWN_ERROR.findall(str(error))):
            if name in kinds:
                raise kinds[name](message) from error
        raise


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
    rows_now = shards.num_rows(remaining)
    mapper = artifacts.feature_mapper
    return LinkReport(
        rows=table.num_rows,
        errors=dict(Counter(error.partition(":")[0] for error in table["error"].drop_null().to_pylist())),
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
        carried_over=_carried_over(config, tally),
    )


def _carried_over(config: LinkConfig, tally: Tally) -> CarriedOver | None:
    if (earlier := EarlierRun.of(config)) is None:
        return None
    before = earlier.report()
    num_linked_before = before["rows"] - sum(before["errors"].values())
    rows_kept, rows_extended = round(tally.costs["rows_kept"]), round(tally.costs["rows_extended"])
    return CarriedOver(
        **earlier.counts(),
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


def _identity(config: LinkConfig, plan: Sequence[Shard], contents: Contents) -> dict[str, Any]:
    """What makes up a run: settings, input files, models and artifacts."""
    settings = {key: value for key, value in json.loads(config_json(config)).items() if key not in _NOT_IDENTITY}
    earlier = EarlierRun.of(config)
    return {
        "settings": settings,
        "plan": shards.plan_identity(plan),
        "artifacts": contents,
        **({} if earlier is None else {"previous": earlier.identity()}),
    }


def actor_pool(settings: PoolSettings) -> dict[str, Any]:
    """Arguments of `map_batches` for a stage of actors; a batch is a block.

    Threads are set in the actor's environment, since Ray builds an actor in one thread and calls it in another.
    """
    threads = {} if settings.num_threads is None else {"OMP_NUM_THREADS": str(settings.num_threads)}
    return {
        "batch_size": None,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(min_size=settings.min_actors, max_size=settings.max_actors),
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        **({"memory": int(settings.memory_gib * 2**30)} if settings.memory_gib else {}),
        **({"runtime_env": {"env_vars": threads}} if threads else {}),
    }

"""Ray Data for linking and training: the connection, actor pools, the stages that both share."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from gemel_engine import errors
from gemel_engine.config.resources import PoolSettings
from gemel_engine.display import make_visible
from gemel_engine.errors import ConfigurationError, redacted, shown
from gemel_engine.pipeline.chain import Stage
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.verbosity import is_verbose

logger = logging.getLogger(__name__)

_OWN_ERROR = re.compile(r"^gemel_engine\.errors\.(\w+): (.*)$", re.MULTILINE)  # in a traceback

_CONNECT_SECONDS = 10.0
_TASK: dict[str, Any] = {"batch_format": "pyarrow", "num_cpus": 0.25}  # of a stage without models


def stream(plan: Sequence[Shard], stages: Sequence[Stage]) -> Dataset:
    """Return a dataset of what the last stage makes of the shards; it runs when it is consumed."""
    dataset: Dataset = ray.data.from_items([asdict(shard) for shard in plan], override_num_blocks=len(plan))
    dataset = dataset.map_batches(stages[0].work, batch_size=1, **_TASK)
    for stage in stages[1:]:
        if stage.pool is None:
            dataset = dataset.map_batches(stage.work, batch_size=None, **_TASK)
        else:
            pool = actor_pool(stage.pool)
            dataset = dataset.map_batches(stage.work, fn_constructor_args=stage.arguments, **pool)
    return dataset


def run_each(
    items: Sequence[Mapping[str, Any]],
    stage: type,
    arguments: tuple[Any, ...],
    *,
    num_cpus: int,
    num_gpus: int,
) -> None:
    """Call a stage of actors once for each item, a table of one row, with all resources of the cluster.

    The actors become as many as the cluster has room for, also while it grows.

    Args:
        items: The rows.
        stage: Class of the actors.
        arguments: Arguments of its constructor.
        num_cpus: Number of logical CPUs, and of threads, of one actor.
        num_gpus: Number of GPUs of one actor.
    """
    connect()
    settings = PoolSettings(max_actors=len(items), num_cpus=num_cpus, num_gpus=num_gpus, num_threads=num_cpus)
    dataset: Dataset = ray.data.from_items([dict(item) for item in items], override_num_blocks=len(items))
    dataset = dataset.map_batches(stage, fn_constructor_args=arguments, **actor_pool(settings))
    with own_errors():
        for _ in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            pass


def connect(*, quiet: bool | None = None) -> None:
    """Join the cluster that the job was submitted to, or start Ray on this machine.

    Args:
        quiet: Whether to hide Ray Data's progress and the output of all processes but this one,
            errors apart; it stays in Ray's own logs. None: unless libraries are to print all.

    Raises:
        ConfigurationError: No cluster answers at RAY_ADDRESS, or Ray cannot be started here.
    """
    if ray.is_initialized():
        return
    quiet = not is_verbose() if quiet is None else quiet
    root = logging.getLogger()
    ours, on_stop = root.handlers[:], signal.getsignal(signal.SIGTERM)
    options = {"log_to_driver": not quiet, "logging_level": logging.INFO if is_verbose() else logging.WARNING}
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        _join_cluster(address, options)
    else:
        _start_ray(options)
    of_data = [item for item in logging.getLogger("ray.data").handlers if isinstance(item, logging.StreamHandler)]
    if asked := [handler for handler in root.handlers if handler not in ours]:
        # With RAY_LOGGING_CONFIG_ENCODING, such as JSON, Ray formats the logs of all processes.
        root.handlers = asked
        for stream in of_data:
            stream.setFormatter(asked[0].formatter)
    for handler in (*asked, *of_data):
        handler.addFilter(make_visible)
    context = DataContext.get_current()
    context.enable_rich_progress_bars = False
    if quiet:
        context.enable_progress_bars = False
        context.issue_detectors_config.detectors = []  # advise on Ray Data's own settings
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that they are disabled
        for stream in of_data:
            stream.setLevel(logging.WARNING)
    if callable(on_stop) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_stop)  # ray.init has set its own


def _join_cluster(address: str, options: Mapping[str, Any]) -> None:
    """Join a cluster; test the address first, since Ray would retry for 15 minutes."""
    try:
        if address != "auto":
            place = urlsplit(address if "://" in address else f"//{address}")
            if place.scheme not in ("", "ray") or not place.hostname or not place.port:
                raise ValueError("it is not of the form host:port")
            socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
        ray.init(**options)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"RAY_ADDRESS is {shown(address)}, where no cluster can be joined ({redacted(str(error))}): start it, give "
            "host:port of its head, or unset RAY_ADDRESS to work on this machine alone"
        ) from error


def _start_ray(options: Mapping[str, Any]) -> None:
    """Start Ray on this machine; Ray has no exception class of its own for failures."""
    os.environ.pop("RAY_ADDRESS", None)  # it may be `local`, or set and empty
    for may_try_again in (True, False):
        try:
            ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **options)
            return
        except Exception as error:
            path_is_too_long = "AF_UNIX" in str(error)
            if path_is_too_long or not may_try_again:
                remedy = (
                    "set TMPDIR, or RAY_TMPDIR, to a directory with a shorter path"
                    if path_is_too_long
                    else "see that the machine is not overloaded and that `ulimit -n` is at least 1024, then try again"
                )
                raise ConfigurationError(f"Ray cannot be started on this machine: {remedy} ({error})") from error
            logger.warning("Ray did not start and is started once more: %s", error)
            ray.shutdown()  # on a busy machine its processes may need longer than it waits for them


def rows_of(batches: Iterable[pa.Table]) -> Iterator[dict[str, Any]]:
    """Yield the rows of tables as dictionaries."""
    with own_errors():
        for batch in batches:
            yield from batch.to_pylist()


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise an error of `gemel_engine.errors` that Ray has wrapped in one of its own.

    Ray always keeps the text of the remote traceback, but not always the exception.
    """
    try:
        yield
    except RayError as error:
        kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
        for name, message in reversed(_OWN_ERROR.findall(str(error))):
            if name in kinds:
                raise kinds[name](message) from error
        raise


def actor_pool(settings: PoolSettings) -> dict[str, Any]:
    """Return the arguments of `map_batches` for a stage of actors; a batch is a block.

    The number of threads is set in the actor's environment: Ray creates an actor in one thread and
    calls it in another.
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

"""The stages of a pipeline in their order, which Ray Data runs in actors and a small run in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from gemel_engine.config.resources import PoolSettings
from gemel_engine.config.settings import JobConfig
from gemel_engine.fingerprints import Contents
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.pipeline.stages import IMAGE_COLUMNS, Annotate, EncodeImages, Retrieve, read_mentions


@dataclass(frozen=True, slots=True)
class Stage:
    """One step, from a table to a table.

    Attributes:
        work: A function, or a class whose objects are functions and keep models.
        arguments: Arguments of the class's constructor.
        pool: Actors of the class; None for a function.
    """

    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    pool: PoolSettings | None = None


def reading_stages(
    config: JobConfig, contents: Contents | None, *, with_gold: bool = False, annotate: Annotate | None = None
) -> list[Stage]:
    """Return the stages that read mentions, add image features, and what retrieval finds for them.

    Args:
        config: The job.
        contents: Fingerprint or manifest of each model and artifact at the start of the run, which
            each process compares with what it opens.
        with_gold: Whether to keep `entity_id`.
        annotate: Function that adds columns to all rows of a shard.
    """
    gold = ("entity_id",) if with_gold else ()
    if config.vision.image_encoder is not None:
        stages = picture_stages(config, contents, *gold, annotate=annotate)
    else:
        stages = [_reading(config, ("image_features", *gold), annotate)]
    if config.retrieval.num_candidates or (config.demonstrations is not None and config.retrieval.num_demonstrations):
        stages.append(Stage(Retrieve, (config, contents), config.resources.retrieval))
    return stages


def picture_stages(
    config: JobConfig, contents: Contents | None, *also: str, annotate: Annotate | None = None
) -> list[Stage]:
    """Return the stages that read mentions, with further columns, and add their image features."""
    return [
        _reading(config, ("image_features", *IMAGE_COLUMNS, *also), annotate),
        Stage(EncodeImages, (config, contents), config.resources.images),
    ]


def _reading(config: JobConfig, columns: tuple[str, ...], annotate: Annotate | None) -> Stage:
    return Stage(partial(read_mentions, output=config.output, also=columns, annotate=annotate))


def run_here(plan: Sequence[Shard], stages: Sequence[Stage]) -> Iterator[pa.Table]:
    """Yield what the last stage makes of each shard; all models are loaded in this process."""
    works = [stage.work if stage.pool is None else stage.work(*stage.arguments) for stage in stages]
    for shard in plan:
        table = pa.Table.from_pylist([asdict(shard)])
        for work in works:
            table = work(table)
        yield table

"""Prepares training mentions once: encodes pictures, retrieves demonstrations and cards, counts rejects."""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset

from gemel_engine import storage
from gemel_engine.config.loading import config_json
from gemel_engine.config.settings import TrainConfig
from gemel_engine.contents import artifact_manifests
from gemel_engine.decoding.generator import Artifacts
from gemel_engine.display import counts
from gemel_engine.errors import InputError, TooManyFailuresError, error_kind, shown
from gemel_engine.fingerprints import Contents
from gemel_engine.pipeline.chain import Stage, picture_stages, reading_stages
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.pipeline.identity import run_digest
from gemel_engine.pipeline.output import RunDirectory, claim_output, read_columns
from gemel_engine.pipeline.ray_data import own_errors, stream
from gemel_engine.storage import parquet
from gemel_engine.storage.manifest import file_sha256
from gemel_engine.training.stages import CheckExamples, read_file, with_features, write_examples, write_features
from gemel_engine.types import mention_columns
from gemel_engine.vision.encoder import ImageEncoder
from gemel_engine.vision.mapper import FeatureMapper

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedSplit:
    """Prepared mentions of a split.

    Attributes:
        directory: Directory of the Parquet files.
        num_rows: Number of mentions, unusable ones included.
        num_pictures: Number of usable mentions with image features.
    """

    directory: str
    num_rows: int
    num_pictures: int


def prepare_split(
    config: TrainConfig,
    split: str,
    plan: list[Shard],
    artifacts: Artifacts,
    image_encoder: ImageEncoder | None,
    contents: Contents,
) -> PreparedSplit:
    """Encode the pictures of a split and retrieve its demonstrations, unless that was done before.

    Several runs may prepare the same examples at once: each writes a directory of its own, and all
    use the first that is complete. Image features are kept apart: other examples of the same
    mentions, such as with more demonstrations, need no picture again. Image features that are given
    have the width of the artifacts' pictures, or else of the first ones of the training mentions.
    """
    root = f"{config.examples or RunDirectory(config.output).examples}/{split}"
    prefix_length = mapper_prefix_length(config, artifacts.feature_mapper)
    vision_width = _vision_width(config, artifacts, image_encoder)
    content = _content_of(plan)
    source, annotate = config, None
    if image_encoder is not None:
        identity = _picture_identity(config, content, image_encoder.fingerprint)
        encode = picture_stages(config, contents)
        pictures = _prepared(f"{root}/pictures", identity, plan, encode, write_features)
        annotate = partial(with_features, directory=pictures.directory)
        source = replace(config, vision=replace(config.vision, image_encoder=None))
    fingerprint = None if image_encoder is None else image_encoder.fingerprint
    stages = [
        *reading_stages(source, contents, with_gold=True, annotate=annotate),
        Stage(CheckExamples, (config, prefix_length, vision_width), config.resources.retrieval),
    ]
    identity = _example_identity(config, artifacts, content, prefix_length, vision_width, fingerprint)
    examples = _prepared(root, identity, plan, stages, write_examples)
    storage.remove_tree(RunDirectory(config.output).marks)
    return examples


def _prepared(
    root: str, identity: dict[str, Any], plan: list[Shard], stages: list[Stage], write: Callable[..., pa.Table]
) -> PreparedSplit:
    """Return what is stored below a directory under an identity; run the stages if nothing is."""
    root = f"{root}/{run_digest(identity)[:16]}"
    claim_output(root, identity)
    done, remedy = f"{root}/_prepared.json", "remove it and run the same command again"
    own = ""
    if not storage.exists(done):
        own = f"data-{uuid.uuid4().hex}"
        receipts = _receipts(plan, stages, write, f"{root}/{own}")
        counts = {name: sum(receipt[name] for receipt in receipts) for name in ("num_rows", "num_pictures")}
        storage.create_exclusive(done, json.dumps({"directory": own} | counts).encode())
    found = storage.read_json(done, remedy)
    try:
        prepared = PreparedSplit(**found | {"directory": f"{root}/{found['directory']}"})
    except (TypeError, KeyError) as error:
        raise InputError(f"{shown(done)} describes no prepared mentions: {remedy}") from error
    if own and found["directory"] != own:  # another run was faster
        storage.remove_tree(f"{root}/{own}")
    return prepared


def _receipts(
    plan: list[Shard], stages: list[Stage], write: Callable[..., pa.Table], directory: str
) -> list[dict[str, int]]:
    """Run the stages, and write their rows to a directory, which is removed if that fails."""
    try:
        with own_errors():
            receipts = stream(plan, [*stages, Stage(partial(write, directory=directory))])
            return list(receipts.take_all())
    except BaseException:
        storage.remove_tree(directory)
        raise


def prepared_dataset(prepared: PreparedSplit) -> Dataset:
    """Return prepared mentions, one block for each file."""
    files = storage.list_parquet(prepared.directory)
    dataset = ray.data.from_items([{"uri": file.uri} for file in files], override_num_blocks=len(files))
    dataset.context.enable_progress_bars = False  # short, and repeated for each worker
    # Workers may hold all CPUs while they read.
    return dataset.map_batches(read_file, batch_size=1, batch_format="pyarrow", num_cpus=0)


def count_left_out(config: TrainConfig, split: str, prepared: PreparedSplit) -> dict[str, int]:
    """Count the mentions of a split that can't be used, by reason.

    Raises:
        InputError: None can be used, or some of the prepared ones are not visible from here.
        TooManyFailuresError: More failed than `max_failed_fraction` allows; an entity that the
            knowledge base lacks is not a failure.
    """
    table = read_columns(prepared.directory, ("error",))
    if len(table) != prepared.num_rows:
        raise InputError(
            f"{prepared.directory} shows {len(table)} of {prepared.num_rows} prepared mentions: set `output` or "
            "`examples` to a place that all nodes share, such as s3://"
        )
    reasons = Counter(map(error_kind, table["error"].drop_null().to_pylist()))
    if reasons:
        logger.warning("%d of %d %s mentions are left out: %s", reasons.total(), len(table), split, counts(reasons))
    if reasons.total() == len(table):
        raise InputError(f"none of the {len(table)} {split} mentions can be used: {counts(reasons)}")
    num_failed = reasons.total() - reasons["unknown_entity"]
    if num_failed > config.max_failed_fraction * len(table):
        raise TooManyFailuresError(
            f"{num_failed} of {len(table)} {split} mentions failed ({counts(reasons)}), more than max_failed_fraction "
            f"{config.max_failed_fraction} allows: see the column `error` in {prepared.directory}"
        )
    return dict(reasons)


def mapper_prefix_length(config: TrainConfig, starting_mapper: FeatureMapper | None) -> int:
    """Return P of the mapper that training starts from, or else of the configuration."""
    return config.mapper.prefix_length if starting_mapper is None else starting_mapper.metadata.prefix_length


def _vision_width(config: TrainConfig, artifacts: Artifacts, image_encoder: ImageEncoder | None) -> int | None:
    """Return C; None if no training mention has a picture."""
    mapper, index, evidence = artifacts.feature_mapper, artifacts.index, artifacts.evidence
    widths: list[int | None] = [] if image_encoder is None else [image_encoder.width]
    widths += [artifact.metadata.vision_width for artifact in (mapper, index) if artifact is not None]
    if evidence is not None and evidence.pictures is not None:
        widths.append(evidence.pictures.width)
    if known := next(filter(None, widths), None):
        return known
    for table in parquet.open_tables(config.train, mention_columns(config.columns.given()), ["image_features"]):
        for piece in table.pieces(["image_features"]):
            for width in filter(None, pc.list_value_length(piece["image_features"]).to_pylist()):
                return int(width)
    return None


def _content_of(plan: list[Shard]) -> list[dict[str, Any]]:
    """Return what the shards contain, as JSON: not where their files are, nor when they were written."""
    of_file = {shard.uri: shard for shard in plan}  # a file may be cut into many shards
    digests = {uri: _file_digest(shard) for uri, shard in of_file.items()}
    return [
        {"file": digests[shard.uri], "start": shard.start, "stop": shard.stop, "columns": shard.columns}
        for shard in plan
    ]


def _file_digest(shard: Shard) -> str:
    """Return a hash of a local file's content; of a file in S3, its version."""
    path = storage.local_path(shard.uri)
    return shard.version if path is None else file_sha256(path)


def _picture_identity(config: TrainConfig, content: list[dict[str, Any]], fingerprint: str) -> dict[str, Any]:
    """Return what image features depend on."""
    source = json.loads(config_json(config))["image_source"]
    vision = {"image_encoder": fingerprint, "max_image_pixels": config.vision.max_image_pixels}
    return {"settings": {"image_source": source, "vision": vision}, "plan": content, "artifacts": {}}


def _example_identity(
    config: TrainConfig,
    artifacts: Artifacts,
    content: list[dict[str, Any]],
    prefix_length: int,
    vision_width: int | None,
    fingerprint: str | None,
) -> dict[str, Any]:
    """Return what prepared examples depend on: no setting of the optimiser or the mapper."""
    settings = json.loads(config_json(config))
    vision = {"image_encoder": fingerprint, "max_image_pixels": config.vision.max_image_pixels}
    prompt = {key: settings["prompt"][key] for key in ("template", "query_reserve")}
    retrieval = settings["retrieval"] | {"mention_encoder": artifacts.mention_encoder_fingerprint}
    settings = {"retrieval": retrieval, "image_source": settings["image_source"], "vision": vision, "prompt": prompt}
    settings |= {"prefix_length": prefix_length, "vision_width": vision_width}
    manifests = artifact_manifests(replace(config, vision=replace(config.vision, feature_mapper=None)))
    return {"settings": settings, "plan": content, "artifacts": manifests}

"""Commands that build the artifacts of a run; registered in `main.py`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from gemel_engine.cli.knowledge_bases import EncoderOptions
from gemel_engine.cli.options import checked
from gemel_engine.config.bounds import Count, Seed
from gemel_engine.errors import ConfigurationError, InputError

Entities = Annotated[Positional[str], arg(metavar="ENTITIES")]
Mentions = Annotated[Positional[str], arg(metavar="MENTIONS")]
InputDir = Annotated[Positional[Path], arg(metavar="INPUT_DIR")]
OutputDir = Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]
Checkpoint = Annotated[Positional[Path], arg(metavar="CHECKPOINT")]

logger = logging.getLogger(__name__)


def build_demonstrations(
    mentions: Mentions,
    entities: Entities,
    output_dir: OutputDir,
    *,
    encoders: OmitArgPrefixes[EncoderOptions],
    columns: tuple[str, ...] = (),
) -> None:
    """Build a demonstration index from a training split.

    Args:
        mentions: Table in Parquet, CSV, TSV or JSON Lines, local or s3://bucket/prefix, with the
            columns `mention_id`, `text`, `mention`, `entity_id`; `entity_name`, `group`,
            `image_features`, `image_bytes`, `image_uri` are optional.
        entities: Table with the columns `entity_id` and `name`, in the same formats.
        output_dir: Local directory; an existing index in it is replaced.
        encoders: Models of surface forms, which is needed, and of pictures.
        columns: Names of columns of the mentions where they differ: mention=surface entity_id=label.
    """
    from gemel_engine.importers.table import parse_columns
    from gemel_engine.retrieval.encoder import MentionEncoder
    from gemel_engine.retrieval.index import DemonstrationIndex
    from gemel_engine.retrieval.reading import PictureReader, read_demonstrations, read_names
    from gemel_engine.types import MENTION_COLUMNS
    from gemel_engine.vision.encoder import ImageEncoder

    started = time.perf_counter()
    names = parse_columns(columns, tuple(MENTION_COLUMNS))
    models, pictures = encoders.encoders(), None
    if models.mention_encoder is None:
        raise ConfigurationError("--mention-encoder is missing: name the sentence encoder of surface forms")
    if models.image_encoder is not None:
        encoder = ImageEncoder(models.image_encoder, pretrained=models.image_encoder_pretrained, device=models.device)
        pictures = PictureReader(encoder, models.images, models.max_image_pixels)
    index = DemonstrationIndex.build(
        output_dir,
        read_demonstrations(mentions, read_names(entities), pictures, names),
        MentionEncoder(models.mention_encoder, device=models.device),
        image_encoder_fingerprint=None if pictures is None else pictures.encoder.fingerprint,
    )
    built, seconds = index.metadata, time.perf_counter() - started
    counts = built.num_demonstrations, built.num_surface_forms, built.num_images
    logger.info("%s: %d demonstrations of %d surface forms, %d with a picture, in %.1f s", output_dir, *counts, seconds)


def init_mapper(
    output_dir: OutputDir,
    *,
    language_model: str,
    image_encoder: str,
    image_encoder_pretrained: str | None = None,
    prefix_length: Count = 4,
    seed: Seed = 0,
) -> None:
    """Make an untrained feature mapper, to try out linking with pictures before training.

    Args:
        output_dir: Local directory; an existing mapper in it is replaced.
        language_model: Local directory, or name on the model hub.
        image_encoder: open_clip architecture, or local directory in open_clip's layout.
        image_encoder_pretrained: Name of open_clip's weights, if the encoder is an architecture.
        prefix_length: Number of embeddings that represent one picture in the prompt.
        seed: Seed of the random weights.
    """
    from gemel_engine.decoding.language_model import language_model_fingerprint, language_model_width
    from gemel_engine.vision.encoder import ImageEncoder
    from gemel_engine.vision.mapper import FeatureMapper

    encoder = ImageEncoder(image_encoder, pretrained=image_encoder_pretrained)
    mapper = FeatureMapper.random(
        encoder.width,
        prefix_length,
        language_model_width(language_model),
        seed,
        language_model_fingerprint=language_model_fingerprint(language_model),
        image_encoder_fingerprint=encoder.fingerprint,
    )
    mapper.save(output_dir)
    logger.info("%s: untrained, width %d to %d embeddings", output_dir, encoder.width, prefix_length)


def import_gemel(arguments: Sequence[str]) -> None:
    """Convert files that GEMEL's authors released: a feature mapper or mentions."""
    commands: dict[str, Callable[..., None]] = {
        "mapper": checked(import_mapper),
        "mentions": checked(import_mentions),
    }
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="gemel import-gemel", description=import_gemel.__doc__, args=arguments
    )


def import_mapper(checkpoint: Checkpoint, output_dir: OutputDir, *, language_model: str) -> None:
    """Convert a feature mapper.

    Args:
        checkpoint: Pickled state dict; only tensors are read from it.
        output_dir: Directory for the mapper; an existing one in it is replaced.
        language_model: Language model that the mapper was trained for: local directory, or name on
            the model hub.
    """
    from gemel_engine import gemel_release
    from gemel_engine.decoding.language_model import language_model_fingerprint, language_model_width

    mapper = gemel_release.import_mapper(checkpoint, language_model_width(language_model))
    fingerprint = language_model_fingerprint(language_model)
    mapper.metadata = replace(mapper.metadata, language_model_fingerprint=fingerprint)
    mapper.save(output_dir)
    metadata = mapper.metadata
    logger.info("%s: %d features to %d embeddings", output_dir, metadata.vision_width, metadata.prefix_length)


def import_mentions(input_dir: InputDir, output_dir: OutputDir, *, features: Path | None = None) -> None:
    """Convert the mentions of `train.json`, `dev.json` and `test.json`, and their entities.

    Args:
        input_dir: Directory that contains at least one of the three files, in JSON lines.
        output_dir: Directory for `train.parquet`, `dev.parquet`, `test.parquet` and
            `entities.parquet`.
        features: HDF5 file of image features.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gemel_engine import gemel_release

    output_dir.mkdir(parents=True, exist_ok=True)
    splits = []
    for path in sorted(input_dir / f"{split}.json" for split in ("train", "dev", "test")):
        if path.exists():
            table, num_left_out = gemel_release.import_mentions(path, features)
            pq.write_table(table, output_dir / f"{path.stem}.parquet", compression="zstd")
            logger.info("%s: %d mentions; %d without an entity left out", path, len(table), num_left_out)
            splits.append(table)
    if not splits:
        raise InputError(f"{input_dir} has neither train.json nor dev.json nor test.json")
    entities = gemel_release.entities_of(pa.concat_tables(splits))
    pq.write_table(entities, output_dir / "entities.parquet", compression="zstd")

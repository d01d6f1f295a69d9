"""Build a demonstration index from a training split.

python jobs/build_demonstration_index.py train.parquet entities.parquet demonstrations/ --mention-encoder models/encoder
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import tyro

from gemel_engine.command_line import run
from gemel_engine.demonstrations import PictureReader, read_demonstrations, read_names
from gemel_engine.image_source import ImagePolicy
from gemel_engine.mention_encoder import MentionEncoder
from gemel_engine.retrieval import DemonstrationIndex
from gemel_engine.vision import ImageEncoder

logger = logging.getLogger("build_demonstration_index")


def main(
    mentions: tyro.conf.Positional[str],
    entities: tyro.conf.Positional[str],
    output_dir: tyro.conf.Positional[Path],
    *,
    mention_encoder: str,
    image_encoder: str | None = None,
    image_encoder_pretrained: str | None = None,
    device: str = "cpu",
    max_image_pixels: int = 50_000_000,
    allowed_image_prefixes: tuple[str, ...] = (),
    max_image_bytes: int = ImagePolicy().max_bytes,
) -> None:
    """Build a demonstration index from a training split.

    Args:
        mentions: Parquet file, or directory of them; local or s3://bucket/prefix. Columns `mention_id`, `text`,
            `mention`, `entity_id`, and optionally `entity_name`, `group`, `image_features`, `image_bytes`,
            `image_uri`.
        entities: Parquet file, or directory of them, with the columns `entity_id` and `name`.
        output_dir: Local directory; an index that is there is replaced.
        mention_encoder: Sentence encoder of surface forms; local directory, or name on the model hub.
        image_encoder: An open_clip architecture, or a local directory in open_clip's layout; without it pictures are
            ignored.
        image_encoder_pretrained: open_clip's tag of the weights, for an architecture by name.
        device: torch device of both encoders.
        max_image_pixels: A picture that decodes to more is unusable.
        allowed_image_prefixes: Where an `image_uri` may lie; see `ImagePolicy`.
        max_image_bytes: A larger image file is unusable.
    """
    started = time.perf_counter()
    pictures = None
    if image_encoder is not None:
        encoder = ImageEncoder(image_encoder, pretrained=image_encoder_pretrained, device=device)
        policy = ImagePolicy(allowed_image_prefixes, max_image_bytes)
        pictures = PictureReader(encoder, policy, max_image_pixels)
    index = DemonstrationIndex.build(
        output_dir,
        read_demonstrations(mentions, read_names(entities), pictures),
        MentionEncoder(mention_encoder, device=device),
        image_encoder_fingerprint=None if pictures is None else pictures.encoder.fingerprint,
    )
    logger.info(
        "%s: %d demonstrations of %d surface forms, %d with a picture, in %.1f s",
        output_dir,
        index.metadata.num_demonstrations,
        index.metadata.num_surface_forms,
        index.metadata.num_images,
        time.perf_counter() - started,
    )


if __name__ == "__main__":
    run(main)

"""Make an untrained feature mapper, where training starts and with which linking can be tried out.

python jobs/initialise_mapper.py mapper/ --language-model models/lm --image-encoder models/encoder
"""

from __future__ import annotations

import logging
from pathlib import Path

import tyro

from gemel_engine.command_line import run
from gemel_engine.feature_mapper import FeatureMapper
from gemel_engine.model import language_model_fingerprint, language_model_width
from gemel_engine.vision import ImageEncoder

logger = logging.getLogger("initialise_mapper")


def main(
    output_dir: tyro.conf.Positional[Path],
    *,
    language_model: str,
    image_encoder: str,
    image_encoder_pretrained: str | None = None,
    prefix_length: int = 4,
    seed: int = 0,
) -> None:
    """Make an untrained feature mapper.

    Args:
        output_dir: Local directory; a mapper that is there is replaced.
        language_model: Local directory, or name on the model hub.
        image_encoder: An open_clip architecture, or a local directory in open_clip's layout.
        image_encoder_pretrained: open_clip's tag of the weights, for an architecture by name.
        prefix_length: Embeddings that stand for one picture.
        seed: Of the random weights.
    """
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


if __name__ == "__main__":
    run(main)

"""Bring files released by GEMEL's authors into this project's formats.

python jobs/import_gemel.py mapper opt-6.7b_wikidiverse.pkl mapper/ --language-model facebook/opt-6.7b
python jobs/import_gemel.py mentions data/wikidiverse wikidiverse/ --features data/wikidiverse/clip.hdf5
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from gemel_engine.command_line import run_commands
from gemel_engine.errors import InputError
from gemel_engine.gemel_files import entities_of, import_mapper, import_mentions
from gemel_engine.model import language_model_fingerprint, language_model_width

logger = logging.getLogger("import_gemel")


def mapper(
    checkpoint: tyro.conf.Positional[Path], output_dir: tyro.conf.Positional[Path], *, language_model: str
) -> None:
    """Convert a feature mapper.

    Args:
        checkpoint: The pickled state dict; only tensors are read from it.
        output_dir: Directory of the mapper; one that is there is replaced.
        language_model: Local directory, or name on the model hub, of the model that it was trained for.
    """
    imported = import_mapper(checkpoint, language_model_width(language_model))
    fingerprint = language_model_fingerprint(language_model)
    imported.metadata = replace(imported.metadata, language_model_fingerprint=fingerprint)
    imported.save(output_dir)
    metadata = imported.metadata
    logger.info("%s: %d features to %d embeddings", output_dir, metadata.vision_width, metadata.prefix_length)


def mentions(
    input_dir: tyro.conf.Positional[Path],
    output_dir: tyro.conf.Positional[Path],
    *,
    features: Path | None = None,
) -> None:
    """Convert `train.json`, `dev.json` and `test.json`, as far as they are there, and the entities they mention.

    Args:
        input_dir: Directory of the JSON lines.
        output_dir: Gets `train.parquet`, `dev.parquet`, `test.parquet` and `entities.parquet`.
        features: HDF5 file of image features.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    splits = []
    for path in sorted(input_dir / f"{split}.json" for split in ("train", "dev", "test")):
        if path.exists():
            table, num_left_out = import_mentions(path, features)
            pq.write_table(table, output_dir / f"{path.stem}.parquet", compression="zstd")
            logger.info("%s: %d mentions; %d without an entity left out", path, len(table), num_left_out)
            splits.append(table)
    if not splits:
        raise InputError(f"{input_dir} has neither train.json nor dev.json nor test.json")
    pq.write_table(entities_of(pa.concat_tables(splits)), output_dir / "entities.parquet", compression="zstd")


if __name__ == "__main__":
    run_commands({"mapper": mapper, "mentions": mentions})

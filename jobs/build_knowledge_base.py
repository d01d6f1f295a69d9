"""Build a knowledge base from a table of entities.

python jobs/build_knowledge_base.py entities.parquet knowledge_base/ --tokenizer models/language_model
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from gemel_engine.command_line import run
from gemel_engine.errors import InputError
from gemel_engine.knowledge_base import ENTITY_SCHEMA, KnowledgeBaseSettings, build_knowledge_base
from gemel_engine.model import load_tokenizer
from gemel_engine.storage import list_parquet, resolve

logger = logging.getLogger("build_knowledge_base")


def main(
    entities: tyro.conf.Positional[str],
    output_dir: tyro.conf.Positional[Path],
    *,
    tokenizer: str,
    max_name_tokens: int = 32,
    on_bad_name: Literal["error", "skip"] = "error",
) -> None:
    """Build a knowledge base from a table of entities.

    Args:
        entities: Parquet file, or directory of them; local or s3://bucket/prefix. Columns `entity_id` and `name`, and
            optionally `description`, `popularity`, `image_uri`, `aliases`.
        output_dir: New or empty local directory.
        tokenizer: The language model's directory or hub name.
        max_name_tokens: Longer names are unusable.
        on_bad_name: Refuse the table if a name is unusable, or leave its entity out.
    """
    started = time.perf_counter()
    settings = KnowledgeBaseSettings(max_name_tokens=max_name_tokens, on_bad_name=on_bad_name)
    report = build_knowledge_base(read_entities(entities), load_tokenizer(tokenizer), output_dir, settings)
    logger.info(
        "%s: %d entities, %d names of at most %d tokens, %d entities skipped, in %.1f s",
        output_dir,
        report.num_entities,
        report.num_names,
        report.longest_name,
        sum(report.num_skipped.values()),
        time.perf_counter() - started,
    )


def read_entities(uri: str) -> pa.Table:
    """Read the entities' columns of all Parquet files at an address.

    Raises:
        InputError: There is no such file, one is not readable, or their columns' types do not agree.
    """
    tables = []
    try:
        for file in list_parquet(uri):
            filesystem, path = resolve(file.uri)
            with pq.ParquetFile(path, filesystem=filesystem) as parquet:
                tables.append(
                    parquet.read([name for name in ENTITY_SCHEMA.names if name in parquet.schema_arrow.names])
                )
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{uri} is not readable as one Parquet table ({error}); write it again") from error


if __name__ == "__main__":
    run(main)

"""The command that exports a run; registered in `main.py`."""

from __future__ import annotations

import logging
from typing import Annotated

from tyro.conf import Positional, arg

from gemel_engine.export import WIKIDATA, Format

Output = Annotated[Positional[str], arg(metavar="OUTPUT")]
Target = Annotated[Positional[str], arg(metavar="FILE")]

logger = logging.getLogger(__name__)


def export(
    output: Output,
    target: Target,
    *,
    format: Format | None = None,
    entity_prefix: str = WIKIDATA,
) -> None:
    """Write a finished run to one file, beside the columns of its input.

    Args:
        output: Output of the run, local or s3://bucket/prefix.
        target: File to write or replace, local or s3://bucket/key.
        format: `parquet`, `csv` and `jsonl` have one row for each mention. `nif` (Turtle, for
            GERBIL) and `elevant` have documents with their mentions, by `group` and `text`; `blink`
            has a line for each mention. Default: by the suffix of the file, .parquet, .csv, .jsonl
            or .ttl.
        entity_prefix: Beginning of the addresses of entities in NIF.
    """
    from gemel_engine.export.write import export_run, format_of

    num_rows = export_run(output, target, format or format_of(target), entity_prefix)
    logger.info("%s: %d mentions", target, num_rows)

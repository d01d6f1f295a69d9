"""Make a table of entities from a dump of Wikidata or DBpedia, for `gemel build-kb`.

python examples/entity_tables.py wikidata latest-all.json.gz entities.parquet --language en
python examples/entity_tables.py dbpedia labels_lang=en.ttl.bz2 entities.parquet --language en

The dump is read line by line, plain or packed by gzip or bzip2, and the table is written as it is read, so that memory
does not grow with it. Wikidata's JSON dumps have one entity a line; of DBpedia's releases the labels are needed, in
N-Triples.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

SCHEMA = pa.schema(
    [
        pa.field("entity_id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("description", pa.string()),
        pa.field("popularity", pa.float64()),
    ]
)
_ROWS_PER_GROUP = 1 << 16
_DBPEDIA = "http://dbpedia.org/resource/"
_LABEL = re.compile(
    r"<(?P<resource>[^>]+)> <http://www\.w3\.org/2000/01/rdf-schema#label> "
    r"(?P<label>\"(?:[^\"\\]|\\.)*\")@(?P<language>\S+) \."
)


def wikidata(dump: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path], *, language: str = "en") -> None:
    """Items with a label in a language; their popularity is the number of Wikipedias and other sites that have them.

    Args:
        dump: JSON, one entity a line.
        output: The Parquet file to write.
        language: Of labels and descriptions.
    """
    write(output, _wikidata_items(dump, language))


def dbpedia(dump: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path], *, language: str = "en") -> None:
    """Resources with a label in a language; a resource's address is its id.

    Args:
        dump: N-Triples of labels.
        output: The Parquet file to write.
        language: Of the labels.
    """
    write(output, _dbpedia_labels(dump, language))


def write(output: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write rows of `SCHEMA`, at least one."""
    num_written = 0
    try:
        with pq.ParquetWriter(output, SCHEMA, compression="zstd") as writer:
            while group := list(islice(rows, _ROWS_PER_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                num_written += len(group)
    except OSError as error:
        output.unlink(missing_ok=True)
        sys.exit(f"error: {error}")
    if not num_written:
        output.unlink()
        sys.exit("error: the dump has no entity with a label in this language: see --help for the dump that is needed")
    sys.stderr.write(f"{num_written} entities written to {output}\n")


def _wikidata_items(dump: Path, language: str) -> Iterator[dict[str, Any]]:
    for line in _lines(dump):
        text = line.strip().rstrip(",")
        if not text.startswith("{"):
            continue  # the brackets around all of them
        entity = json.loads(text)
        label = entity.get("labels", {}).get(language)
        if entity["type"] == "item" and label:
            yield {
                "entity_id": entity["id"],
                "name": label["value"],
                "description": entity.get("descriptions", {}).get(language, {}).get("value"),
                "popularity": float(len(entity.get("sitelinks", ()))),
            }


def _dbpedia_labels(dump: Path, language: str) -> Iterator[dict[str, Any]]:
    for line in _lines(dump):
        found = _LABEL.match(line)
        if found and found["language"] == language and found["resource"].startswith(_DBPEDIA):
            resource = unquote(found["resource"].removeprefix(_DBPEDIA))
            yield {"entity_id": resource, "name": json.loads(found["label"])}  # N-Triples quotes as JSON does


def _lines(dump: Path) -> Iterator[str]:
    opened: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    stream: TextIO
    with opened.get(dump.suffix, open)(dump, "rt", encoding="utf-8") as stream:
        yield from tqdm(stream, unit=" lines")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"wikidata": wikidata, "dbpedia": dbpedia})

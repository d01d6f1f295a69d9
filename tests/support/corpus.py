"""A small corpus, and a configuration that links it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gemel_engine import storage
from gemel_engine.pipeline.output import has_predictions
from gemel_engine.types import PREDICTION_SCHEMA
from support.names import ENTITY_NAMES
from support.paths import ROOT


def toml(artifacts: Mapping[str, object], corpus: object, output: object, engine: str = "transformers") -> str:
    return f"""
input = "{corpus}"
output = "{output}"
knowledge_base = "{artifacts["knowledge_base"]}"
demonstrations = "{artifacts["demonstrations"]}"
rows_per_shard = 4
max_failed_fraction = 0.0
[language_model]
name = "{artifacts["language_model"]}"
engine = "{engine}"
dtype = "float32"
kv_cache_gib = 1
[vision]
image_encoder = "{artifacts["image_encoder"]}"
feature_mapper = "{artifacts["feature_mapper"]}"
[retrieval]
mention_encoder = "{artifacts["mention_encoder"]}"
num_demonstrations = 2
[prompt]
max_prompt_tokens = 600
query_reserve = 200
"""


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "PNG")
    return buffer.getvalue()


def mention_rows() -> list[dict[str, Any]]:
    colours = ["red", "green", "blue", None]
    return [
        {
            "mention_id": f"m{n}",
            "text": f"Look at the {name} over there.",
            "mention": name,
            "mention_start": 12,
            "image_bytes": colour and picture(colour),
        }
        for n, name in enumerate(ENTITY_NAMES[:9])
        for colour in [colours[n % 4]]
    ]


MENTION_SCHEMA = pa.schema(
    {
        "mention_id": pa.string(),
        "text": pa.string(),
        "mention": pa.string(),
        "mention_start": pa.int32(),
        "image_bytes": pa.binary(),
        "image_uri": pa.string(),
        "candidate_ids": pa.list_(pa.string()),
    }
)


def write_mentions(path: Path, *changes: tuple[int, dict[str, Any]]) -> Path:
    rows = mention_rows()
    for row, change in changes:
        rows[row] |= change
    pq.write_table(pa.Table.from_pylist(rows, schema=MENTION_SCHEMA), path)
    return path


def write_unsorted(corpus: Path) -> tuple[Path, list[str]]:
    """Two files of other types and columns, surface forms that take turns, and a row without any; the sorted ids."""
    corpus.mkdir()
    rows: list[dict[str, Any]] = [
        {"mention_id": f"m{n:02}", "text": f"Look at the {name} over there.", "mention": name}
        for n, name in enumerate(ENTITY_NAMES[:3] * 6)
    ]
    rows[7]["mention"] = None
    pq.write_table(pa.Table.from_pylist(rows[:10]), corpus / "a.parquet")
    large = pa.schema([(name, pa.large_string()) for name in (*rows[0], "image_uri")])
    pq.write_table(pa.Table.from_pylist(rows[10:], schema=large), corpus / "b.parquet")
    rows.sort(key=lambda row: (row["mention"] is None, row["mention"] or "", row["mention_id"]))
    return corpus, [row["mention_id"] for row in rows]


def predictions(output: str) -> list[dict[str, Any]]:
    files = storage.list_parquet(f"{output}/data")
    tables = [pq.read_table(io.BytesIO(storage.read_bytes(file.uri))) for file in files]
    assert all(has_predictions(table.schema) for table in tables)
    rows: list[dict[str, Any]] = pa.concat_tables(tables).select(PREDICTION_SCHEMA.names).to_pylist()
    return rows


def run_job(config_path: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/link_corpus.py", str(config_path), *overrides]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=540
    )

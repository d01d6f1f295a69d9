"""A finished output of the linking job, as those read it who judge, calibrate or show it."""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from gemel_engine import storage
from gemel_engine.errors import InputError
from gemel_engine.knowledge_base import KnowledgeBase
from gemel_engine.types import PREDICTION_SCHEMA

_GOLD_COLUMNS = ("mention_id", "entity_id", "mention", "text", "candidate_ids", "image_uri")
_PICTURES = ("image_bytes", "image_uri", "image_features")


@dataclass(frozen=True, slots=True)
class LinkedRun:
    """What a run was told and what it found.

    Attributes:
        output: Its directory, local or `s3://`.
        settings: Of its configuration, all but resources and the output itself.
        report: `report.json`.
        predictions: All rows, `PREDICTION_SCHEMA`.
    """

    output: str
    settings: dict[str, Any]
    report: dict[str, Any]
    predictions: pa.Table

    @classmethod
    def open(cls, output: str) -> Self:
        """Read a finished output.

        Raises:
            InputError: It is not one, or the run has not finished.
        """
        documents = []
        for name in ("_run.json", "report.json"):
            if not storage.exists(f"{output}/{name}"):
                raise InputError(f"{output} has no {name}: name the output of a linking run that has finished")
            documents.append(json.loads(storage.read_bytes(f"{output}/{name}")))
        run, report = documents
        return cls(output, run["settings"], report, _dataset(f"{output}/data", PREDICTION_SCHEMA).to_table())

    def open_knowledge_base(self) -> KnowledgeBase:
        """The knowledge base that it linked to, where that is still at its address."""
        return KnowledgeBase.open(storage.download_directory(self.settings["knowledge_base"]))


def read_gold(uri: str) -> pa.Table:
    """The small columns of mentions with gold labels.

    Args:
        uri: Parquet file or directory.

    Returns:
        `mention_id`, `entity_id`, where they are there `mention`, `text`, `candidate_ids`, `image_uri`, and
        `has_picture`.

    Raises:
        InputError: The mentions have no labels.
    """
    dataset = _dataset(uri)
    if missing := {"mention_id", "entity_id"} - set(dataset.schema.names):
        raise InputError(f"{uri} has no column {', '.join(sorted(missing))}: name a table of mentions with gold labels")
    columns = {name: pads.field(name) for name in _GOLD_COLUMNS if name in dataset.schema.names}
    pictures = [pads.field(name).is_valid() for name in _PICTURES if name in dataset.schema.names]
    return dataset.to_table(columns | {"has_picture": reduce(operator.or_, pictures, pads.scalar(False))})


def entities_to_judge(knowledge_base: KnowledgeBase, gold: pa.Table, predictions: Sequence[pa.Table]) -> pa.Table:
    """The entities that judging meets: the gold ones, the candidates, and those that are called like a surface form.

    Returns:
        Columns `entity_id`, `name` and `popularity`.
    """
    candidates = (pc.list_flatten(table["candidates"]) for table in predictions)
    ids = [gold["entity_id"], *(pc.struct_field(column, "entity_id") for column in candidates)]
    names = gold["mention"] if "mention" in gold.column_names else pa.chunked_array([[]], pa.string())
    return knowledge_base.records(
        pa.chunked_array([chunk.cast(pa.large_string()) for column in ids for chunk in column.chunks]),
        names.cast(pa.large_string()),
    )


def _dataset(uri: str, schema: pa.Schema | None = None) -> pads.Dataset:
    files = storage.list_parquet(uri)
    file_system, _ = storage.resolve(files[0].uri)
    paths = [storage.resolve(file.uri)[1] for file in files]
    return pads.dataset(paths, schema, filesystem=file_system, format="parquet")

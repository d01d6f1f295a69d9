"""Stages of the training job: check prepared mentions, store them, read them back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine import storage
from gemel_engine.config.settings import TrainConfig
from gemel_engine.errors import InputError, MentionError, shown
from gemel_engine.pipeline.corpus import Shard
from gemel_engine.pipeline.isolation import isolate
from gemel_engine.pipeline.stages import column_values, mentions_without_error, with_errors
from gemel_engine.storage import parquet
from gemel_engine.types import Mention, check_features


class CheckExamples:
    """Sets the `error` of unusable mentions: unknown entity, too long a text, bad features."""

    def __init__(self, config: TrainConfig, prefix_length: int, vision_width: int | None) -> None:
        import torch

        from gemel_engine.decoding.prompt import PromptBuilder
        from gemel_engine.evidence.update import open_knowledge_base
        from gemel_engine.tokenizer import load_tokenizer

        self._output = config.output
        self._knowledge_base = open_knowledge_base(config.knowledge_base)
        self._builder = PromptBuilder(load_tokenizer(config.language_model.name), config.prompt)
        self._stand_in = torch.empty(prefix_length, 0)
        self._width = vision_width

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Check a batch."""
        return isolate(self._check_rows, batch, self._output, "examples")

    def _check_rows(self, batch: pa.Table) -> pa.Table:
        errors = batch["error"].to_pylist()
        entity_ids = [entity_id or "" for entity_id in batch["entity_id"].to_pylist()]
        names = self._knowledge_base.names_of_entities(entity_ids)
        features = column_values(batch, "image_features")
        for row, mention in enumerate(mentions_without_error(batch)):
            if mention is None:
                continue
            if names[row] is None:
                errors[row] = f"unknown_entity: {entity_ids[row]!r} is not in the knowledge base"
                continue
            try:
                self._check(mention, features[row])
            except MentionError as error:
                errors[row] = str(error)
        return with_errors(batch, errors)

    def _check(self, mention: Mention, features: list[float] | None) -> None:
        prefix = None if features is None else self._stand_in
        self._builder.question(mention.text, mention.mention, prefix, mention.mention_start)
        if features is not None:
            with np.errstate(over="ignore"):
                check_features(np.array(features, np.float32), self._width or len(features))


def write_examples(batch: pa.Table, directory: str) -> pa.Table:
    """Store prepared mentions as a file; return a row with their counts."""
    (first,) = batch.select(["shard", "row"]).slice(0, 1).to_pylist()
    name = f"shard-{first['shard']:05d}-{first['row']:08d}.parquet"
    storage.write_bytes(f"{directory}/{name}", parquet.parquet_bytes(batch))
    usable = pc.and_(pc.is_null(batch["error"]), pc.is_valid(batch["image_features"]))
    return pa.table({"num_rows": [batch.num_rows], "num_pictures": [pc.sum(usable).as_py() or 0]})


def write_features(batch: pa.Table, directory: str) -> pa.Table:
    """Store the image features of mentions of a shard, and the errors of their pictures; return counts."""
    (first,) = batch.select(["shard", "row"]).slice(0, 1).to_pylist()
    uri = f"{directory}/shard-{first['shard']:05d}/{first['row']:08d}.parquet"
    storage.write_bytes(uri, parquet.parquet_bytes(batch.select(["row", "error", "image_features"])))
    return pa.table(
        {"num_rows": [batch.num_rows], "num_pictures": [pc.sum(pc.is_valid(batch["image_features"])).as_py()]}
    )


def with_features(batch: pa.Table, shard: Shard, directory: str) -> pa.Table:
    """Return all mentions of a shard with the features and errors that `write_features` stored.

    Raises:
        InputError: Features are missing, or damaged.
    """
    place = f"{directory}/shard-{shard.index:05d}"
    tables = []
    for name in storage.list_files(place):
        with parquet.open_table(f"{place}/{name}") as table:
            tables.append(table.read())
    stored = pa.concat_tables(tables).sort_by("row") if tables else None
    if stored is None or not stored["row"].equals(batch["row"]):
        raise InputError(f"{shown(place)} has not the image features of its mentions: remove {shown(directory)}")
    columns = [name for name in ("error", "image_features") if name in batch.column_names]
    batch = batch.drop_columns(columns)
    return batch.append_column("error", stored["error"]).append_column("image_features", stored["image_features"])


def read_file(batch: pa.Table) -> pa.Table:
    """Read the Parquet file that a row names."""
    with parquet.open_table(batch["uri"][0].as_py()) as table:
        return table.read()

"""The search of a corpus of documents for mentions, as a Ray Data job.

    OUTPUT/_run.json                    identity of the run; created exclusively
    OUTPUT/_documents/shard-*.parquet   number of mentions, or `error`, of each document
    OUTPUT/data/shard-*.parquet         mentions as linking reads them; created exclusively, after
                                        the shard's documents
    OUTPUT/_report.json                 counts

A file under `data/` exists if and only if its shard is complete: a rerun searches the others.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.config.finding import FindConfig
from gemel_engine.config.loading import config_json, validated, with_absolute_paths
from gemel_engine.display import counts
from gemel_engine.errors import InvalidDocumentError, TooManyFailuresError, error_kind, shown
from gemel_engine.finding.base import Span
from gemel_engine.finding.documents import mentions_of, plan_documents, read_documents
from gemel_engine.finding.finders import finder_contents, open_finder
from gemel_engine.fingerprints import Contents
from gemel_engine.pipeline.corpus import Shard, count_rows, plan_identity
from gemel_engine.pipeline.isolation import isolate
from gemel_engine.pipeline.output import RunDirectory, claim_output, finished_shards
from gemel_engine.pipeline.stages import part_of, places_of, without_invalid_text
from gemel_engine.storage import parquet
from gemel_engine.storage.columns import IDENTIFIER, TEXT, Column
from gemel_engine.storage.parquet import parquet_bytes

logger = logging.getLogger(__name__)

_NOT_IDENTITY = ("output", "gold", "max_failed_fraction")  # settings that change no row
_CPUS_PER_ACTOR = 1
_DOCUMENT_RESULT = {
    "document_id": IDENTIFIER,
    "num_mentions": Column.like(pa.int32()),
    "error": TEXT,
}


@dataclass(frozen=True, slots=True)
class FindReport:
    """The contents of `_report.json`.

    Attributes:
        documents: Number of documents.
        mentions: Number of mentions.
        documents_without_mentions: Number of documents in which none was found.
        errors: Number of documents with an error, by kind.
        shards: Number of shards.
        shards_skipped: Number of shards that were complete at the start.
        seconds: Duration of this run.
    """

    documents: int
    mentions: int
    documents_without_mentions: int
    errors: dict[str, int]
    shards: int
    shards_skipped: int
    seconds: float

    def summary(self) -> str:
        """Return one line for a terminal."""
        return (
            f"documents={self.documents} mentions={self.mentions} "
            f"documents_without_mentions={self.documents_without_mentions} errors={sum(self.errors.values())}"
        )


def find_mentions(config: FindConfig) -> FindReport:
    """Search a corpus: every document gets its mentions or an `error`.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable (raised before any
            work), or more documents failed than `max_failed_fraction` allows (the output is
            complete).
    """
    started = time.monotonic()
    config, plan, contents = _checked(config)
    on_gpu = config.finder.device == "cuda"
    remaining, stage = _remaining(config.output, plan), None
    if remaining:  # raises before any work
        stage = FindMentions(replace(config, finder=replace(config.finder, device="cpu")), contents)
    claim_output(config.output, _identity(config, plan, contents))
    if len(remaining) > 1 or (remaining and on_gpu):
        from gemel_engine.pipeline.ray_data import run_each

        stage = None  # its model takes memory
        shards, arguments = [asdict(shard) for shard in remaining], (with_absolute_paths(config), contents)
        run_each(shards, FindMentions, arguments, num_cpus=_CPUS_PER_ACTOR, num_gpus=int(on_gpu))
    elif stage is not None:
        stage.search(remaining[0])
    report = _make_report(config.output, plan, remaining, time.monotonic() - started)
    storage.remove_tree(RunDirectory(config.output).marks)
    if remaining or not storage.exists(RunDirectory(config.output).report):
        storage.write_bytes(RunDirectory(config.output).report, json.dumps(asdict(report), indent=2).encode())
    logger.info("mentions found in %s: %s", shown(config.output), report.summary())
    if sum(report.errors.values()) > config.max_failed_fraction * report.documents:
        raise TooManyFailuresError(
            f"{sum(report.errors.values())} of {report.documents} documents failed ({counts(report.errors)}), more "
            f"than max_failed_fraction {config.max_failed_fraction} allows; the output {shown(config.output)} is "
            "complete: see `error` in its _documents"
        )
    return report


def describe_search(config: FindConfig) -> str:
    """Make the checks of `find_mentions` that need no model and describe what it would do.

    Raises:
        GemelError: The configuration, the input or an artifact is unusable.
    """
    config, plan, _ = _checked(config)
    remaining = _remaining(config.output, plan)
    return (
        f"{config.output}: {count_rows(remaining)} of {count_rows(plan)} documents are to be searched, in "
        f"{len(remaining)} of {len(plan)} shards; nothing has been done"
    )


class FindMentions:
    """Stage that searches shards of documents and writes their mentions.

    Raises:
        ArtifactError: A model or artifact is missing, damaged, or not that of the start.
    """

    def __init__(self, config: FindConfig, contents: Contents) -> None:
        self._config = config
        self._finder = open_finder(config, contents)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Search a table of shards; return the table."""
        for row in batch.to_pylist():
            self.search(Shard(**row))
        return batch

    def search(self, shard: Shard) -> None:
        """Search a shard and write its files, `data/` last."""
        output = RunDirectory(self._config.output)
        found = isolate(partial(self._found, shard=shard), places_of(shard), output.output, "finding")
        ends = zip(found["starts"].to_pylist(), found["stops"].to_pylist(), strict=True)
        spans = [[Span(*span) for span in zip(starts, stops, strict=True)] for starts, stops in ends]
        mentions = mentions_of(found, spans, self._config.finder.max_text_characters)
        documents = pa.table(
            {
                "document_id": found["document_id"],
                "num_mentions": pa.array(map(len, spans), pa.int32()),
                "error": found["error"],
            }
        )
        storage.write_bytes(f"{_documents(output.output)}/{shard.name}.parquet", parquet_bytes(documents))
        storage.create_exclusive(output.shard(shard.name), parquet_bytes(mentions))

    def _found(self, places: pa.Table, shard: Shard) -> pa.Table:
        """Return adjacent documents of a shard, with `starts` and `stops` of their mentions.

        Documents that have an `error` already are not read, but for their ids.
        """
        part = part_of(shard, places)
        if places["error"].null_count:
            documents, errors = without_invalid_text(read_documents(part), InvalidDocumentError)
        else:
            documents, errors = read_documents(part, ("document_id",)), places["error"].to_pylist()
            documents = documents.append_column("text", pa.nulls(len(errors), pa.large_string()))
        texts = documents["text"].to_pylist()
        errors = [
            error if error or (text and text.strip()) else str(InvalidDocumentError("the text is empty: give one"))
            for text, error in zip(texts, errors, strict=True)
        ]
        found = iter(self._finder.find([text for text, error in zip(texts, errors, strict=True) if error is None]))
        spans = [next(found) if error is None else [] for error in errors]
        for place, name in enumerate(("starts", "stops")):
            ends = pa.array([[span[place] for span in of_document] for of_document in spans], pa.list_(pa.int64()))
            documents = documents.append_column(name, ends)
        for name in ("shard", "row"):
            documents = documents.append_column(name, places[name])
        return documents.append_column("error", pa.array(errors, pa.string()))


def _checked(config: FindConfig) -> tuple[FindConfig, list[Shard], Contents]:
    """Make the checks that need no finder; return the configuration, the plan and `finder_contents`."""
    config = validated(config)
    storage.check_kept(config.output)
    storage.check_apart(config.output, config.input)
    plan = plan_documents(config.input, config.rows_per_shard, config.columns.given())
    return config, plan, finder_contents(config)


def _documents(output: str) -> str:
    return f"{output}/_documents"


def _remaining(output: str, plan: list[Shard]) -> list[Shard]:
    described = set(storage.list_files(_documents(output)))
    finished = {name for name in finished_shards(output) if f"{name}.parquet" in described}
    return [shard for shard in plan if shard.name not in finished]


def _identity(config: FindConfig, plan: list[Shard], contents: Contents) -> dict[str, Any]:
    settings = json.loads(config_json(config))
    return {
        "settings": {name: value for name, value in settings.items() if name not in _NOT_IDENTITY},
        "plan": plan_identity(plan),
        "artifacts": contents,
    }


def _make_report(output: str, plan: list[Shard], remaining: list[Shard], seconds: float) -> FindReport:
    files = [f"{_documents(output)}/{shard.name}.parquet" for shard in plan]
    rows = pa.concat_tables(
        parquet.read_tables(file, _DOCUMENT_RESULT, ("num_mentions", "error"), tuple(_DOCUMENT_RESULT))
        for file in files
    )
    errors, counts = rows["error"].to_pylist(), rows["num_mentions"].to_pylist()
    return FindReport(
        documents=len(rows),
        mentions=sum(counts),
        documents_without_mentions=sum(
            count == 0 and error is None for count, error in zip(counts, errors, strict=True)
        ),
        errors=dict(Counter(error_kind(error) for error in errors if error is not None)),
        shards=len(plan),
        shards_skipped=len(plan) - len(remaining),
        seconds=seconds,
    )

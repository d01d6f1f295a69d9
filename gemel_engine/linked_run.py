"""A finished output of the linking job: read, judged by gold labels, used to fit a calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from gemel_engine import parquet, storage
from gemel_engine.calibration import Calibration, ConfidenceQuality, quality, scoring_settings
from gemel_engine.errors import InputError
from gemel_engine.evaluation import Comparison, Evaluation, Figure, Judge, LeakAudit, Protocol, audit_leaks
from gemel_engine.knowledge_base import KnowledgeBase
from gemel_engine.knowledge_base_update import local_knowledge_base
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_COLUMNS, PREDICTION_SCHEMA

_GOLD_COLUMNS = ("mention_id", "entity_id", "mention", "text", "candidate_ids", "image_uri")
_PICTURES = ("image_bytes", "image_uri", "image_features")
_SETTINGS = {"input": str, "knowledge_base": str, "demonstrations": str | None}  # those that are read here


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
        documents, output = [], output.rstrip("/")
        for name in ("_run.json", "report.json"):
            if not storage.exists(f"{output}/{name}"):
                raise InputError(f"{output} has no {name}: name the output of a linking run that has finished")
            documents.append(storage.read_json(f"{output}/{name}", "put it back, or link again to a new output"))
        run, report = documents
        settings = run.get("settings") if isinstance(run, dict) and isinstance(report, dict) else None
        if not isinstance(settings, dict) or not all(
            name in settings and isinstance(settings[name], kind) for name, kind in _SETTINGS.items()
        ):
            raise InputError(f"{output}/_run.json is not of a linking run: name the output of one that has finished")
        return cls(output, settings, report, _read_predictions(f"{output}/data"))

    def has_gold(self) -> bool:
        """Whether its input has a column `entity_id`."""
        return any("entity_id" in table.names for table in parquet.open_tables(self.settings["input"], MENTION_COLUMNS))

    def open_knowledge_base(self) -> KnowledgeBase:
        """The knowledge base that it linked to, where that is still at its address."""
        return KnowledgeBase.open(local_knowledge_base(self.settings["knowledge_base"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun:
    """All that is said of a run.

    Attributes:
        evaluation: How good it is.
        confidence: How good its scores are, by their names: `calibrated` where it has a calibration, and `raw`.
        comparison: The run beside another.
        leaks: What its mentions have in common with the training split.
        knowledge_base_names: Names that the run chose from.
        verdicts: `Judge.verdicts`.
    """

    evaluation: Evaluation
    confidence: dict[str, ConfidenceQuality]
    comparison: Comparison | None
    leaks: LeakAudit | None
    knowledge_base_names: int
    verdicts: pa.Table

    def to_json(self) -> bytes:
        """`metrics.json`: all but the verdicts."""
        return json.dumps(asdict(replace(self, verdicts=None)), indent=2, allow_nan=False).encode()


def judge_run(
    linked: LinkedRun,
    *,
    gold: str | None = None,
    train: str | None = None,
    against: LinkedRun | None = None,
    protocol: Protocol = "entity",
) -> JudgedRun:
    """Judge a run by gold labels.

    Args:
        linked: The run.
        gold: See `read_gold`; the run's input by default.
        train: The training split.
        against: Another run over the same mentions.
        protocol: When an answer is right.

    Raises:
        InputError: There are no labels, or they are not of the linked mentions.
    """
    labels = gold or linked.settings["input"]
    labelled = read_gold(labels, linked.settings["input"], with_digests=train is not None)
    training = None if train is None else read_gold(train, with_digests=True)
    knowledge_base = linked.open_knowledge_base()
    runs = [linked.predictions, *([] if against is None else [against.predictions])]
    entities = entities_to_judge(knowledge_base, labelled, runs)
    judge = Judge(labelled, entities=entities, train=training, protocol=protocol)
    evaluation, comparison = judge.evaluate(linked.predictions), None
    if against is not None:
        try:  # what may be wrong is not the run's own, which has been judged
            Judge(read_gold(labels, against.settings["input"]), entities=entities, protocol=protocol)
            comparison = judge.compare(against.predictions, linked.predictions)
        except InputError as error:
            raise InputError(f"of the run to compare with: {error}") from error
    return JudgedRun(
        evaluation=evaluation,
        confidence=qualities(judge, linked.predictions),
        comparison=comparison,
        leaks=None if training is None else audit_leaks(training, labelled),
        knowledge_base_names=knowledge_base.trie.num_names,
        verdicts=judge.verdicts(linked.predictions),
    )


def calibrate_run(linked: LinkedRun, *, gold: str | None = None, nil_precision: float) -> Calibration:
    """Fit a calibration to a run over mentions with gold labels.

    Args:
        linked: The run.
        gold: See `read_gold`; the run's input by default.
        nil_precision: See `Calibration.fit`.

    Raises:
        InputError: There are no labels, too few mentions of an outcome, or mentions with candidates of their own.
        ConfigurationError: No threshold of NIL reaches that precision.
    """
    labelled = read_gold(gold or linked.settings["input"], linked.settings["input"])
    if "candidate_ids" in labelled.column_names and labelled["candidate_ids"].null_count < len(labelled):
        raise InputError(
            "some mentions of the run have candidate_ids, and a search over a few names gives other evidence than one "
            "over all: fit the calibration on a run without candidates"
        )
    entities = entities_to_judge(linked.open_knowledge_base(), labelled, [linked.predictions])
    predictions, is_right, is_nil = Judge(labelled, entities=entities).outcomes(linked.predictions)
    return Calibration.fit(
        predictions,
        surface_forms(labelled, predictions),
        is_right,
        is_nil,
        nil_precision=nil_precision,
        scoring=scoring_settings(linked.settings),
    )


def surface_forms(gold: pa.Table, predictions: pa.Table) -> list[str]:
    """The surface form of each prediction, all of whose mentions have a gold row."""
    form_of = dict(zip(gold["mention_id"].to_pylist(), gold["mention"].to_pylist(), strict=True))
    return [form_of[mention_id] for mention_id in predictions["mention_id"].to_pylist()]


def qualities(judge: Judge, predictions: pa.Table) -> dict[str, ConfidenceQuality]:
    """How good each score is that a run gives its answers, those to NIL mentions too; rows with an error have none."""
    judged, is_right, _ = judge.outcomes(predictions)
    has_answer = np.array(judged["error"].is_null())
    judged, is_right = judged.filter(has_answer), is_right[has_answer]
    scores = {"calibrated": "confidence", "raw": "probability"}
    return {
        name: quality(judged[column].to_numpy(), is_right)
        for name, column in scores.items()
        if len(judged) and not judged[column].null_count
    }


def as_table(judged: JudgedRun) -> Table:
    """What is said of a run, for a terminal."""
    evaluation = judged.evaluation
    table = Table(title=f"{evaluation.num_mentions} mentions, protocol {evaluation.protocol}")
    for heading in ("", "value", "95% interval", "mentions"):
        table.add_column(heading, justify="left" if not heading else "right")

    def add(name: str, figure: Figure) -> None:
        interval = f"{figure.low:.3f} to {figure.high:.3f}"
        table.add_row(name, f"{figure.value:.3f}", interval, str(figure.num_mentions))

    add("accuracy", evaluation.accuracy)
    if evaluation.baseline is not None:
        add("accuracy without a model", evaluation.baseline)
    add("gold among the first 5", evaluation.hits_at_5)
    add("mean reciprocal rank", evaluation.mean_reciprocal_rank)
    add("certified", evaluation.certified_share)
    for kind, figures in evaluation.buckets.items():
        table.add_section()
        for label, figure in figures.items():
            add(f"{kind}: {label}", figure)
    for score, item in judged.confidence.items():
        table.add_section()
        table.add_row(f"{score} score: calibration error", f"{item.expected_calibration_error:.3f}", "", "")
        table.add_row(f"{score} score: Brier", f"{item.brier_score:.3f}", "", "")
        table.add_row(f"{score} score: area under risk and coverage", f"{item.area_under_risk_coverage:.3f}", "", "")
    if judged.comparison is not None:
        table.add_section()
        add("accuracy, less that of the other run", judged.comparison.difference)
        table.add_row(
            "right here alone, right there alone",
            f"{len(judged.comparison.won)}, {len(judged.comparison.lost)}",
            "",
            "",
        )
        table.add_row("McNemar's exact test, p", f"{judged.comparison.p_value:.3f}", "", "")
    return table


def read_gold(uri: str, linked: str | None = None, *, with_digests: bool = False) -> pa.Table:
    """The small columns of mentions with gold labels.

    Args:
        uri: Parquet file or directory.
        linked: The input of their run, which alone says what their candidates were, and all else if the labels come
            without `text`; None if there is no run.
        with_digests: Read all pictures, for their digests.

    Returns:
        `mention_id`, `entity_id`, where they are there `mention`, `text`, `candidate_ids`, `image_uri`,
        `image_digest` (of `image_bytes`), and `has_picture`.

    Raises:
        InputError: The mentions have no labels.
    """
    if linked is None or linked == uri:
        return _small_columns(uri, with_digests=with_digests, with_labels=True)
    labels = _small_columns(uri, with_digests=with_digests, with_labels=True)
    ours = [name for name in labels.column_names if name != "candidate_ids"]
    labels = labels.select(ours if "text" in ours else ["mention_id", "entity_id"])
    ids = labels["mention_id"].combine_chunks()
    with_digests &= "image_digest" not in labels.column_names
    described = _small_columns(linked, ids, with_digests=with_digests)
    place = pc.index_in(ids, described["mention_id"].combine_chunks())
    for name in described.column_names:
        if name not in labels.column_names:
            labels = labels.append_column(name, described[name].take(place))
    return labels


def _small_columns(
    uri: str, wanted: pa.Array | None = None, *, with_digests: bool, with_labels: bool = False
) -> pa.Table:
    """What `read_gold` returns, of all mentions or of those with wanted ids; `with_labels` they must have labels."""
    tables = []
    for table in parquet.open_tables(uri, MENTION_COLUMNS, ["mention_id"]):
        if with_labels and "entity_id" not in table.names:
            raise InputError(f"{table.file.uri} has no column entity_id: name a table of mentions with gold labels")
        tables += [
            _described(piece if wanted is None else piece.filter(pc.is_in(piece["mention_id"], wanted)), with_digests)
            for piece in table.pieces((*_GOLD_COLUMNS, *_PICTURES))
        ]
    return pa.concat_tables(tables, promote_options="default")


def _described(mentions: pa.Table, with_digests: bool) -> pa.Table:
    """The small columns of some mentions, and what is to be said of their pictures."""
    table = mentions.select([name for name in _GOLD_COLUMNS if name in mentions.column_names])
    has_picture = np.zeros(len(mentions), bool)
    for name in _PICTURES:
        if name in mentions.column_names:
            has_picture |= mentions[name].is_valid().to_numpy()
    table = table.append_column("has_picture", pa.array(has_picture))
    if with_digests and "image_bytes" in mentions.column_names:
        digests = [_digest(value) for value in mentions["image_bytes"]]
        table = table.append_column("image_digest", pa.array(digests, pa.binary()))
    return table


def _read_predictions(directory: str) -> pa.Table:
    """All rows of an output; a column that an earlier version did not write is null."""
    found = parquet.read_tables(directory, PREDICTION_COLUMNS, PREDICTION_SCHEMA.names, ["mention_id"])
    nulls = [pa.nulls(len(found), field.type) for field in PREDICTION_SCHEMA]
    columns = [
        found[field.name] if field.name in found.column_names else null
        for field, null in zip(PREDICTION_SCHEMA, nulls, strict=True)
    ]
    return pa.table(columns, schema=PREDICTION_SCHEMA)


def _digest(value: pa.Scalar) -> bytes | None:
    return blake2b(value.as_buffer(), digest_size=16).digest() if value.is_valid else None


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

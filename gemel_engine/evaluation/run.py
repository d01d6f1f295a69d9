"""Read the finished output of a linking job and judge it by gold labels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa

from gemel_engine import storage
from gemel_engine.config.bounds import EvaluationProtocol
from gemel_engine.decoding.confidence import MANIFEST as CALIBRATION_MANIFEST
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.errors import ArtifactError, InputError
from gemel_engine.evaluation.gold import entities_to_judge, read_gold
from gemel_engine.evaluation.judge import Comparison, Evaluation, Judge
from gemel_engine.evaluation.leaks import LeakAudit, audit_leaks
from gemel_engine.evaluation.quality import ConfidenceQuality, quality
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.evidence.weights import MANIFEST as WEIGHTS_MANIFEST
from gemel_engine.evidence.weights import SHIPPED, ScoreWeights
from gemel_engine.fingerprints import json_sha256, read_manifest_at
from gemel_engine.knowledge_base.store import MANIFEST, KnowledgeBase
from gemel_engine.storage import parquet
from gemel_engine.types import PREDICTION_COLUMNS, PREDICTION_SCHEMA, mention_columns

_SETTINGS = {"input": str, "knowledge_base": str, "demonstrations": str | None}  # read here


@dataclass(frozen=True, slots=True)
class LinkedRun:
    """The settings and the output of a finished run.

    Attributes:
        output: Output directory, local or `s3://`.
        settings: The run's configuration without resources and output.
        report: Contents of `_report.json`.
        predictions: All rows, in `PREDICTION_SCHEMA`.
        identity: Contents of `_run.json`: settings, input files, models and artifacts.
    """

    output: str
    settings: dict[str, Any]
    report: dict[str, Any]
    predictions: pa.Table
    identity: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, output: str) -> Self:
        """Read a finished output.

        Raises:
            InputError: The directory is not a linking output, or the run has not finished.
        """
        documents, output = [], output.rstrip("/")
        former = "report.json"  # of outputs that an older version wrote
        report_name = former if storage.exists(f"{output}/{former}") else "_report.json"
        for name in ("_run.json", report_name):
            if not storage.exists(f"{output}/{name}"):
                raise InputError(f"{output} has no {name}: name the output of a linking run that has finished")
            document = storage.read_json(f"{output}/{name}", "put it back, or link again to a new output")
            if not isinstance(document, dict):
                raise InputError(f"{output}/{name} is no JSON object: put it back, or link again to a new output")
            documents.append(document)
        run, report = documents
        settings = run.get("settings")
        if not isinstance(settings, dict) or not all(
            name in settings and isinstance(settings[name], kind) for name, kind in _SETTINGS.items()
        ):
            raise InputError(f"{output}/_run.json is not of a linking run: name the output of one that has finished")
        return cls(output, settings, report, _read_predictions(f"{output}/data"), run)

    def has_gold(self) -> bool:
        """Return whether a mention of the run's input has an `entity_id`."""
        return any(
            piece["entity_id"].null_count < len(piece)
            for table in parquet.open_tables(self.settings["input"], mention_columns(self.stored_names))
            if "entity_id" in table.names
            for piece in table.pieces(["entity_id"])
        )

    @property
    def stored_names(self) -> dict[str, str]:
        """Return the input's names of columns that have another name there."""
        return {name: theirs for name, theirs in (self.settings.get("columns") or {}).items() if theirs}

    def has_knowledge_base(self) -> bool:
        """Return whether the knowledge base is still at its original address."""
        return storage.exists(f"{self.settings['knowledge_base']}/{MANIFEST}")

    def check_knowledge_base(self) -> None:
        """Validate that the knowledge base at the run's address is the one that the run had.

        Raises:
            ArtifactError: It was replaced, or is missing.
        """
        address, artifacts = self.settings["knowledge_base"], self.identity.get("artifacts") or {}
        if "knowledge_base" in artifacts and read_manifest_at(f"{address}/{MANIFEST}") != artifacts["knowledge_base"]:
            raise ArtifactError(
                f"the knowledge base {address} is not the one that the run {self.output} had: put that one back, or "
                "link again"
            )

    def has_artifact(self, name: str, manifest: str) -> bool:
        """Return whether an artifact of the run is still there, by the address of its manifest."""
        artifacts = self.identity.get("artifacts") or {}
        return storage.exists(manifest) and read_manifest_at(manifest) == artifacts.get(name)

    def checksums(self) -> dict[str, str]:
        """Return checksums of the run's models, artifacts and input files, by name, as far as recorded."""
        parts = {**(self.identity.get("artifacts") or {}), "input": self.identity.get("plan")}
        return {
            name: part if isinstance(part, str) else json_sha256(part)
            for name, part in parts.items()
            if part is not None
        }

    def open_weights(self) -> ScoreWeights | None:
        """Open the weights of the run's score; None if it had none, or if they are not there any more."""
        settings, address = self.settings, self.settings.get("calibration")
        if (settings.get("score") or {}).get("kind") != "combined":
            return None
        name, uri = "calibration", f"{address}/{CALIBRATION_MANIFEST}"
        if address is None:
            name, uri = "weights", f"{SHIPPED}/{WEIGHTS_MANIFEST}"
        if not self.has_artifact(name, uri):
            return None
        return ScoreWeights.open() if address is None else Calibration.open(storage.download_directory(address)).weights

    def open_knowledge_base(self) -> KnowledgeBase:
        """Open the knowledge base of the run, from its original address."""
        return open_knowledge_base(self.settings["knowledge_base"])


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRun:
    """Every result of judging a run.

    Attributes:
        evaluation: Accuracy of the run, in total and by kind of mention.
        confidence: Quality of `confidence` and of `probability`, as far as all rows have them.
        comparison: Comparison with another run; None if none was given.
        leaks: Overlap with the training split; None if none was given.
        knowledge_base_names: Number of names in the knowledge base.
        verdicts: Result of `Judge.verdicts`.
    """

    evaluation: Evaluation
    confidence: dict[str, ConfidenceQuality]
    comparison: Comparison | None
    leaks: LeakAudit | None
    knowledge_base_names: int
    verdicts: pa.Table

    @property
    def is_below_baseline(self) -> bool:
        """Return whether a lookup in names and training mentions, without a model, is right more often."""
        baseline = self.evaluation.baseline
        return baseline is not None and self.evaluation.accuracy.value < baseline.value

    def to_json(self) -> bytes:
        """Return the contents of `metrics.json`: everything except the verdicts."""
        return json.dumps(asdict(replace(self, verdicts=None)), indent=2, allow_nan=False).encode()


def judge_run(
    linked: LinkedRun,
    *,
    gold: str | None = None,
    train: str | None = None,
    against: LinkedRun | None = None,
    protocol: EvaluationProtocol = "entity",
) -> JudgedRun:
    """Judge a run by gold labels.

    Args:
        linked: The run.
        gold: Table file or directory with gold labels (see `read_gold`); the run's input by
            default.
        train: Table file or directory of the training split; None: leaks are not counted.
        against: Another run over the same mentions, to compare with.
        protocol: Protocol that decides when an answer is right.

    Raises:
        InputError: There are no labels, or they belong to other mentions than the run's.
    """
    labels, names = gold or linked.settings["input"], linked.stored_names
    labelled = read_gold(labels, linked.settings["input"], stored_names=names, with_digests=train is not None)
    training = None if train is None else read_gold(train, stored_names=names, with_digests=True)
    knowledge_base = linked.open_knowledge_base()
    runs = [linked.predictions, *([] if against is None else [against.predictions])]
    entities = entities_to_judge(knowledge_base, labelled, runs)
    judge = Judge(labelled, entities=entities, train=training, protocol=protocol)
    evaluation, comparison = judge.evaluate(linked.predictions), None
    if against is not None:
        try:  # the run itself has been judged, so an error here is about the other one
            corpus, stored_names = against.settings["input"], against.stored_names
            others = read_gold(labels, corpus, stored_names=stored_names, with_pictures=False)
            Judge(others, entities=entities, protocol=protocol)
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


def changed_answers(first: pa.Table, second: pa.Table) -> tuple[int, int]:
    """Return the number of mentions that two runs have in common, and of those with another entity."""
    one, two = (
        dict(zip(run["mention_id"].to_pylist(), run["entity_id"].to_pylist(), strict=True)) for run in (first, second)
    )
    common = one.keys() & two.keys()
    return len(common), sum(one[mention_id] != two[mention_id] for mention_id in common)


def qualities(judge: Judge, predictions: pa.Table) -> dict[str, ConfidenceQuality]:
    """Return the quality of each column of probabilities, over labelled rows without an error."""
    judged, is_right, _ = judge.outcomes(predictions)
    has_answer = np.array(judged["error"].is_null())
    judged, is_right = judged.filter(has_answer), is_right[has_answer]
    return {
        column: quality(judged[column].to_numpy(), is_right)
        for column in ("confidence", "probability")
        if len(judged) and not judged[column].null_count
    }


def _read_predictions(directory: str) -> pa.Table:
    """Read all rows of an output; a column that an older version did not write is null."""
    found = parquet.read_tables(directory, PREDICTION_COLUMNS, PREDICTION_SCHEMA.names, ["mention_id"])
    nulls = [pa.nulls(len(found), field.type) for field in PREDICTION_SCHEMA]
    columns = [
        found[field.name] if field.name in found.column_names else null
        for field, null in zip(PREDICTION_SCHEMA, nulls, strict=True)
    ]
    return pa.table(columns, schema=PREDICTION_SCHEMA)

"""Judge a finished linking run by gold labels.

python jobs/evaluate.py linked/ --train train.parquet
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from gemel_engine import storage
from gemel_engine.calibration import ConfidenceQuality, quality
from gemel_engine.command_line import run
from gemel_engine.evaluation import Comparison, Evaluation, Figure, Judge, Protocol, audit_leaks
from gemel_engine.linked_run import LinkedRun, entities_to_judge, read_gold

logger = logging.getLogger("evaluate")


def main(
    output: tyro.conf.Positional[str],
    *,
    gold: str | None = None,
    train: str | None = None,
    against: str | None = None,
    protocol: Protocol = "entity",
    write_to: str | None = None,
) -> None:
    """Judge a finished linking run: a table here, `metrics.json` and `report.html` beside the run.

    Args:
        output: The run's output, local or s3://bucket/prefix.
        gold: Mentions with `entity_id`; the run's input by default.
        train: The training split, to tell mentions by what it holds, and for the baseline without a model.
        against: Output of another run over the same mentions, to compare with.
        protocol: When an answer is right: the entity's id, its name (GEMEL's protocol), or its id of the mention's own
            candidates alone.
        write_to: Directory for the two files; by default `evaluation` in the run's output.
    """
    linked = LinkedRun.open(output)
    other = None if against is None else LinkedRun.open(against)
    labelled = read_gold(gold or linked.settings["input"])
    training = None if train is None else read_gold(train)
    runs = [linked.predictions, *([] if other is None else [other.predictions])]
    entities = entities_to_judge(linked.open_knowledge_base(), labelled, runs)
    judge = Judge(labelled, entities=entities, train=training, protocol=protocol)
    evaluation = judge.evaluate(linked.predictions)
    comparison = None if other is None else judge.compare(other.predictions, linked.predictions)
    confidence = qualities(judge, linked.predictions)
    leaks = None if training is None else audit_leaks(training, labelled)
    metrics = {
        "evaluation": asdict(evaluation),
        "confidence": {score: asdict(item) for score, item in confidence.items()},
        "comparison": comparison and asdict(comparison),
        "leaks": leaks and asdict(leaks),
        "knowledge_base_names": linked.open_knowledge_base().trie.num_names,
        "run": {"output": output, "against": against, "gold": gold or linked.settings["input"], "train": train},
    }
    directory = write_to or f"{output}/evaluation"
    storage.write_bytes(f"{directory}/metrics.json", json.dumps(metrics, indent=2, allow_nan=False).encode())
    Console().print(as_table(evaluation, confidence, comparison))
    logger.info("%s/metrics.json: %d mentions, protocol %s", directory, evaluation.num_mentions, protocol)


def qualities(judge: Judge, predictions: pa.Table) -> dict[str, ConfidenceQuality]:
    """How good each score is that a run gives its answers, on the mentions without an error."""
    judged = judge.judge(predictions)
    judged = judged[judged["error"].isna()]
    is_right = (judged["rank"] == 1).to_numpy()
    scores = {"raw": "probability", "calibrated": "confidence"}
    return {
        name: quality(judged[column].to_numpy(np.float64), is_right)
        for name, column in scores.items()
        if len(judged) and judged[column].notna().all()
    }


def as_table(evaluation: Evaluation, confidence: dict[str, ConfidenceQuality], comparison: Comparison | None) -> Table:
    """For a terminal."""
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
    for score, item in confidence.items():
        table.add_section()
        table.add_row(f"{score} score: calibration error", f"{item.expected_calibration_error:.3f}", "", "")
        table.add_row(f"{score} score: Brier", f"{item.brier_score:.3f}", "", "")
        table.add_row(f"{score} score: area under risk and coverage", f"{item.area_under_risk_coverage:.3f}", "", "")
    if comparison is not None:
        table.add_section()
        add("accuracy, less that of the other run", comparison.difference)
        table.add_row("right here alone, right there alone", f"{len(comparison.won)}, {len(comparison.lost)}", "", "")
        table.add_row("McNemar's exact test, p", f"{comparison.p_value:.3f}", "", "")
    return table


if __name__ == "__main__":
    run(main)

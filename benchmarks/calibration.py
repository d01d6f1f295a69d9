"""How good the fitted probabilities are, and how well mentions outside the knowledge base are found.

python benchmarks/calibration.py WIKIDIVERSE

WIKIDIVERSE holds `train.parquet`, `dev.parquet` and `entities.parquet`. Needs what `make demo` and
`benchmarks/wikidiverse.py` build. The dev splits of WikiDiverse (text) and of the emoji corpus are linked by the
linking job twice: to their knowledge bases, and to what is left of these, of the demonstrations and of what the feature
mapper was fitted to, without a random fifth of the entities. Surface forms are then divided into two halves: each is
judged by a calibration fitted on the other. Results go to `benchmarks/results/calibration.json`; what has results there
is skipped, and an interrupted run goes on.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from record import record, run_script
from sklearn.metrics import roc_auc_score

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import evidence_of, scoring_settings
from gemel_engine.evaluation.calibrate import fit_calibration
from gemel_engine.evaluation.gold import entities_to_judge, read_gold, surface_forms
from gemel_engine.evaluation.judge import Judge
from gemel_engine.evaluation.quality import quality
from gemel_engine.evaluation.run import LinkedRun

WORK = Path("build/calibration")
RESULTS = Path("benchmarks/results/calibration.json")
SEED = 0
REMOVED_SHARE = 0.2
NIL_PRECISION = 0.4  # twice the share of NIL; what is fitted on one half of WikiDiverse reaches 0.45 at most

run = partial(run_script, WORK / "log.txt")
logger = logging.getLogger("calibration")


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus with the configuration that links it, and the one that fits its feature mapper, if it has one."""

    name: str
    directory: Path
    config: Path
    training: Path | None = None

    @property
    def settings(self) -> LinkConfig:
        """The linking run of its dev split."""
        return replace(load_config(LinkConfig, self.config), input=str(self.directory / "dev.parquet"))


def main(wikidiverse: tyro.conf.Positional[Path]) -> None:
    """Link what is not linked yet, then fit and judge.

    Args:
        wikidiverse: Directory of that corpus.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    for corpus in (
        Corpus("wikidiverse", wikidiverse, Path("build/wikidiverse/link.toml")),
        Corpus("emoji", Path("examples/emoji"), Path("examples/emoji/link.toml"), Path("jobs/configs/emoji.toml")),
    ):
        whole, reduced = WORK / f"{corpus.name}_whole", WORK / f"{corpus.name}_reduced"
        if "expected_calibration_error" not in noted_results().get(corpus.name, {}):
            link(corpus, whole)
            note(corpus, judged(whole))
        if "nil_auc" not in noted_results().get(corpus.name, {}):
            link(corpus, reduced, *without_entities(corpus, reduced))
            note(corpus, nil_found(reduced))


def noted_results() -> dict[str, Any]:
    """What was measured before."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def note(corpus: Corpus, found: dict[str, Any]) -> None:
    """Write results of a corpus."""
    results = noted_results()
    results[corpus.name] = results.get(corpus.name, {}) | found
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    for name, result in found.items():
        logger.info("%s %s: %s", corpus.name, name, result["value"])


def link(corpus: Corpus, directory: Path, *overrides: str) -> None:
    """Run the linking job, unless it has finished."""
    if (directory / "linked/_report.json").exists():
        return
    arguments = ("--input", corpus.settings.input, "--output", f"{directory}/linked", *overrides)
    run("jobs/link_corpus.py", str(corpus.config), *arguments)


def without_entities(corpus: Corpus, directory: Path) -> list[str]:
    """Build a knowledge base without a fifth of the entities, and demonstrations and a mapper without their mentions.

    Returns:
        Settings of the linking job.
    """
    artifacts = ["--knowledge-base", f"{directory}/kb", "--demonstrations", f"{directory}/demonstrations"]
    mapper = f"{directory}/training/feature_mapper"
    linking = [*artifacts, *(("--vision.feature-mapper", mapper) if corpus.training else ())]
    if (directory / "made").exists():
        return linking
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    entities = pq.read_table(corpus.directory / "entities.parquet")
    ids = sorted(entities["entity_id"].to_pylist())
    kept = pa.array(random.Random(SEED).sample(ids, round(len(ids) * (1 - REMOVED_SHARE))))
    pq.write_table(entities.filter(pc.is_in(entities["entity_id"], kept)), directory / "entities.parquet")
    train = pq.read_table(corpus.directory / "train.parquet")
    pq.write_table(train.filter(pc.is_in(train["entity_id"], kept)), directory / "train.parquet")
    settings, entities_path = corpus.settings, f"{directory}/entities.parquet"
    model = settings.language_model.name
    run(
        "-m",
        "gemel_engine.cli.main",
        "build-kb",
        entities_path,
        f"{directory}/kb",
        "--tokenizer",
        model,
        "--no-evidence",
    )
    encoders = ["--mention-encoder", str(settings.retrieval.mention_encoder)]
    if settings.vision.image_encoder is not None:
        encoders += ["--image-encoder", settings.vision.image_encoder]
    train_path, index = f"{directory}/train.parquet", f"{directory}/demonstrations"
    run("-m", "gemel_engine.cli.main", "build-demonstrations", train_path, entities_path, index, *encoders)
    if corpus.training is not None:
        places = ["--train", train_path, "--output", f"{directory}/training", "--examples", f"{directory}/examples"]
        run("jobs/train.py", str(corpus.training), *places, *artifacts, "--validation.num-mentions", "0")
    (directory / "made").touch()
    return linking


def judged(directory: Path) -> dict[str, Any]:
    """Calibration of each half fitted on the other, beside the raw score and a constant."""
    predictions, is_right, is_nil, forms, halves = outcomes(directory)
    scoring = scoring_settings(LinkedRun.open(f"{directory}/linked").settings)
    evidence = evidence_of(predictions, forms.tolist())
    calibrated, constant = np.empty(len(halves)), np.empty(len(halves))
    for half in (halves, ~halves):
        fitted = fit_calibration(
            predictions.filter(half), forms[half].tolist(), is_right[half], is_nil[half], scoring=scoring
        )
        calibrated[~half], constant[~half] = fitted.right(evidence[~half]), is_right[half].mean()
    scores = {"": calibrated, "raw_": np.array(predictions["probability"])}
    what = f"{len(halves)} mentions of dev; each half of the surface forms judged by what was fitted on the other"
    results = {"accuracy": noted(float(is_right.mean()), what)}
    for prefix, score in scores.items():
        found = quality(score, is_right)
        for name in ("expected_calibration_error", "brier_score"):
            results[f"{prefix}{name}"] = noted(getattr(found, name), what)
        # Risk and coverage are of an order, and only one calibration's probabilities have one.
        areas = [quality(score[half], is_right[half]).area_under_risk_coverage for half in (halves, ~halves)]
        results[f"{prefix}area_under_risk_coverage"] = noted(float(np.mean(areas)), f"{what}; mean of both halves")
    results["constant_brier_score"] = noted(float(np.mean((constant - is_right) ** 2)), what)
    # All ties: whichever is answered first, the risk expected is the error rate.
    results["constant_area_under_risk_coverage"] = noted(float(1 - is_right.mean()), what)
    return results


def nil_found(directory: Path) -> dict[str, Any]:
    """How well mentions of removed entities are told, each half by what was fitted on the other."""
    predictions, is_right, is_nil, forms, halves = outcomes(directory)
    scoring = scoring_settings(LinkedRun.open(f"{directory}/linked").settings)
    evidence, confidence, nil = evidence_of(predictions, forms.tolist()), np.empty(len(halves)), np.empty(len(halves))
    called = np.empty(len(halves), bool)
    for half in (halves, ~halves):
        fitted = fit_calibration(
            predictions.filter(half),
            forms[half].tolist(),
            is_right[half],
            is_nil[half],
            scoring=scoring,
            nil_precision=NIL_PRECISION,
        )
        assert fitted.nil is not None, "a fifth of the entities was removed"
        assert fitted.nil_threshold is not None, "fitted with it"
        confidence[~half], nil[~half] = fitted.right(evidence[~half]), fitted.nil(evidence[~half])
        called[~half] = nil[~half] >= fitted.nil_threshold
    what = (
        f"{REMOVED_SHARE:.0%} of the entities removed; {len(halves)} mentions of dev, {is_nil.sum()} of them NIL; each "
        "half of the surface forms judged by what was fitted on the other"
    )
    calibration_error = quality(confidence, is_right).expected_calibration_error
    return {
        "nil_auc": noted(float(roc_auc_score(is_nil, nil)), what),
        "raw_nil_auc": noted(float(roc_auc_score(is_nil, 1 - np.array(predictions["probability"]))), what),
        "nil_precision": noted(
            float(is_nil[called].mean()) if called.any() else None, f"{what}; {NIL_PRECISION} wanted"
        ),
        "nil_recall": noted(float(called[is_nil].mean()), f"{what}; {NIL_PRECISION} wanted"),
        "expected_calibration_error_with_nil": noted(calibration_error, what),
    }


def outcomes(
    directory: Path,
) -> tuple[pa.Table, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.str_], NDArray[np.bool_]]:
    """Predictions, whether they are right, whether their mentions are NIL, their surface forms, and the first half."""
    linked = LinkedRun.open(f"{directory}/linked")
    gold = read_gold(linked.settings["input"])
    entities = entities_to_judge(linked.open_knowledge_base(), gold, [linked.predictions])
    predictions, is_right, is_nil = Judge(gold, entities=entities).outcomes(linked.predictions)
    usable = np.array(predictions["error"].is_null())
    predictions, is_right, is_nil = predictions.filter(usable), is_right[usable], is_nil[usable]
    distinct = sorted(set(gold["mention"].to_pylist()))
    first = random.Random(SEED).sample(distinct, len(distinct) // 2)
    forms = np.array(surface_forms(gold, predictions))
    return predictions, is_right, is_nil, forms, np.isin(forms, first)


def noted(value: object, what: str) -> dict[str, Any]:
    """A result with what made it."""
    return record(value, "python benchmarks/calibration.py WIKIDIVERSE", what)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

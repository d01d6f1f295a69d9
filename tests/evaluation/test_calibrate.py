"""What is learnt of answers: whether they are right, and whether the knowledge base lacks the entity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.preprocessing import StandardScaler
from support.trouble import edit_manifest

from gemel_engine.decoding.confidence import EVIDENCE, Calibration, evidence_of, scoring_settings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evaluation.answers import Answers
from gemel_engine.evaluation.calibrate import fit_calibration, fit_logistic, held_out
from gemel_engine.evaluation.gold import surface_forms
from gemel_engine.evaluation.quality import quality
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.types import Candidate, PoolEntity, Prediction

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)
SHARES = RNG.uniform(0.01, 0.99, 600)
IS_RIGHT = RNG.uniform(size=600) < SHARES**2  # overconfident
IS_NIL = ~IS_RIGHT & (RNG.uniform(size=600) < 0.5)
PREDICTIONS = [
    Prediction(
        str(row),
        entity_id="Q1",
        entity_name="a bear",
        log_prob=float(np.log(share)),
        decided_by="language_model",
        probability=float(share),
        unexplored_mass=float(1 - share),
        margin=None if row % 2 else 1.5,
        certified=True,
    )
    for row, share in enumerate(SHARES)
]
FORMS = [str(row) for row in range(600)]
SCORING = {
    "language_model": {"name": "models/lm"},
    "prompt": {"terminator": "newline"},
    "retrieval": {"num_demonstrations": 8, "mention_encoder": "models/encoder"},
    "search": {"objective": "sum", "width": 4},
}
WEIGHTS = ScoreWeights(features={"form_prior": 1.0}, language_model=0.5, risks=((0.5, 0.1),), fitted_on={})


def answers(
    are_right: np.ndarray = IS_RIGHT, are_nil: np.ndarray | None = None, forms: list[str] | None = None
) -> Answers:
    """The predictions as answers; those that are wrong are of another entity."""
    are_nil = np.zeros(len(are_right), bool) if are_nil is None else are_nil
    gold = ["Q1" if right else None if nil else "Q2" for right, nil in zip(are_right, are_nil, strict=True)]
    number = len(are_right)
    return Answers(PREDICTIONS[:number], (forms or FORMS)[:number], gold, np.ones(number, bool))


def fitted(found: Answers, nil_precision: float = 0.4, weights: ScoreWeights | None = None) -> Calibration:
    contents = {"knowledge_base": "0" * 64}
    return fit_calibration(found, found, weights, nil_precision, scoring=scoring_settings(SCORING), contents=contents)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fitted(answers(are_nil=IS_NIL), weights=WEIGHTS)


def test_evidence_is_read_from_the_rows() -> None:
    shown = ("Q2", "Q1", "Q2", "Q1")
    ids = ("a", "b", "c", "d")
    rows = [
        replace(PREDICTIONS[0], probability=0.5, log_prob=-2.0, unexplored_mass=0.0, margin=None),
        replace(PREDICTIONS[2], demonstration_ids=ids, demonstration_entity_ids=shown),
        replace(
            PREDICTIONS[2],
            demonstration_ids=("card:Q1", *ids, "card:Q3"),
            demonstration_entity_ids=("Q1", *shown, "Q3"),
        ),
        replace(PREDICTIONS[2], demonstration_ids=("card:Q1",), demonstration_entity_ids=("Q1",)),
        Prediction(
            "e",
            entity_id="Q1",
            entity_name="a bear",
            decided_by="evidence",
            confidence=0.5,
            margin=2.0,
            candidates=(Candidate("Q1", "a bear", None, 3.0),),
            pool=(PoolEntity("Q1", 1.0, {"form": 0.9}),),
        ),
    ]
    evidence = evidence_of(rows, ["A BEAR", "bee", "bee", "bee", "a bear"])
    columns = {name: evidence[:, place] for place, name in enumerate(EVIDENCE)}
    assert evidence[0, :8] == pytest.approx([1.0, 0.0, -2.0, np.log(1e-9), 0.0, 0.0, np.log(6), 1.0])
    assert not evidence[0, 8:].any()
    assert evidence[1, 4:6] == pytest.approx([1.5, 1.0])
    assert evidence[1, 7:12] == pytest.approx([2 * 2 / 9, 0.5, 1.0, 1.0, 0.5])
    assert evidence[2].tolist() == evidence[1].tolist()
    assert evidence[3, 8:12].tolist() == [0.0] * 4
    assert columns["is_asked"].tolist() == [1.0] * 4 + [0.0]
    assert columns["bonus"].tolist() == [0.0] * 4 + [3.0]
    assert columns["answer_form_prior"][4] == pytest.approx(np.log(10))
    assert columns["logit_certainty"][4] == pytest.approx(0.0)
    assert evidence_of([], []).shape == (0, len(EVIDENCE))


def test_the_model_is_scikit_learns() -> None:
    evidence = evidence_of(PREDICTIONS, FORMS)
    standardised = StandardScaler().fit_transform(evidence)
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(standardised, IS_RIGHT).predict_proba(standardised)[:, 1]
    assert fit_logistic(evidence, IS_RIGHT, 0.3)(evidence) == pytest.approx(expected, abs=1e-6)


def test_evidence_that_says_nothing_is_kept_from_having_a_say() -> None:
    is_right = RNG.uniform(size=100) < 0.5
    evidence = evidence_of(PREDICTIONS[:100], FORMS[:100])
    found = fitted(answers(is_right))
    assert found.right(evidence).std() < fit_logistic(evidence, is_right, 1.0)(evidence).std() / 2


def test_fitted_probabilities_are_calibrated_where_raw_ones_are_not(calibration: Calibration) -> None:
    shares = RNG.uniform(0.01, 0.99, 4000)
    is_right = RNG.uniform(size=4000) < shares**2
    fresh = [
        replace(PREDICTIONS[0], probability=float(p), log_prob=float(np.log(p)), unexplored_mass=float(1 - p))
        for p in shares
    ]
    confidence = np.array([prediction.confidence for prediction in calibration.apply(fresh, FORMS[:1] * 4000)])
    raw, found = quality(shares, is_right), quality(confidence, is_right)
    assert raw.expected_calibration_error > 0.1
    assert found.expected_calibration_error < 0.05
    assert found.brier_score == pytest.approx(brier_score_loss(is_right, confidence))


def test_quality_is_what_one_counts_by_hand() -> None:
    confidence, is_right = np.array([0.9, 0.8, 0.4, 0.1]), np.array([True, False, True, False])
    found = quality(confidence, is_right)
    assert found.expected_calibration_error == pytest.approx((0.1 + 0.8 + 0.6 + 0.1) / 4)
    assert found.area_under_risk_coverage == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert found.risk_coverage[-1] == (1.0, 0.5)
    assert [n for _, _, n in found.reliability] == [1, 1, 1, 1]


def test_rows_with_an_error_stay_as_they_are(calibration: Calibration) -> None:
    broken = Prediction("x", error="image: broken")
    first, second, third = calibration.apply([PREDICTIONS[0], broken, PREDICTIONS[1]], FORMS[:3])
    assert second == broken
    assert first.confidence is not None
    assert third.nil_probability is not None
    assert third.is_nil == (third.nil_probability >= (calibration.nil_threshold or 0))
    assert calibration.apply([], []) == []


def test_nil_has_the_precision_that_was_asked_for(calibration: Calibration, caplog: pytest.LogCaptureFixture) -> None:
    assert calibration.fitted_on["nil_precision"] >= 0.4
    assert calibration.fitted_on["nil_held_out"] == 0
    called = np.array([bool(prediction.is_nil) for prediction in calibration.apply(PREDICTIONS, FORMS)])
    assert IS_NIL[called].mean() == pytest.approx(0.4, abs=0.05)
    unreached = fitted(answers(are_nil=IS_NIL), 1.0)
    assert "fit again with a lower one" in caplog.text
    assert (unreached.nil_threshold, unreached.fitted_on.get("nil_precision")) == (None, None)
    found = unreached.apply(PREDICTIONS[:1], FORMS[:1])[0]
    assert (found.is_nil, found.nil_probability is None) == (None, False)
    without = fitted(answers())
    assert without.nil is None
    assert without.apply(PREDICTIONS[:1], FORMS[:1])[0].is_nil is None


def test_nil_is_learnt_from_answers_of_its_own() -> None:
    whole = answers()
    of_nil = replace(whole, gold=[None if nil else gold for nil, gold in zip(IS_NIL, whole.gold, strict=True)])
    found = fit_calibration(whole, of_nil, None, 0.4, scoring=scoring_settings(SCORING), contents={})
    assert found.nil is not None
    assert found.fitted_on["nil_held_out"] == 1
    assert found.fitted_on["num_nil"] == IS_NIL.sum()
    assert roc_auc_score(IS_NIL, found.nil(evidence_of(PREDICTIONS, FORMS))) > 0.6


def test_a_fifth_of_the_surface_forms_is_held_out() -> None:
    found = held_out([*FORMS, *FORMS])
    assert len(found) == 120
    assert found == held_out(FORMS[::-1])


def test_a_mention_that_the_input_has_lost_is_named() -> None:
    gold = pa.table({"mention_id": ["m0", "m1"], "mention": ["Paris", None]})
    assert surface_forms(gold, pa.table({"mention_id": ["m0"]})) == ["Paris"]
    with pytest.raises(InputError, match="the input of the run no longer has mention 'm1'"):
        surface_forms(gold, pa.table({"mention_id": ["m0", "m1"]}))


def test_only_final_answers_are_judged() -> None:
    double = answers()
    twice = Answers(
        double.predictions * 2, double.forms * 2, double.gold * 2, np.repeat([False, True], len(double.gold))
    )
    assert fitted(twice).fitted_on["num_mentions"] == 600


def test_it_comes_back_from_disk(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path)
    assert Calibration.open(tmp_path) == calibration


@pytest.mark.parametrize(
    ("found", "damaged"),
    [('"scale": ', '"scale": 0.0, "s": '), ('"bias": ', '"bias": NaN, "b": '), ('"right"', '"left"'), ("{", "[")],
)
def test_damaged_files_are_refused_by_name(calibration: Calibration, tmp_path: Path, found: str, damaged: str) -> None:
    calibration.save(tmp_path)
    path = tmp_path / "calibration.json"
    path.write_text(path.read_text().replace(found, damaged, 1))
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        Calibration.open(tmp_path)


def test_a_changed_weight_is_refused(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path)
    path = tmp_path / "calibration.json"
    manifest = json.loads(path.read_text())
    manifest["right"]["terms"]["log_prob"]["weight"] += 0.1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has been changed since it was written"):
        Calibration.open(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"scoring": {}},
        {"scoring": {"search": {"objective": "sum"}}},
        {"scoring": {"search": 1}},
        {"nil_threshold": float("nan")},
        {"nil_threshold": 2.0},
        {"nil": None},
        {"fitted_on": {"accuracy": float("nan")}},
        {"right": None},
        {"right": {"terms": {"a new one": {"mean": 0.0, "scale": 1.0, "weight": 1.0}}, "bias": 0.0}},
        {"weights": {"features": {"a new one": 1.0}, "language_model": 1.0, "risks": [], "fitted_on": {}}},
        {"self": 1},
        {"format_version": 3},
    ],
)
def test_values_that_no_fit_gives_are_refused(
    calibration: Calibration, tmp_path: Path, changes: dict[str, object]
) -> None:
    calibration.save(tmp_path)
    edit_manifest(tmp_path / "calibration.json", changes)
    with pytest.raises(ArtifactError, match=r"calibration\.json"):
        Calibration.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 1e-300), ("scale", -1.0), ("scale", 1e300), ("weight", 1e300), ("mean", float("inf")), ("mean", "1")],
)
def test_numbers_out_of_range_are_refused(calibration: Calibration, tmp_path: Path, name: str, value: object) -> None:
    calibration.save(tmp_path)
    right = json.loads((tmp_path / "calibration.json").read_text())["right"]
    right["terms"]["log_prob"][name] = value
    edit_manifest(tmp_path / "calibration.json", {"right": right})
    with pytest.raises(ArtifactError, match=rf"right\.terms\.log_prob\.{name}"):
        Calibration.open(tmp_path)


def test_evidence_that_varies_by_rounding_alone_has_no_say() -> None:
    evidence = RNG.normal(size=(200, len(EVIDENCE)))
    evidence[:, 3] = 0.1 + 1e-17 * RNG.normal(size=200)
    found = fit_logistic(evidence, evidence[:, 0] > 0, 1.0)
    assert EVIDENCE[3] not in found.terms


def test_another_search_needs_another_calibration(calibration: Calibration) -> None:
    calibration.check_scoring(SCORING | {"language_model": {"name": "elsewhere/lm"}, "search": {"objective": "sum"}})
    with pytest.raises(ConfigurationError, match=r"search\.objective"):
        calibration.check_scoring(SCORING | {"search": {"objective": "mean"}})
    with pytest.raises(ConfigurationError, match=r"score\.kind"):
        calibration.check_scoring(SCORING | {"score": {"kind": "combined"}})


def test_mentions_of_one_surface_form_are_left_out_together() -> None:
    together = fitted(answers(forms=[str(row % 7) for row in range(600)]))
    assert together.fitted_on["brier_score"] != fitted(answers()).fitted_on["brier_score"]
    with pytest.raises(InputError, match="of one outcome are of too few surface forms"):
        fitted(answers(forms=[str(right) for right in IS_RIGHT]))


def test_too_few_outcomes_are_refused() -> None:
    with pytest.raises(InputError, match="0 of 30 answers are right"):
        fitted(answers(np.zeros(30, bool)))

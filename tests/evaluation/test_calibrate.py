import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.preprocessing import StandardScaler
from support.trouble import edit_manifest

from gemel_engine.decoding.confidence import EVIDENCE, Calibration, evidence_of, scoring_settings
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evaluation.calibrate import fit_calibration, fit_logistic
from gemel_engine.evaluation.quality import quality
from gemel_engine.types import Prediction, predictions_to_table

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


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return fit_calibration(
        predictions_to_table(PREDICTIONS), FORMS, IS_RIGHT, IS_NIL, scoring=scoring_settings(SCORING), nil_precision=0.4
    )


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
    ]
    evidence = evidence_of(predictions_to_table(rows), ["A BEAR", "bee", "bee", "bee"])
    assert evidence[0] == pytest.approx([0.0, -2.0, np.log(1e-9), 0.0, 0.0, np.log(6), 0.0, 0.0, 0.0, 0.0, 1.0])
    assert evidence[1, 3:5] == pytest.approx([1.5, 1.0])
    assert evidence[1, 6:] == pytest.approx([0.5, 1.0, 1.0, 0.5, 2 * 2 / 9])
    assert evidence[2].tolist() == evidence[1].tolist()
    assert evidence[3, 6:10].tolist() == [0.0] * 4
    assert evidence_of(predictions_to_table([]), []).shape == (0, len(EVIDENCE))


def test_the_model_is_scikit_learns() -> None:
    evidence = evidence_of(predictions_to_table(PREDICTIONS), FORMS)
    standardised = StandardScaler().fit_transform(evidence)
    expected = LogisticRegression(C=0.3, max_iter=1000).fit(standardised, IS_RIGHT).predict_proba(standardised)[:, 1]
    assert fit_logistic(evidence, IS_RIGHT, 0.3)(evidence) == pytest.approx(expected, abs=1e-6)


def test_evidence_that_says_nothing_is_kept_from_having_a_say() -> None:
    table, is_right = predictions_to_table(PREDICTIONS[:100]), RNG.uniform(size=100) < 0.5
    evidence = evidence_of(table, FORMS[:100])
    fitted = fit_calibration(table, FORMS[:100], is_right, np.zeros(100, bool), scoring=scoring_settings(SCORING))
    assert fitted.right(evidence).std() < fit_logistic(evidence, is_right, 1.0)(evidence).std() / 2


def test_fitted_probabilities_are_calibrated_where_raw_ones_are_not(calibration: Calibration) -> None:
    shares = RNG.uniform(0.01, 0.99, 4000)
    is_right = RNG.uniform(size=4000) < shares**2
    fresh = [
        replace(PREDICTIONS[0], probability=float(p), log_prob=float(np.log(p)), unexplored_mass=float(1 - p))
        for p in shares
    ]
    confidence = np.array([prediction.confidence for prediction in calibration.apply(fresh, FORMS[:1] * 4000)])
    raw, fitted = quality(shares, is_right), quality(confidence, is_right)
    assert raw.expected_calibration_error > 0.1
    assert fitted.expected_calibration_error < 0.05
    assert fitted.brier_score == pytest.approx(brier_score_loss(is_right, confidence))


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


def test_nil_has_the_precision_that_was_asked_for(calibration: Calibration) -> None:
    assert calibration.fitted_on["nil_precision"] >= 0.4
    called = np.array([bool(prediction.is_nil) for prediction in calibration.apply(PREDICTIONS, FORMS)])
    assert IS_NIL[called].mean() == pytest.approx(0.4, abs=0.05)
    with pytest.raises(ConfigurationError, match="ask for less"):
        fit_calibration(
            predictions_to_table(PREDICTIONS),
            FORMS,
            IS_RIGHT,
            IS_NIL,
            scoring=scoring_settings(SCORING),
            nil_precision=1.0,
        )
    without = fit_calibration(
        predictions_to_table(PREDICTIONS), FORMS, IS_RIGHT, np.zeros(600, bool), scoring=scoring_settings(SCORING)
    )
    assert without.nil is None
    assert without.apply(PREDICTIONS[:1], FORMS[:1])[0].is_nil is None


def test_it_comes_back_from_disk(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path)
    assert Calibration.open(tmp_path) == calibration


@pytest.mark.parametrize(
    ("found", "damaged"),
    [('"scale": [', '"scale": [0.0, '), ('"bias": ', '"bias": NaN, "b": '), ('"right"', '"left"'), ("{", "[")],
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
    manifest["right"]["weights"][0] += 0.1
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="has been changed since it was written"):
        Calibration.open(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"scoring": {}},
        {"scoring": {"search": {"objective": "sum"}}},
        {"scoring": {"search": 1}},
        {"nil_threshold": None},
        {"nil_threshold": float("nan")},
        {"nil_threshold": 2.0},
        {"nil": None},
        {"fitted_on": {"accuracy": float("nan")}},
        {"right": None},
        {"self": 1},
        {"format_version": 2},
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
    [("scale", 1e-300), ("scale", -1.0), ("scale", 1e300), ("weights", 1e300), ("mean", float("inf")), ("mean", "1")],
)
def test_numbers_out_of_range_are_refused(calibration: Calibration, tmp_path: Path, name: str, value: object) -> None:
    calibration.save(tmp_path)
    right = json.loads((tmp_path / "calibration.json").read_text())["right"]
    edit_manifest(tmp_path / "calibration.json", {"right": right | {name: [value, *right[name][1:]]}})
    with pytest.raises(ArtifactError, match=rf"right\.{name}\.0"):
        Calibration.open(tmp_path)


def test_evidence_that_varies_by_rounding_alone_has_no_say() -> None:
    evidence = RNG.normal(size=(200, len(EVIDENCE)))
    evidence[:, 3] = 0.1 + 1e-17 * RNG.normal(size=200)
    fitted = fit_logistic(evidence, evidence[:, 0] > 0, 1.0)
    assert fitted.scale[3] == 1.0


def test_another_search_needs_another_calibration() -> None:
    table = predictions_to_table(PREDICTIONS)
    fitted = fit_calibration(table, FORMS, IS_RIGHT, IS_NIL, scoring=scoring_settings(SCORING), nil_precision=0.4)
    fitted.check_scoring(SCORING | {"language_model": {"name": "elsewhere/lm"}, "search": {"objective": "sum"}})
    with pytest.raises(ConfigurationError, match=r"search\.objective"):
        fitted.check_scoring(SCORING | {"search": {"objective": "mean"}})


def test_mentions_of_one_surface_form_are_left_out_together() -> None:
    table, forms = predictions_to_table(PREDICTIONS), [str(row % 7) for row in range(600)]
    fitted = fit_calibration(table, forms, IS_RIGHT, np.zeros(600, bool), scoring=scoring_settings(SCORING))
    alone = fit_calibration(table, FORMS, IS_RIGHT, np.zeros(600, bool), scoring=scoring_settings(SCORING))
    assert fitted.fitted_on["brier_score"] != alone.fitted_on["brier_score"]
    with pytest.raises(InputError, match="of one outcome are of too few surface forms"):
        fit_calibration(
            table, [str(right) for right in IS_RIGHT], IS_RIGHT, np.zeros(600, bool), scoring=scoring_settings(SCORING)
        )


def test_too_few_outcomes_are_refused() -> None:
    rows = pa.concat_tables([predictions_to_table(PREDICTIONS[:30])])
    with pytest.raises(InputError, match="0 of 30 answers are right"):
        fit_calibration(rows, FORMS[:30], np.zeros(30, bool), np.zeros(30, bool), scoring=scoring_settings(SCORING))

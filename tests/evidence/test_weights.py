"""The weights of the score, and the features that they weigh."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemel_engine.errors import ArtifactError
from gemel_engine.evidence.features import FEATURES, features_of
from gemel_engine.evidence.weights import MANIFEST, ScoreWeights, softmax

pytestmark = pytest.mark.unit

WEIGHTS = ScoreWeights(
    features={"form_prior": 1.0, "likeness": 2.0},
    language_model=0.5,
    risks=((0.2, 0.3), (0.5, 0.1), (0.9, 0.02), (0.95, 0.03), (0.99, 0.0)),
    fitted_on={"corpus": "none"},
)


def test_a_candidate_of_which_nothing_is_known_has_no_bonus() -> None:
    features = features_of("Paris", ["Quux"], [{}])
    assert features.shape == (1, len(FEATURES))
    assert not features.any()
    assert features_of("Paris", [], []).shape == (0, len(FEATURES))


def test_each_reason_makes_its_feature_larger() -> None:
    reasons = {"form": 3.0, "alias": 1.0, "base_name": 1.0, "initials": 1.0, "similar_name": 0.9, "text_name": 0.4}
    reasons |= {
        "description": 0.5,
        "context": 5.0,
        "words": 2.0,
        "in_text": 1.0,
        "popularity": 10.0,
        "frequency": 4.0,
        "picture": 0.7,
        "training_picture": 0.6,
    }
    reasons |= {"similar_form": 0.8, "name": 1.0}
    known, unknown = features_of("Paris", ["Paris (city)", "Quux"], [reasons, {}])
    assert (np.delete(known - unknown, FEATURES.index("unseen_entity")) > 0).all()
    likeness = FEATURES.index("likeness")
    assert known[likeness] == 0.5  # equal, of a form with three training mentions


def test_what_form_and_name_share_counts_less_the_more_training_mentions_the_form_has() -> None:
    reasons = {"alias": 1.0, "base_name": 1.0, "initials": 1.0, "similar_name": 0.9, "text_name": 0.4, "picture": 0.7}
    (before,) = features_of("Paris", ["Paris"], [reasons])
    after, _ = features_of("Paris", ["Paris", "Quux"], [reasons, {"form": 3.0}])
    unchanged = [FEATURES.index(name) for name in ("similar_text", "picture")]
    assert after[unchanged].tolist() == before[unchanged].tolist()
    shared = slice(FEATURES.index("equal_name"), FEATURES.index("similar_name") + 1)
    assert after[shared] == pytest.approx(before[shared] / 2)


def test_an_entity_without_training_mentions_gets_back_what_those_of_the_form_give_others() -> None:
    reasons: list[dict[str, float]] = [{"form": 3.0, "frequency": 5.0}, {"frequency": 2.0}, {}]
    features = features_of("Paris", ["Paris", "Paris, Texas", "Paris (Finland)"], reasons)
    assert features[:, FEATURES.index("unseen_entity")].tolist() == [
        0.0,
        0.0,
        pytest.approx(features[0, FEATURES.index("form_prior")] * 2 / 3),  # two of three have training mentions
    ]
    unknown_form = features_of("Paris", ["Paris", "Lyon"], [{"frequency": 1.0}, {}])
    assert not unknown_form[:, FEATURES.index("unseen_entity")].any()


def test_among_many_names_without_training_mentions_an_unseen_entity_gets_little_back() -> None:
    reasons = [{"form": 3.0, "frequency": 5.0}, *[{} for _ in range(9)]]
    features = features_of("Paris", ["Paris", *["Paris, Texas"] * 9], reasons)
    assert features[1, FEATURES.index("unseen_entity")] == pytest.approx(features[0, FEATURES.index("form_prior")] / 10)


def test_an_equal_name_is_worth_as_much_as_an_equal_alias() -> None:
    of_name, of_alias = features_of("Paris", ["Lutetia", "Lutetia"], [{"name": 1.0}, {"alias": 1.0}])
    assert of_name.tolist() == of_alias.tolist()
    assert of_name.any()


def test_a_bonus_is_the_weighted_sum_of_features() -> None:
    bonuses = WEIGHTS.bonuses("Paris", ["Paris", "Lyon"], [{"form": 0.9}, {}])
    assert bonuses[0] == pytest.approx(np.log(10) + 2.0 / np.sqrt(1.9))
    assert bonuses[0] > bonuses[1]
    assert softmax(bonuses).sum() == pytest.approx(1.0)


def test_the_threshold_keeps_the_risk_at_all_higher_probabilities() -> None:
    assert WEIGHTS.threshold(0.1) == 0.5
    assert WEIGHTS.threshold(0.03) == 0.9
    assert WEIGHTS.threshold(0.025) == 0.99  # 0.95 has a larger risk, though 0.9 has a smaller one
    assert WEIGHTS.threshold(1.0) == 0.2
    assert ScoreWeights(features={}, language_model=1.0, risks=((0.9, 0.1),), fitted_on={}).threshold(0.05) is None


def test_weights_survive_their_directory_and_damage_is_refused(tmp_path: Path) -> None:
    WEIGHTS.save(tmp_path)
    assert ScoreWeights.open(tmp_path) == WEIGHTS
    stored = json.loads((tmp_path / MANIFEST).read_text())
    stored["language_model"] = -1.0
    (tmp_path / MANIFEST).write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match="has been changed"):
        ScoreWeights.open(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        ScoreWeights.open(tmp_path / "none")


@pytest.mark.parametrize(
    "changes",
    [
        {"features": {"luck": 1.0}},
        {"language_model": 0.0},
        {"features": {"likeness": float("nan")}},
        {"risks": ((0.9, 0.1), (0.5, 0.2))},
        {"risks": ((1.1, 0.1),)},
    ],
)
def test_impossible_weights_are_refused(changes: dict[str, object]) -> None:
    good: dict[str, object] = {"features": {}, "language_model": 1.0, "risks": (), "fitted_on": {}}
    with pytest.raises(ValueError, match=r"."):
        ScoreWeights(**(good | changes))  # type: ignore[arg-type]


def test_the_weights_of_the_package_favour_what_is_known() -> None:
    shipped = ScoreWeights.open()
    assert shipped.language_model > 0
    assert all(weight >= 0 for weight in shipped.features.values())
    assert shipped.features["form_prior"] > 0
    assert shipped.fitted_on

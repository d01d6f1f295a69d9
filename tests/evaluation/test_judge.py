import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import binom
from sklearn.metrics import accuracy_score

from gemel_engine.errors import InputError
from gemel_engine.evaluation.judge import Judge, Measured
from gemel_engine.evaluation.leaks import audit_leaks
from gemel_engine.evaluation.pool import are_in_pools
from gemel_engine.types import PREDICTION_SCHEMA, Candidate, Prediction, predictions_to_table

pytestmark = pytest.mark.unit

ENTITIES = pa.table(
    {
        "entity_id": ["Q1", "Q2", "Q3", "Q4"],
        "name": ["Paris", "Paris, Texas", "Paris", "Rome"],
        "popularity": [9.0, 2.0, 1.0, None],
    }
)
NAMES = dict(zip(ENTITIES["entity_id"].to_pylist(), ENTITIES["name"].to_pylist(), strict=True))


def run(**answers: list[str] | None) -> pa.Table:
    """Predictions with these candidates, the best first; None for an error."""
    return predictions_to_table(
        [
            Prediction(mention_id, error="image: broken")
            if ids is None
            else Prediction(
                mention_id,
                entity_id=ids[0],
                entity_name=NAMES[ids[0]],
                log_prob=-1.0,
                probability=0.5,
                unexplored_mass=0.1,
                certified=mention_id != "b",
                candidates=tuple(Candidate(entity_id, NAMES[entity_id], -1.0) for entity_id in ids),
            )
            for mention_id, ids in answers.items()
        ]
    )


def gold(**entity_ids: str | None) -> pa.Table:
    return pa.table(
        {
            "mention_id": list(entity_ids),
            "entity_id": pa.array(entity_ids.values(), pa.string()),
            "mention": ["Paris" if entity_id != "Q4" else "Eternal City" for entity_id in entity_ids.values()],
        }
    )


RUN = run(a=["Q1"], b=["Q2", "Q1"], c=["Q3", "Q4"], d=None, e=["Q4"], extra=["Q1"])
GOLD = gold(a="Q1", b="Q1", c="Q1", d="Q4", e="Q4", nil=None)


def test_accuracy_hits_and_ranks_are_those_counted_by_hand() -> None:
    found = Judge(GOLD, entities=ENTITIES).evaluate(RUN)
    assert (found.num_mentions, found.num_nil, found.num_errors, found.num_without_gold) == (5, 1, 1, 1)
    assert found.num_unknown == 0
    assert found.accuracy.value == pytest.approx(2 / 5)
    assert found.macro_accuracy.value == pytest.approx((1 / 3 + 1 / 2) / 2)  # of Q1 and Q4
    assert next(iter(found.buckets)) == "popularity of the entity"
    assert found.hits_at_5.value == pytest.approx(3 / 5)
    assert found.mean_reciprocal_rank.value == pytest.approx((1 + 1 / 2 + 0 + 0 + 1) / 5)
    assert found.certified_share.value == pytest.approx(3 / 5)  # neither b nor the error
    assert found.buckets["surface form"]["is the name"].value == pytest.approx(1 / 3)
    assert found.buckets["surface form"]["is another"].value == pytest.approx(1 / 2)
    assert found.buckets["popularity of the entity"]["unknown"].num_mentions == 2


def test_the_recall_of_pools_counts_ids_and_every_judged_mention() -> None:
    pools = {"b": ["Q3", "Q1"], "c": ["Q3"], "d": ["Q4"], "e": ["Q4", "Q4"], "extra": ["Q1"]}
    rows = [
        {**row, "pool": [{"entity_id": entity_id, "score": 1.0, "reasons": [("name", 1.0)]} for entity_id in pool]}
        for row in RUN.to_pylist()
        for pool in [pools.get(row["mention_id"], [])]
    ]
    table = pa.Table.from_pylist(rows, schema=RUN.schema)
    found = Judge(GOLD, entities=ENTITIES).evaluate(table).pool_recall
    assert found is not None
    assert found.value == pytest.approx(3 / 5)
    assert found.num_mentions == 5
    assert Judge(GOLD, entities=ENTITIES, protocol="name").evaluate(table).pool_recall == found
    assert Judge(GOLD).evaluate(pa.concat_tables([table.slice(0, 2), table.slice(2)])).pool_recall == found
    assert Judge(GOLD).evaluate(RUN).pool_recall is None
    assert Judge(GOLD).evaluate(RUN.drop_columns(["pool"])).pool_recall is None


def test_pools_may_have_more_text_than_one_array() -> None:
    pools = [[{"entity_id": "Q1", "score": 1.0}], [{"entity_id": "x" * (64 << 20), "score": 1.0}]]
    chunk = pa.table({"mention_id": ["a", "b"], "pool": pa.array(pools, PREDICTION_SCHEMA.field("pool").type)})
    found = are_in_pools(pa.concat_tables([chunk] * 33), ["b", "a"], ["Q1", "Q1"])
    assert found is not None
    assert found.tolist() == [False, True]


def test_names_and_candidates_are_protocols_of_their_own() -> None:
    assert Judge(GOLD, entities=ENTITIES, protocol="name").evaluate(RUN).accuracy.value == pytest.approx(3 / 5)
    with pytest.raises(InputError, match="needs the entities' names"):
        Judge(GOLD, protocol="name")
    with pytest.raises(InputError, match="needs candidate_ids"):
        Judge(GOLD, protocol="candidates")
    listed = GOLD.append_column("candidate_ids", pa.array([["Q1", "Q2"]] * 6))
    assert Judge(listed, protocol="candidates").evaluate(RUN).protocol == "candidates"
    with pytest.raises(InputError, match="mix two kinds"):
        Judge(listed)


def test_baseline_is_the_commonest_entity_or_the_one_of_that_name() -> None:
    train = pa.table({"mention": ["Eternal City"] * 3, "entity_id": ["Q1", "Q4", "Q4"]})
    found = Judge(GOLD, entities=ENTITIES, train=train).evaluate(RUN)
    assert found.baseline is not None
    assert found.baseline.value == 1.0  # Paris is the name of Q1, and the commonest Eternal City is Q4
    assert "entity in training" not in found.buckets  # since all are seen there
    assert found.buckets["surface form in training"]["never seen"].num_mentions == 3
    assert found.buckets["surface form in training"]["several entities"].num_mentions == 2


def test_a_gold_mention_without_a_prediction_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 gold mentions have no prediction, such as \['z'\]"):
        Judge(gold(a="Q1", z="Q1")).evaluate(RUN)
    found = Judge(gold(a="Q1", b="Q9", nil=None), entities=ENTITIES).evaluate(RUN)
    assert (found.num_mentions, found.num_nil, found.num_unknown) == (1, 2, 1)
    with pytest.raises(InputError, match="nothing to judge"):
        Judge(gold(a="Q9"), entities=ENTITIES).evaluate(RUN)
    with pytest.raises(InputError, match="no column entity_id"):
        Judge(GOLD.drop_columns(["entity_id"]))


def test_interval_is_that_of_resampled_mentions() -> None:
    outcomes = np.arange(200) % 4 == 0
    measured = Measured.of(outcomes)
    assert measured.value == pytest.approx(accuracy_score(np.ones(200, bool), outcomes))
    low, high = binom.ppf([0.025, 0.975], 200, 0.25) / 200  # n draws with replacement of a share are binomial
    assert measured.low == pytest.approx(low, abs=0.01)
    assert measured.high == pytest.approx(high, abs=0.01)


def test_every_labelled_mention_has_a_verdict() -> None:
    found = Judge(GOLD, entities=ENTITIES).verdicts(run(a=["Q1"], b=["Q2"], nil=["Q4"], extra=["Q1"]))
    assert found.to_pylist() == [
        {"mention_id": "a", "entity_id": "Q1", "entity_name": "Paris", "right": True},
        {"mention_id": "b", "entity_id": "Q1", "entity_name": "Paris", "right": False},
        {"mention_id": "nil", "entity_id": None, "entity_name": None, "right": None},
    ]


def test_two_runs_are_compared_mention_by_mention() -> None:
    judge = Judge(GOLD, entities=ENTITIES)
    better = run(a=["Q2"], b=["Q1"], c=["Q1"], d=["Q4"], e=["Q4"])
    found = judge.compare(RUN, better)
    assert (found.won, found.lost, found.num_changed) == (("b", "c", "d"), ("a",), 4)
    assert found.difference.value == pytest.approx(2 / 5)
    assert found.p_value == pytest.approx(2 * sum(binom.pmf([3, 4], 4, 0.5)))
    assert judge.compare(RUN, RUN).p_value == 1.0


def test_leaks_are_counted_by_what_is_shared() -> None:
    train = pa.table({"mention_id": ["1", "2"], "text": ["A dog.", "A cat."], "mention": ["dog", "cat"]})
    test = pa.table(
        {"mention_id": ["2", "3", "4"], "text": ["A dog.", "A dog.", "A cow."], "mention": ["dog", "A", "cow"]}
    )
    found = audit_leaks(train, test)
    assert (found.num_mentions, found.mention_ids, found.texts, found.mentions_in_texts) == (3, 1, 2, 1)
    assert found.pictures is None
    train = train.append_column("image_uri", pa.array(["x.png", None]))
    test = test.append_column("image_uri", pa.array(["x.png", None, "y.png"]))
    assert audit_leaks(train, test).pictures == 1


def test_a_mention_with_two_gold_rows_is_refused() -> None:
    with pytest.raises(InputError, match="1 gold rows repeat a mention_id, such as 'a': remove them"):
        Judge(pa.table({"mention_id": ["a", "b", "a"], "entity_id": ["Q1", "Q2", "Q2"]}))

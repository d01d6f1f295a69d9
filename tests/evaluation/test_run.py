"""A finished output as it lies on disk, written by the parts of the job that write it."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.names import ENTITY_NAMES
from support.tables import damage

from gemel_engine import storage
from gemel_engine.cli.main import main
from gemel_engine.cli.tables import as_table
from gemel_engine.decoding.confidence import Calibration
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError
from gemel_engine.evaluation.calibrate import calibrate_run
from gemel_engine.evaluation.gold import read_gold
from gemel_engine.evaluation.run import LinkedRun, judge_run
from gemel_engine.evaluation.spans import has_places_alone
from gemel_engine.knowledge_base.store import MANIFEST
from gemel_engine.pipeline.output import claim_output
from gemel_engine.report.page import report_of
from gemel_engine.retrieval.index import MANIFEST as INDEX_MANIFEST
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import PREDICTION_SCHEMA, Candidate, Prediction, predictions_to_table

NUM_MENTIONS = 200
RNG = np.random.default_rng(0)
SHARES = RNG.uniform(0.05, 0.95, NUM_MENTIONS)
IS_RIGHT = RNG.uniform(size=NUM_MENTIONS) < SHARES


@pytest.fixture
def output(tmp_path: Path, artifacts: dict[str, Path]) -> str:
    """A run that knows `m0` to `m199`; the gold entities of some are right, of others wrong, of others unknown."""
    gold_ids = [f"Q{n % 20}" if right else f"Q{20 + n % 8}" for n, right in enumerate(IS_RIGHT)]
    gold_ids[:30] = ["unheard of"] * 30
    mentions = {
        "mention_id": [f"m{n}" for n in range(NUM_MENTIONS)],
        "text": [f"Look at the {ENTITY_NAMES[n % 20]}." for n in range(NUM_MENTIONS)],
        "mention": [ENTITY_NAMES[n % 20] for n in range(NUM_MENTIONS)],
        "entity_id": gold_ids,
        "image_bytes": [b"picture" if n % 3 else None for n in range(NUM_MENTIONS)],
    }
    pq.write_table(pa.table(mentions), tmp_path / "mentions.parquet")
    settings = {
        "input": str(tmp_path / "mentions.parquet"),
        "knowledge_base": str(artifacts["knowledge_base"]),
        "demonstrations": None,
        "image_source": {},
        "language_model": {"name": "models/lm"},
        "prompt": {"terminator": "newline"},
        "retrieval": {"num_demonstrations": 2, "mention_encoder": "models/encoder"},
        "search": {"objective": "sum", "width": 4},
    }
    predictions = [
        Prediction(
            f"m{n}",
            entity_id=f"Q{n % 20}",
            entity_name=ENTITY_NAMES[n % 20],
            log_prob=float(np.log(share)),
            probability=float(share),
            unexplored_mass=float(1 - share),
            certified=True,
            candidates=(Candidate(f"Q{n % 20}", ENTITY_NAMES[n % 20], float(np.log(share))),),
        )
        for n, share in enumerate(SHARES)
    ]
    predictions[NUM_MENTIONS - 1] = Prediction(f"m{NUM_MENTIONS - 1}", error="image: broken")
    directory = str(tmp_path / "linked")
    claim_output(directory, {"settings": settings})
    for number, rows in enumerate((predictions[:150], predictions[150:])):
        data = parquet_bytes(predictions_to_table(rows))
        storage.write_bytes(f"{directory}/data/shard-{number:05d}.parquet", data)
    storage.write_bytes(
        f"{directory}/_report.json", json.dumps({"rows": NUM_MENTIONS, "feature_mapper": "none"}).encode()
    )
    return directory


def test_a_run_is_judged_by_the_labels_of_its_input(output: str) -> None:
    judged = judge_run(LinkedRun.open(output))
    evaluation = judged.evaluation
    assert (evaluation.num_mentions, evaluation.num_nil, evaluation.num_errors) == (170, 30, 1)
    assert evaluation.accuracy.value == pytest.approx(IS_RIGHT[30:-1].sum() / 170)
    assert {"with", "without"} == set(evaluation.buckets["picture"])
    assert set(judged.confidence) == {"probability"}
    reliability = judged.confidence["probability"].reliability
    assert sum(number for _, _, number in reliability) == NUM_MENTIONS - 1
    num_right = sum(accuracy * number for _, accuracy, number in reliability)
    assert num_right == pytest.approx(IS_RIGHT[30:-1].sum())  # answers to the 30 without a known entity are wrong
    assert judged.knowledge_base_names == len(set(ENTITY_NAMES))
    assert json.loads(judged.to_json())["evaluation"]["num_mentions"] == 170
    table = as_table(judged)
    printed = dict(zip(table.columns[0].cells, table.columns[3].cells, strict=True))
    assert printed["wrong, since they ended in an error"] == "1"
    assert printed["not judged: no entity of the knowledge base"] == "30"
    assert "not judged: no gold row" not in printed


def test_a_report_shows_a_run_with_and_without_judgement(output: str) -> None:
    linked = LinkedRun.open(output)
    assert linked.has_gold()
    judged = judge_run(linked)
    assert judged.verdicts["right"].null_count == 30
    page = report_of(linked, judged, training=None, gallery_size=10)
    assert page.count('class="card"') == 10
    assert "Accuracy by kind of mention" in page
    assert "Accuracy" not in report_of(linked, None, training=None, gallery_size=3)


def test_the_recall_of_pools_is_measured_where_there_are_pools(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    entities = {"entity_id": [f"Q{n}" for n in range(20)], "image_bytes": [buffer.getvalue()] * 20}
    pq.write_table(pa.table(entities), tmp_path / "entities.parquet")

    def evaluated() -> tuple[dict[str, Any], str, str]:
        options = ["--gallery-size", "5", "--entities", str(tmp_path / "entities.parquet")]
        monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, *options])
        main()
        directory = Path(output, "_evaluation")
        metrics = json.loads((directory / "metrics.json").read_text())
        return metrics, (directory / "report.html").read_text(), capsys.readouterr().out

    metrics, page, printed = evaluated()
    assert metrics["evaluation"]["pool_recall"] is None
    assert "andidate pool" not in page
    assert "pool recall" not in printed
    assert "Picture of the entity" in page
    for shard in Path(output, "data").iterdir():  # each pool has the answer, so the right ones have the gold entity
        rows = pq.read_table(shard).to_pylist()
        for row in rows:
            reasons = [("name", 1.0)]
            row["pool"] = (
                [{"entity_id": row["entity_id"], "score": 1.0, "reasons": reasons}] if row["entity_id"] else []
            )
        pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), shard)
    metrics, page, printed = evaluated()
    assert metrics["evaluation"]["pool_recall"] == metrics["evaluation"]["accuracy"]
    assert "Gold in the candidate pool" in page
    assert "Candidate pool (1)" in page
    assert "equal name" in page
    assert "pool recall" in printed


def test_a_run_is_compared_with_another_and_its_split_with_training(output: str) -> None:
    linked = LinkedRun.open(output)
    judged = judge_run(linked, against=linked, train=linked.settings["input"])
    assert judged.comparison is not None
    assert judged.comparison.num_changed == 0
    assert judged.leaks is not None
    assert judged.leaks.mention_ids == NUM_MENTIONS
    assert judged.leaks.pictures == sum(n % 3 > 0 for n in range(NUM_MENTIONS))


def test_a_calibration_fits_the_run_that_it_was_fitted_on(output: str) -> None:
    linked = LinkedRun.open(output)
    fitted = calibrate_run(linked, nil_precision=0.1)
    assert fitted.fitted_on["num_mentions"] == NUM_MENTIONS - 1
    assert fitted.fitted_on["num_nil"] == 30
    fitted.check_scoring(linked.settings)
    with pytest.raises(ConfigurationError, match=r"search\.objective"):
        fitted.check_scoring(linked.settings | {"search": {"objective": "mean"}})


@pytest.fixture
def scored(output: str, artifacts: dict[str, Path]) -> str:
    """The run with candidate pools, in which training mentions of the form speak for the gold entity most often."""
    claim, gold = Path(output, "_run.json"), pq.read_table(Path(output).parent / "mentions.parquet")
    run = json.loads(claim.read_text())
    run["settings"]["score"] = {"kind": "combined", "risk": 0.0}
    run["artifacts"] = {"knowledge_base": json.loads((artifacts["knowledge_base"] / MANIFEST).read_text())}
    run["plan"] = ["some rows"]
    claim.write_text(json.dumps(run))
    wanted = dict(zip(gold["mention_id"].to_pylist(), gold["entity_id"].to_pylist(), strict=True))
    for shard in Path(output, "data").iterdir():
        rows = pq.read_table(shard).to_pylist()
        for number, row in enumerate(rows):
            if row["error"] is None:
                ids = dict.fromkeys([row["entity_id"], wanted[row["mention_id"]], "Q8"])
                counts = [
                    3.0 if (entity_id == wanted[row["mention_id"]]) == (number % 5 > 0) else 0.0 for entity_id in ids
                ]
                row["pool"] = [
                    {"entity_id": entity_id, "score": 1.0, "reasons": [("form", count)]}
                    for entity_id, count in zip(ids, counts, strict=True)
                    if entity_id != "unheard of"
                ]
        pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), shard)
    return output


def test_one_command_fits_ranking_confidence_and_nil(
    scored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = pq.read_table(tmp_path / "mentions.parquet").slice(30).select(["mention_id", "entity_id"])
    pq.write_table(labels, tmp_path / "labels.parquet")

    def fitted(*options: str) -> Calibration:
        arguments = ["gemel", "calibrate", scored, str(tmp_path / "calibration"), "--nil-precision", "0.2", *options]
        monkeypatch.setattr("sys.argv", arguments)
        main()
        return Calibration.open(tmp_path / "calibration")

    with_nil, without_nil = fitted(), fitted("--gold", str(tmp_path / "labels.parquet"))
    for found in (with_nil, without_nil):
        assert found.weights is not None
        assert found.weights.features["form_prior"] > 0.1
        assert found.nil is not None
        assert found.contents.keys() == {"knowledge_base", "input"}
    assert (with_nil.fitted_on["nil_held_out"], with_nil.fitted_on["num_nil"]) == (0, 30)
    assert without_nil.fitted_on["nil_held_out"] == 1
    assert without_nil.fitted_on["num_nil"] == pytest.approx(170 / 5, abs=5)


def test_a_run_that_does_not_fit_teaches_nothing(scored: str) -> None:
    linked = LinkedRun.open(scored)
    nothing = pa.array([[]] * NUM_MENTIONS, linked.predictions["pool"].type)
    rows = linked.predictions.set_column(linked.predictions.column_names.index("pool"), "pool", nothing)
    with pytest.raises(InputError, match=r"no row of .* has a candidate pool"):
        calibrate_run(replace(linked, predictions=rows))
    with pytest.raises(ArtifactError, match=r"is not the one that the run .* had"):
        calibrate_run(replace(linked, identity={"artifacts": {"knowledge_base": {"entities_sha256": "another"}}}))


def test_confidence_is_judged_beside_the_probability_of_the_name(output: str) -> None:
    linked = LinkedRun.open(output)
    fitted = calibrate_run(linked, nil_precision=0.1)
    confidence = pa.array(SHARES**2)
    column = linked.predictions.column_names.index("confidence")
    calibrated = replace(linked, predictions=linked.predictions.set_column(column, "confidence", confidence))
    assert list(judge_run(calibrated).confidence) == ["confidence", "probability"]
    assert fitted.nil is not None


def test_labels_may_come_alone_and_in_any_order(output: str, tmp_path: Path) -> None:
    labelled = pq.read_table(tmp_path / "mentions.parquet").sort_by("entity_id").slice(40)
    pq.write_table(labelled, tmp_path / "all.parquet")
    pq.write_table(labelled.select(["mention_id", "entity_id"]), tmp_path / "labels.parquet")
    linked, train = LinkedRun.open(f"{output}/"), str(tmp_path / "mentions.parquet")
    alone, described = (
        judge_run(linked, gold=str(tmp_path / name), train=train) for name in ("labels.parquet", "all.parquet")
    )
    assert alone.to_json() == described.to_json()
    assert linked.output == output


def test_what_candidates_a_run_had_its_own_input_says(output: str, tmp_path: Path) -> None:
    mentions = pq.read_table(tmp_path / "mentions.parquet")
    pq.write_table(mentions, tmp_path / "gold.parquet")
    candidates = pa.array([["Q1", f"Q{n % 20}"] for n in range(NUM_MENTIONS)])
    pq.write_table(mentions.append_column("candidate_ids", candidates), tmp_path / "mentions.parquet")
    linked, gold = LinkedRun.open(output), str(tmp_path / "gold.parquet")
    assert judge_run(linked, gold=gold, protocol="candidates").evaluation.protocol == "candidates"
    with pytest.raises(InputError, match="some mentions have candidate_ids"):
        judge_run(linked, gold=gold)
    over_all = replace(linked, settings=linked.settings | {"input": gold})
    with pytest.raises(InputError, match="of the run to compare with: some mentions have candidate_ids"):
        judge_run(over_all, gold=gold, against=linked)
    with pytest.raises(InputError, match="fit the calibration on a run without candidates"):
        calibrate_run(linked, gold=gold, nil_precision=0.1)


def test_what_is_no_finished_run_is_refused(output: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no _run\.json"):
        LinkedRun.open(str(tmp_path))
    Path(output, "_report.json").unlink()
    with pytest.raises(InputError, match=r"has no _report\.json"):
        LinkedRun.open(output)
    pq.write_table(pa.table({"mention_id": ["a"]}), tmp_path / "unlabelled.parquet")
    with pytest.raises(InputError, match="no column entity_id"):
        read_gold(str(tmp_path / "unlabelled.parquet"))


@pytest.mark.parametrize("name", ["_run.json", "_report.json"])
@pytest.mark.parametrize("content", [b"", b'{"settings"', b"[]", b"\xff", b"[" * 100_000])
def test_a_document_of_a_run_that_is_none_is_refused_by_its_name(output: str, name: str, content: bytes) -> None:
    Path(output, name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}'? is (damaged|no JSON object)"):
        LinkedRun.open(output)


OTHER = {"input": 1, "knowledge_base": "kb", "demonstrations": None}


@pytest.mark.parametrize("run", [{}, {"settings": None}, {"settings": {"input": "a"}}, {"settings": OTHER}])
def test_the_settings_of_another_kind_of_run_are_refused(output: str, run: object) -> None:
    Path(output, "_run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"_run\.json is not of a linking run"):
        LinkedRun.open(output)


def test_the_judge_says_which_addresses_are_read_and_not_the_judged(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "pictures/red.png"
    picture.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(picture)
    mentions = pq.read_table(tmp_path / "mentions.parquet").drop_columns(["image_bytes"])
    addresses = pa.array([str(picture)] * NUM_MENTIONS)
    pq.write_table(mentions.append_column("image_uri", addresses), tmp_path / "mentions.parquet")
    run = json.loads(Path(output, "_run.json").read_text())
    run["settings"]["image_source"] = {"allowed_prefixes": [str(tmp_path)], "a setting of tomorrow": 1}
    Path(output, "_run.json").write_text(json.dumps(run))

    def report(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, "--gallery-size", "3", *options])
        main()
        return Path(output, "_evaluation/report.html").read_text()

    assert "data:image/webp" not in report()
    assert "data:image/webp" in report("--allowed-image-prefixes", str(picture.parent))
    assert "under none of allowed_prefixes" in report("--allowed-image-prefixes", "/elsewhere")


def set_labels(tmp_path: Path, labels: list[str | None], **renamed: str) -> None:
    """Give the run's input other labels, and columns other names."""
    mentions = pq.read_table(tmp_path / "mentions.parquet")
    column = mentions.column_names.index("entity_id")
    mentions = mentions.set_column(column, "entity_id", pa.array(labels, pa.string()))
    pq.write_table(mentions.rename_columns(renamed), tmp_path / "mentions.parquet")


def test_without_labels_runs_are_compared_by_their_answers(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_labels(tmp_path, [None] * NUM_MENTIONS)
    other = tmp_path / "other"
    shutil.copytree(output, other)
    rows = pq.read_table(other / "data/shard-00001.parquet").to_pylist()
    rows[0]["entity_id"], rows[-1]["entity_id"] = "Q21", "Q21"
    pq.write_table(
        pa.Table.from_pylist(rows[:-2] + rows[-1:], schema=PREDICTION_SCHEMA), other / "data/shard-00001.parquet"
    )
    monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, "--gallery-size", "0", "--against", str(other)])
    caplog.set_level("INFO")
    main()
    assert "of 199 mentions of both runs, 2 have another entity" in caplog.text
    assert {path.name for path in Path(output, "_evaluation").iterdir()} == {"report.html"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "name"], "a run without gold labels has no use for --protocol: leave that out"),
        (
            ["--gold", "places.parquet", "--train", "t", "--against", "a"],
            "judging mentions by their places has no use for --train and --against: leave that out",
        ),
    ],
)
def test_an_option_without_a_use_is_refused(
    options: list[str],
    message: str,
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_labels(tmp_path, [None] * NUM_MENTIONS)
    pq.write_table(pa.table({"group": ["d"], "mention": ["bear"]}), tmp_path / "places.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err
    assert not Path(output, "_evaluation").exists()


def test_labels_with_the_names_of_the_run_are_no_places(tmp_path: Path) -> None:
    labels = {"id": ["m"], "group": ["d"], "mention": ["bear"], "text": ["A bear."], "entity_id": ["Q1"]}
    pq.write_table(pa.table(labels), tmp_path / "labels.parquet")
    assert has_places_alone(str(tmp_path / "labels.parquet"), {})
    assert not has_places_alone(str(tmp_path / "labels.parquet"), {"mention_id": "id"})


def test_pictures_are_those_of_the_input_where_labels_have_none(output: str, tmp_path: Path) -> None:
    labels = pq.read_table(tmp_path / "mentions.parquet").drop_columns(["image_bytes"]).slice(100, 50)
    pq.write_table(labels, tmp_path / "labels.parquet")
    found = read_gold(str(tmp_path / "labels.parquet"), str(tmp_path / "mentions.parquet"))
    assert found["has_picture"].to_pylist() == [n % 3 > 0 for n in range(100, 150)]
    assert "has_picture" not in read_gold(str(tmp_path / "labels.parquet")).column_names


@pytest.mark.parametrize("as_struct", [False, True])
def test_pictures_are_not_read_where_all_mentions_have_one(tmp_path: Path, as_struct: bool) -> None:
    """They are damaged on the disk."""
    pictures = [{"bytes": b"picture", "path": None}] * 3 if as_struct else [b"picture"] * 3
    ids, path = ["a", "b", "c"], tmp_path / "mentions.parquet"
    pq.write_table(pa.table({"mention_id": ids, "entity_id": ids, "image_bytes": pictures}), path)
    damage(path, "image_bytes", [0])
    assert read_gold(str(path))["has_picture"].to_pylist() == [True] * 3
    with pytest.raises(InputError, match="is not a readable Parquet table"):
        read_gold(str(path), with_digests=True)


def test_only_row_groups_with_labelled_mentions_are_read(output: str, tmp_path: Path) -> None:
    """The pictures of all others are damaged on the disk."""
    mentions, path = pq.read_table(tmp_path / "mentions.parquet"), tmp_path / "mentions.parquet"
    pq.write_table(mentions, path, row_group_size=50)
    pq.write_table(mentions.select(["mention_id", "entity_id"]).slice(50, 50), tmp_path / "labels.parquet")
    damage(path, "image_bytes", [0, 2, 3])
    found = read_gold(str(tmp_path / "labels.parquet"), str(path))
    assert found["has_picture"].to_pylist() == [n % 3 > 0 for n in range(50, 100)]
    with pytest.raises(InputError, match="is not a readable Parquet table"):
        read_gold(str(path))


def test_labels_that_the_knowledge_base_lacks_are_warned_of(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_labels(tmp_path, [*[f"http://wikidata.org/Q{n}" for n in range(150)], *["Q1"] * 50])
    monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, "--gallery-size", "0"])
    main()
    assert "150 labels are no ids of the knowledge base, which has those of 50" in caplog.text


def test_a_run_whose_artifacts_are_gone_is_shown(output: str, artifacts: dict[str, Path], tmp_path: Path) -> None:
    linked, address = LinkedRun.open(output), tmp_path / "demonstrations"
    shutil.copytree(artifacts["demonstrations"], address)
    ids = pa.array([["d0"]] * NUM_MENTIONS)
    column = linked.predictions.column_names.index("demonstration_ids")
    linked = replace(
        linked,
        settings=linked.settings | {"demonstrations": str(address), "knowledge_base": str(tmp_path / "gone")},
        identity={"artifacts": {"demonstrations": json.loads((address / INDEX_MANIFEST).read_text())}},
        predictions=linked.predictions.set_column(column, "demonstration_ids", ids),
    )

    def page() -> str:
        return report_of(linked, None, training=None, gallery_size=3)

    assert page().count("<summary>Demonstrations") == 3
    manifest = json.loads((address / INDEX_MANIFEST).read_text())
    (address / INDEX_MANIFEST).write_text(json.dumps(manifest | {"table_sha256": "another"}))
    assert page().count("<summary>Demonstrations") == 0
    shutil.rmtree(address)
    assert page().count("<summary>Demonstrations") == 0


def test_a_run_below_a_lookup_is_said(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Training mentions that mean what the gold labels say: a lookup is always right."""
    mentions = pq.read_table(tmp_path / "mentions.parquet", columns=["mention", "text", "entity_id"]).slice(30)
    ids = pa.array([f"t{n}" for n in range(len(mentions))])
    pq.write_table(mentions.append_column("mention_id", ids), tmp_path / "train.parquet")
    monkeypatch.setattr("sys.argv", ["gemel", "evaluate", output, "--gallery-size", "0"])
    main()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    monkeypatch.setattr("sys.argv", [*sys.argv, "--train", str(tmp_path / "train.parquet")])
    main()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("the accuracy is below that of a lookup without a model")
    assert "less often right than a lookup" in Path(output, "_evaluation/report.html").read_text()

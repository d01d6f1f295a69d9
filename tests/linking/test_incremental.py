"""Runs that are carried on with a changed knowledge base: the same as linking everything again, for less."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import MENTION_SCHEMA, picture, predictions, toml
from support.names import ENTITY_NAMES
from support.s3_server import S3Server
from transformers import PreTrainedTokenizerFast

from gemel_engine import storage
from gemel_engine.assembly import start_generator
from gemel_engine.config.components import KnowledgeBaseSettings, Objective
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ArtifactError, ConfigurationError, GemelError, InputError
from gemel_engine.evidence.update import open_knowledge_base
from gemel_engine.knowledge_base.build import build_knowledge_base
from gemel_engine.knowledge_base.changes import KnowledgeBaseChanges
from gemel_engine.knowledge_base.trie import PrefixTrie
from gemel_engine.knowledge_base.update import compact_knowledge_base, update_knowledge_base
from gemel_engine.linker import Linker
from gemel_engine.linking.incremental import PreviousRun
from gemel_engine.linking.job import describe_run, link_corpus
from gemel_engine.types import Mention, predictions_to_table, row_to_prediction

RETIRED = {"Q12": "crescent moon", "Q19": "guide dog"}
CHANGES = pa.Table.from_pylist(
    [
        *({"entity_id": entity_id, "retired": True} for entity_id in RETIRED),
        {"entity_id": "Q5", "name": "fast train"},
        {"entity_id": "Q10", "name": "apple pie"},  # of another entity, too
        {"entity_id": "N1", "name": "night train"},
        {"entity_id": "N2", "name": "sea bear"},
        {"entity_id": "N3", "name": "moonstar"},
        {
            "entity_id": "N4",
            "name": "star",
            "popularity": 1.0,
        },  # a second entity of the name, and the first to be named
    ],
    schema=pa.schema(
        {"entity_id": pa.string(), "name": pa.string(), "popularity": pa.float64(), "retired": pa.bool_()}
    ),
)


def write_corpus(path: Path) -> Path:
    """Every name as a surface form; some with pictures, some with candidates, and a row that can't be linked."""
    rows: list[dict[str, Any]] = [
        {
            "mention_id": f"m{n:02}",
            "text": f"Look at the {name} over there.",
            "mention": name,
            "image_bytes": picture(["red", "green", "blue"][n % 3]) if n % 4 == 0 else None,
        }
        for n, name in enumerate(ENTITY_NAMES)
    ]
    rows[3]["candidate_ids"] = ["Q3", "Q1"]
    rows[4]["candidate_ids"] = ["Q4", "Q5", "Q6"]  # of which one is renamed
    rows[6]["candidate_ids"] = ["Q6", "N1"]  # of which one is added
    rows[7]["text"] = ""
    pq.write_table(pa.Table.from_pylist(rows, schema=MENTION_SCHEMA), path)
    return path


@pytest.fixture(scope="module")
def run(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> LinkConfig:
    """What the runs of these tests have in common."""
    directory = tmp_path_factory.mktemp("relinking")
    path = directory / "link.toml"
    path.write_text(toml(artifacts, write_corpus(directory / "mentions.parquet"), directory / "before"))
    config = load_config(LinkConfig, path, ["--rows-per-shard", "8", "--max-failed-fraction", "0.2"])
    return replace(config, search=replace(config.search, ranking="objective", max_rollouts=500))


@pytest.fixture(scope="module")
def updated(run: LinkConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    directory = Path(run.output).parent / "updated"
    update_knowledge_base(run.knowledge_base, CHANGES, tokenizer, directory, KnowledgeBaseSettings())
    return str(directory)


def assert_equal_predictions(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> int:
    """Every row once, and what both prove the same; how many rows that is."""
    assert [row["mention_id"] for row in found] == [row["mention_id"] for row in expected]
    assert [row["error"] for row in found] == [row["error"] for row in expected]
    certified = [pair for pair in zip(found, expected, strict=True) if pair[0]["certified"] and pair[1]["certified"]]
    for ours, theirs in certified:
        assert (ours["entity_id"], ours["entity_name"]) == (theirs["entity_id"], theirs["entity_name"])
        assert ours["log_prob"] == pytest.approx(theirs["log_prob"], abs=1e-3)
        assert ours["demonstration_ids"] == theirs["demonstration_ids"]
        best = {item["entity_id"] for item in ours["candidates"] if item["name"] == ours["entity_name"]}
        assert best == {item["entity_id"] for item in theirs["candidates"] if item["name"] == theirs["entity_name"]}
    return len(certified)


@pytest.mark.heavy
@pytest.mark.parametrize("objective", ["sum", "mean"])
def test_a_carried_on_run_equals_linking_everything_again(
    run: LinkConfig, updated: str, local_ray: None, tmp_path: Path, objective: Objective
) -> None:
    run = replace(run, output=str(tmp_path / "before"), search=replace(run.search, objective=objective))
    before = link_corpus(run)
    full = replace(run, knowledge_base=updated, output=str(tmp_path / "full"))
    in_full = link_corpus(full)
    again = replace(full, output=str(tmp_path / "again"), previous=run.output)
    assert "28 of 28 rows are to be linked" in describe_run(again)
    report = link_corpus(again)

    assert assert_equal_predictions(predictions(again.output), predictions(full.output)) > 20
    carried = report.carried_over
    assert carried is not None
    assert in_full.carried_over is None
    assert (carried.num_changed_entities, carried.num_added_names) == (4, 4)
    assert carried.rows_kept == 1  # that with candidates, none of which has changed
    assert carried.rows_extended > 5
    assert carried.rows_linked >= 3  # two with candidates that have changed, one without a text
    assert carried.rows_kept + carried.rows_extended + carried.rows_linked == report.rows == 28
    assert before.rollouts_per_mention is not None
    assert report.rollouts < in_full.rollouts
    assert carried.rollouts_before == pytest.approx(before.rollouts_per_mention * (28 - sum(before.errors.values())))

    # A deleted shard is made again, and the run can be carried on itself, without a change.
    (Path(again.output) / "data/shard-00001.parquet").unlink()
    assert link_corpus(again).shards_skipped == 3
    assert_equal_predictions(predictions(again.output), predictions(full.output))
    third = replace(again, output=str(tmp_path / "third"), previous=again.output)
    unchanged = link_corpus(third).carried_over
    assert unchanged is not None
    assert (unchanged.num_changed_entities, unchanged.num_added_names, unchanged.rows_extended) == (0, 0, 0)
    assert unchanged.rows_kept > 20
    assert_equal_predictions(predictions(third.output), predictions(full.output))


@pytest.mark.heavy
def test_without_added_names_no_model_is_asked_about_untouched_rows(
    run: LinkConfig, local_ray: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    run = replace(run, output=str(tmp_path / "before"))
    link_corpus(run)
    before = predictions(run.output)
    listed = [{item["entity_id"] for item in row["candidates"]} for row in before]
    counts = {f"Q{n}": sum(f"Q{n}" in ids for ids in listed) for n in range(7, len(ENTITY_NAMES))}
    retired = min((count, entity_id) for entity_id, count in counts.items() if count)[1]
    is_touched = [retired in ids or not row["certified"] for ids, row in zip(listed, before, strict=True)]
    changes = pa.Table.from_pylist([{"entity_id": retired, "retired": True}])
    update_knowledge_base(run.knowledge_base, changes, tokenizer, tmp_path / "retired", KnowledgeBaseSettings())
    full = replace(run, knowledge_base=str(tmp_path / "retired"), output=str(tmp_path / "full"))
    link_corpus(full)
    again = replace(full, output=str(tmp_path / "again"), previous=run.output)
    carried = link_corpus(again).carried_over
    assert carried is not None
    assert (carried.num_changed_entities, carried.num_added_names, carried.rows_extended) == (1, 0, 0)
    assert carried.rows_linked == sum(is_touched) < len(before) / 2
    assert assert_equal_predictions(predictions(again.output), predictions(full.output)) > 20
    for row, was, is_new in zip(predictions(again.output), before, is_touched, strict=True):
        if not is_new:
            assert row["probability"] == pytest.approx(was["probability"])
            assert row | {"probability": 0} == was | {"probability": 0}


@pytest.mark.parametrize(("objective", "engines"), [("sum", ["transformers", "vllm"]), ("mean", ["transformers"])])
def test_bounds_stay_bounds(
    run: LinkConfig, updated: str, tmp_path: Path, objective: Objective, engines: list[Literal["transformers", "vllm"]]
) -> None:
    """A carried-on prediction beside all names' log-probs."""
    run = replace(run, search=replace(run.search, objective=objective))
    mentions = [Mention(f"m{n}", f"Look at the {name} over there.", name) for n, name in enumerate(ENTITY_NAMES[:8])]
    pictures: list[None] = [None] * len(mentions)
    every_name = replace(run.search, num_to_certify=40, num_candidates=40, max_rollouts=5_000)
    truth = Linker(replace(run, knowledge_base=updated, search=every_name)).link(mentions, pictures)
    before = Linker(run).link(mentions, pictures)

    changes = KnowledgeBaseChanges.between(open_knowledge_base(run.knowledge_base), open_knowledge_base(updated))
    changes.save(str(tmp_path / "changes"))
    changed = set(changes.entity_ids.to_pylist())
    previous = [None if changed & {item.entity_id for item in row.candidates} else row for row in before]
    assert previous.count(None) < len(mentions)
    new_config = replace(run, knowledge_base=updated)
    _, rows = Linker(new_config).prepare(mentions, pictures)
    for engine in engines:
        config = replace(new_config, language_model=replace(run.language_model, engine=engine))
        generator = start_generator(config, added_names=tmp_path / "changes/added_names")
        found = generator.generate(mentions, pictures, rows, previous)
        for prediction, best in zip(found, truth, strict=True):
            log_probs = {item.entity_name: item.log_prob for item in best.candidates}
            mass = sum(math.exp(log_prob) for log_prob in log_probs.values() if log_prob is not None)
            assert prediction.certified
            assert best.log_prob is not None
            assert (prediction.entity_id, prediction.entity_name) == (best.entity_id, best.entity_name)
            assert prediction.log_prob == pytest.approx(best.log_prob, abs=1e-3)
            assert prediction.probability is not None
            assert prediction.probability <= math.exp(best.log_prob) / mass + 1e-4
            assert prediction.unexplored_mass is not None
            assert 0 <= prediction.unexplored_mass <= 1


def test_a_prediction_comes_back_from_its_row(run: LinkConfig) -> None:
    prediction = Linker(run).link_one("Look at the bear over there.", "bear")
    (row,) = predictions_to_table([prediction]).to_pylist()
    assert row_to_prediction(row) == prediction


def test_changes_between_two_knowledge_bases(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, s3_server: S3Server
) -> None:
    tables = {
        "old": {"Q1": "bear", "Q2": "bear", "Q3": "dog", "Q4": "cat", "Q5": "sun"},
        "new": {"Q1": "bear", "Q2": "dog", "Q4": "black cat", "Q6": "sun", "Q7": "moon"},
    }
    for name, entities in tables.items():
        table = pa.table({"entity_id": list(entities), "name": list(entities.values())})
        build_knowledge_base(table, tokenizer, tmp_path / name, KnowledgeBaseSettings())
    old, new = (open_knowledge_base(str(tmp_path / name)) for name in tables)
    changes = KnowledgeBaseChanges.between(old, new)
    assert sorted(changes.entity_ids.to_pylist()) == ["Q2", "Q3", "Q4", "Q5"]
    assert changes.added_names is not None
    names = [tokenizer.decode(changes.added_names.name_tokens(n)) for n in range(changes.added_names.num_names)]
    assert sorted(names) == ["black cat", "moon"]
    changes.save(str(tmp_path / "changes"))
    assert PrefixTrie.open(tmp_path / "changes/added_names", verify=True).num_names == 2
    assert np.array_equal(PrefixTrie.open(tmp_path / "changes/added_names").tokens, changes.added_names.tokens)
    address = f"{s3_server.uri}/changes"
    changes.save(address)
    previous = PreviousRun(output="unused", changes=address, num_to_certify=1)
    assert previous.counts() == {"num_changed_entities": 4, "num_added_names": 2}
    downloaded = previous.added_names()
    assert downloaded is not None
    assert PrefixTrie.open(downloaded, verify=True).num_names == 2
    storage.remove_tree(address)
    same = KnowledgeBaseChanges.between(old, old)
    assert (len(same.entity_ids), same.added_names) == (0, None)


@pytest.fixture(scope="module")
def finished(run: LinkConfig, local_ray: None) -> LinkConfig:
    link_corpus(run)
    return run


@pytest.mark.heavy
def test_what_cannot_be_carried_on_is_refused(
    finished: LinkConfig, updated: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    again = replace(finished, knowledge_base=updated, output=str(tmp_path / "again"), previous=finished.output)
    describe_run(again)

    def refused(config: LinkConfig, error: type[GemelError], message: str) -> None:
        with pytest.raises(error, match=message):
            link_corpus(config)
        assert not Path(config.output).exists()

    refused(
        replace(again, previous=str(tmp_path / "nowhere")), InputError, "has no _run.json: name the output of a run"
    )
    other = replace(again, search=replace(again.search, max_rollouts=7))
    refused(
        other, ConfigurationError, r"differs in settings\.search\.max_rollouts, and not in its knowledge base alone"
    )
    pq.write_table(pq.read_table(finished.input).slice(1), tmp_path / "fewer.parquet")
    refused(replace(again, input=str(tmp_path / "fewer.parquet")), ConfigurationError, r"differs in .*input files")

    compact_knowledge_base(updated, tmp_path / "compact")
    moved = replace(finished, knowledge_base=str(tmp_path / "compact"), output=str(tmp_path / "moved"))
    link_corpus(moved)
    manifest = tmp_path / "compact/knowledge_base.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"vocabulary_size": 1}))
    refused(replace(again, previous=moved.output), ArtifactError, "is not there any more")
    (Path(finished.output) / "_report.json").rename(tmp_path / "_report.json")
    refused(again, InputError, r"has no _report\.json")
    (tmp_path / "_report.json").rename(Path(finished.output) / "_report.json")

"""Linking with a knowledge base that has an evidence index."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import predictions, toml, write_mentions
from support.names import ENTITY_NAMES

from gemel_engine.cli.knowledge_bases import EncoderOptions
from gemel_engine.config.components import KnowledgeBaseSettings
from gemel_engine.config.loading import config_json, load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.decoding.confidence import Calibration, LogisticModel, scoring_settings
from gemel_engine.errors import ConfigurationError
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.fingerprints import json_sha256, read_manifest_at
from gemel_engine.knowledge_base.store import MANIFEST
from gemel_engine.linking.job import describe_run, link_corpus
from gemel_engine.pipeline.knowledge_bases import build, update
from gemel_engine.tokenizer import load_tokenizer
from gemel_engine.types import CARD_PREFIX

WEIGHTS = ScoreWeights(
    features={"likeness": 3.0, "words_of_form": 1.0, "equal_name": 5.0},
    language_model=0.5,
    risks=((0.0, 0.01),),
    fitted_on={},
)


@pytest.fixture(scope="module")
def evident(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The artifacts of tiny models with an evidence index in the knowledge base, and weights."""
    directory = tmp_path_factory.mktemp("evident")
    rows: list[dict[str, Any]] = [
        {"entity_id": f"Q{n}", "name": name, "aliases": [f"the {name} itself"], "description": f"a kind of {name}"}
        for n, name in enumerate(ENTITY_NAMES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), directory / "entities.parquet")
    tokenizer, settings = load_tokenizer(str(artifacts["language_model"])), KnowledgeBaseSettings()
    encoders = EncoderOptions(mention_encoder=str(artifacts["mention_encoder"])).encoders()
    build(str(directory / "entities.parquet"), str(directory / "kb"), tokenizer, settings, encoders)
    change = {"entity_id": "N1", "name": "quite another name", "aliases": ["brown bear"], "description": "new"}
    pq.write_table(pa.Table.from_pylist([change]), directory / "changes.parquet")
    changes, updated = str(directory / "changes.parquet"), directory / "updated"
    update(str(directory / "kb"), changes, updated, tokenizer, settings, encoders)
    return artifacts | {
        "knowledge_base": directory / "kb",
        "updated": directory / "updated",
    }


@pytest.fixture
def config(evident: dict[str, Path], tmp_path: Path) -> LinkConfig:
    path = tmp_path / "link.toml"
    path.write_text(toml(evident, write_mentions(tmp_path / "mentions.parquet"), tmp_path / "output"))
    config = load_config(LinkConfig, path)
    config = replace(config, search=replace(config.search, ranking="objective"))
    return calibrated(config, WEIGHTS, tmp_path / "calibration")


def calibrated(config: LinkConfig, weights: ScoreWeights, directory: Path) -> LinkConfig:
    """The run with a calibration of these weights, in which every answer has confidence 0.5."""
    Calibration(
        weights=weights,
        right=LogisticModel(terms={}, bias=0.0),
        nil=None,
        nil_threshold=None,
        scoring=scoring_settings(json.loads(config_json(config))),
        contents={"knowledge_base": json_sha256(read_manifest_at(f"{config.knowledge_base}/{MANIFEST}"))},
        fitted_on={},
    ).save(directory)
    return replace(config, calibration=str(directory))


def test_a_knowledge_base_alone_links_with_cards_and_a_certified_score(config: LinkConfig) -> None:
    config = replace(config, demonstrations=None)
    report = link_corpus(config)
    assert report.decided_by == {"score": 9}
    assert report.certified_share == 1
    for row in predictions(config.output):
        assert row["error"] is None
        assert row["demonstration_ids"]
        assert all(item.startswith(CARD_PREFIX) for item in row["demonstration_ids"])
        assert [f"{CARD_PREFIX}{item}" for item in row["demonstration_entity_ids"]] == row["demonstration_ids"]
        assert row["entity_id"] in {item["entity_id"] for item in row["pool"]}
        assert len(row["candidates"]) >= 5
        assert row["candidates"][0]["score"] == row["score"]
        assert row["confidence"] == 0.5
    assert "0 of 9 rows are to be linked" in describe_run(config)


def test_embeddings_of_the_knowledge_base_need_their_encoder(config: LinkConfig) -> None:
    blind = replace(config, demonstrations=None, retrieval=replace(config.retrieval, mention_encoder=None))
    with pytest.raises(ConfigurationError, match=r"retrieval\.mention_encoder is not set"):
        describe_run(blind)
    without_pool = replace(blind, calibration=None, retrieval=replace(blind.retrieval, num_candidates=0))
    assert "9 of 9 rows are to be linked" in describe_run(without_pool)


def test_evidence_decides_alone_at_an_accepted_risk(config: LinkConfig) -> None:
    config = replace(config, score=replace(config.score, risk=0.02))
    report = link_corpus(config)
    assert report.decided_by == {"evidence": 9}
    assert (report.certified_share, report.prompt_tokens, report.rollouts) == (None, 0, 0)
    rows = predictions(config.output)
    assert [row["entity_name"] for row in rows] == [row["pool"] and ENTITY_NAMES[n] for n, row in enumerate(rows)]
    with pytest.raises(ConfigurationError, match=r"score\.risk is 0\.001"):
        describe_run(replace(config, output=f"{config.output}-2", score=replace(config.score, risk=0.001)))


@pytest.mark.heavy
def test_a_run_goes_on_with_an_update_of_knowledge_base_and_evidence(
    config: LinkConfig, evident: dict[str, Path]
) -> None:
    link_corpus(config)
    updated = replace(config, knowledge_base=str(evident["updated"]), output=f"{config.output}-full")
    link_corpus(updated)
    again = replace(updated, output=f"{config.output}-again", previous=config.output)
    report = link_corpus(again)
    assert report.carried_over is not None
    assert report.carried_over.rows_linked == 9  # a name was added
    full, found = predictions(updated.output), predictions(again.output)
    assert [row["entity_id"] for row in found] == [row["entity_id"] for row in full]
    assert [row["demonstration_ids"] for row in found] == [row["demonstration_ids"] for row in full]
    pools = {row["mention_id"]: {item["entity_id"] for item in row["pool"]} for row in found}
    by_alias = [row["mention_id"] for row in predictions(config.output) if row["entity_name"] == "brown bear"]
    assert all("N1" in pools[mention_id] for mention_id in by_alias)


@pytest.mark.heavy
def test_other_weights_rank_again_without_the_language_model(config: LinkConfig, tmp_path: Path) -> None:
    link_corpus(config)
    other = replace(WEIGHTS, features={"likeness": 4.0, "words_of_form": 1.0}, language_model=0.3)
    changed = calibrated(config, other, tmp_path / "other")
    full = replace(changed, output=f"{config.output}-full")
    in_full = link_corpus(full)
    report = link_corpus(replace(changed, output=f"{config.output}-again", previous=config.output))
    assert report.carried_over is not None
    assert report.carried_over.rows_kept > 0
    assert report.carried_over.rows_kept + report.carried_over.rows_linked == 9
    assert report.rollouts < in_full.rollouts
    for ours, theirs in zip(predictions(f"{config.output}-again"), predictions(full.output), strict=True):
        assert (ours["entity_id"], ours["decided_by"]) == (theirs["entity_id"], "score")
        assert ours["certified"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-3)
        assert ours["demonstration_ids"] == theirs["demonstration_ids"]

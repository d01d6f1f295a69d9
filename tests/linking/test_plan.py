"""Predicting a run: windows of a real corpus through the real pipeline, and an output that stays as it is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.corpus import MENTION_SCHEMA, mention_rows, toml
from support.names import ENTITY_NAMES

from gemel_engine import storage
from gemel_engine.cli.main import main
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError
from gemel_engine.linking.plan import link_windows, plan_run
from gemel_engine.pipeline.corpus import order_by_surface_form, order_within_shards, plan_shards, take_rows
from gemel_engine.pipeline.output import claim_output

NUM_ROWS = 80


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> LinkConfig:
    """A run over two files of text, in shards of four."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    rows = [
        {"mention_id": f"m{n}", "text": f"Look at the {name} over there.", "mention": name}
        for n in range(NUM_ROWS)
        for name in [ENTITY_NAMES[n % 7]]
    ]
    pq.write_table(pa.Table.from_pylist(rows[:50]), corpus / "a.parquet", row_group_size=20)
    large = pa.schema([(name, pa.large_string()) for name in (*rows[0], "image_uri")])
    pq.write_table(pa.Table.from_pylist(rows[50:], schema=large), corpus / "b.parquet")
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, corpus, tmp_path / "output"))
    return load_config(LinkConfig, path)


def test_a_plan_predicts_and_leaves_nothing(
    config: LinkConfig,
    local_ray: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = set(tmp_path.rglob("*"))
    written = tmp_path / "plan.json"
    options = f"--sample-rows 40 --actors 1 4 --price-per-actor-hour 2 --write-to {written} --rows-per-shard 8"
    monkeypatch.setattr(sys, "argv", ["gemel", "plan", str(tmp_path / "link.toml"), *options.split()])
    main()
    assert set(tmp_path.rglob("*")) == files | {written}
    assert "33 of 80 rows linked, in 17 windows" in capsys.readouterr().out
    plan = json.loads(written.read_text())
    assert (plan["num_rows"], plan["sample_rows"], plan["num_windows"], plan["errors"]) == (NUM_ROWS, 33, 17, {})
    assert plan["rows_per_shard"] == 8
    assert set(plan["stage_costs"]) == set(plan["peak_bytes"]) == {"image", "retrieval", "generation"}
    assert all(cost["num_free"] in (14, 15) for cost in plan["stage_costs"].values())
    assert plan["rollouts_per_row"] >= 1
    assert plan["cache_hit_rate"] is None  # of the reference engine
    assert 50 << 20 < plan["peak_bytes"]["generation"] < 8 << 30
    assert plan["output_bytes"] < NUM_ROWS * 600, "the frame of a file counts once, not for each window"
    assert plan["start_seconds"] > 0
    one, four = plan["clusters"]
    assert (one["actors"], four["actors"]) == (1, 4)
    assert one["seconds"]["low"] <= one["seconds"]["value"] <= one["seconds"]["high"]
    assert one["seconds"]["value"] > four["seconds"]["value"] > plan["start_seconds"]
    assert one["cost"]["value"] == pytest.approx(one["seconds"]["value"] / 3600 * 2.0)


@pytest.mark.parametrize("left", [[], ["_run.json"]])
def test_a_sample_is_linked_in_the_output_which_stays_as_it_was(
    config: LinkConfig, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may even begin there meanwhile."""

    def link(sampled: LinkConfig, *_: object) -> Generator[dict[str, Any], None, None]:
        assert re.fullmatch(rf"{config.output}/_plan-\w+/linked", sampled.output)
        assert len(plan_shards(sampled.input, 4)) == 2
        if left:
            claim_output(config.output, {})
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("gemel_engine.linking.plan.connect", lambda **_: None)
    monkeypatch.setattr("gemel_engine.linking.plan.receipts_on_ray", link)
    plan, rows = plan_shards(config.input, config.rows_per_shard), np.arange(7)
    with pytest.raises(KeyboardInterrupt):
        link_windows(config, plan, [rows[:4], rows[4:]])
    assert Path(config.output).exists() == bool(left)
    assert storage.list_files(config.output) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_rows": 1000}, "sample_rows is 1000, but the corpus has 80 rows"),
        ({"actors": (0,)}, "a cluster needs at least one actor"),
        ({"price_per_actor_hour": -1.0}, "a price is not negative"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    config: LinkConfig, options: dict[str, float], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        plan_run(config, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "output").exists()


def test_windows_follow_the_order_of_the_run(config: LinkConfig) -> None:
    plan = plan_shards(config.input, config.rows_per_shard)
    places = order_by_surface_form(plan)
    assert places is not None
    order = np.argsort(places)
    window = np.sort(order[30:50])
    rows = take_rows(plan, window)
    assert rows["mention_id"].to_pylist() == [f"m{n}" for n in window]
    forms = rows.take(np.searchsorted(window, order[30:50]))["mention"].to_pylist()
    assert forms == sorted(forms)
    everything = np.arange(NUM_ROWS)
    assert take_rows(plan, everything)["mention_id"].to_pylist() == [f"m{n}" for n in everything]


def test_rows_with_pictures_are_drawn_from_the_order_within_their_shards(config: LinkConfig, tmp_path: Path) -> None:
    config = with_pictures(config, tmp_path)
    plan = plan_shards(config.input, config.rows_per_shard)
    assert order_by_surface_form(plan) is None
    expected = [row for shard in plan for row in sorted(range(shard.start, shard.stop), key=lambda n: ENTITY_NAMES[n])]
    assert order_within_shards(plan).tolist() == expected


@pytest.mark.heavy
def test_windows_of_rows_with_pictures_are_linked(config: LinkConfig, local_ray: None, tmp_path: Path) -> None:
    config = with_pictures(config, tmp_path)
    plan = plan_shards(config.input, config.rows_per_shard)
    order = order_within_shards(plan)
    sample = link_windows(config, plan, [order[:2], order[2:5], order[5:6], order[6:9]])
    assert sorted(sample.rows) == [1, 2, 3, 3]
    assert sample.tally.errors == {}
    assert all(len(seconds) == 4 and min(seconds) >= 0 for seconds in sample.stage_seconds.values())


def with_pictures(config: LinkConfig, directory: Path) -> LinkConfig:
    path = directory / "pictures.parquet"
    pq.write_table(pa.Table.from_pylist(mention_rows(), schema=MENTION_SCHEMA), path)
    return replace(config, input=str(path))

"""What a run tells: Ray's metrics as Prometheus would scrape them, the report's counters, the logs of all processes."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
import ray
from support.corpus import predictions, run_job, toml, write_mentions
from support.paths import ROOT

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linking.job import link_corpus
from gemel_engine.linking.live import LiveView
from gemel_engine.linking.progress import Progress, Tally
from gemel_engine.linking.stages import RECEIPT_SCHEMA

SAMPLE = re.compile(r"ray_gemel_(\w+)\{(.*)\} (\S+)")


@pytest.fixture
def config(artifacts: dict[str, Path], tmp_path: Path) -> LinkConfig:
    """A run over nine mentions, one of them without a surface form."""
    mentions = write_mentions(tmp_path / "mentions.parquet", (4, {"mention": " ", "mention_start": None}))
    path = tmp_path / "link.toml"
    path.write_text(toml(artifacts, mentions, tmp_path / "output").replace("fraction = 0.0", "fraction = 0.2"))
    return load_config(LinkConfig, path)


def receipt(num_rows: int, **counted: Any) -> dict[str, Any]:
    empty = dict.fromkeys(RECEIPT_SCHEMA.names) | {"shard": 0, "part": "part", "error_kinds": [], "num_by_evidence": 0}
    return empty | {"num_rows": num_rows} | counted


def test_receipts_add_up() -> None:
    assert Tally().cache_hit_rate is None
    tally = Tally()
    tally.add(receipt(4, image_seconds=1.0, image_peak_bytes=7.0, prompt_tokens=100.0, cached_tokens=10.0))
    tally.add(receipt(2, image_seconds=0.5, image_peak_bytes=5.0, prompt_tokens=100.0, cached_tokens=80.0))
    tally.add(receipt(1, error_kinds=["image"], rollouts=3.0))
    assert (tally.rows, tally.rollouts, tally.cache_hit_rate) == (7, 3, 0.45)
    assert dict(tally.errors) == {"image": 1}
    assert (tally.stage_seconds, tally.peak_bytes) == ({"image": 1.5}, {"image": 7})


def test_metrics_and_report_count_a_run(local_ray: None, config: LinkConfig) -> None:
    report = link_corpus(config)
    rows = predictions(config.output)
    assert report.rollouts == sum(row["num_rollouts"] or 0 for row in rows)
    assert set(report.peak_bytes) == {"image", "retrieval", "generation"}
    assert 0 <= report.cached_tokens <= report.prompt_tokens
    assert report.errors == {"invalid_mention": 1}

    expected = {
        ("planned_rows_total", ""): 9,
        ("rows_total", "linked"): 8,
        ("rows_total", "invalid_mention"): 1,
        ("rollouts_total", ""): report.rollouts,
        ("stage_seconds_total", "generation"): pytest.approx(report.stage_seconds["generation"]),
    }
    (node,) = ray.nodes()  # type: ignore[no-untyped-call]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline, found = time.monotonic() + 60, dict[tuple[str, str], float]()
    while time.monotonic() < deadline and not expected.items() <= found.items():
        time.sleep(1)
        with urlopen(address) as response:
            found = scraped(response.read().decode(), config.output)
    assert {key: found.get(key) for key in expected} == expected


def scraped(text: str, output: str) -> dict[tuple[str, str], float]:
    """Value of each of our metrics of a run, by name and by what tells its kinds apart."""
    found = {}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("output") == output:
            found[name, tags.get("outcome") or tags.get("stage") or tags.get("found") or ""] = float(value)
    return found


def test_lines_say_how_long_it_still_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, view = Progress(100), LiveView()
    view.enter("linking", progress)
    assert view.line() == "linking: 0 of 100 rows (0.0%), models are loading, or the first shards are at work"
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("gemel_engine.linking.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    for finished in (10, 10, 20):
        progress.add(receipt(finished, generation_seconds=3.0, retrieval_seconds=1.0, num_by_evidence=5))
    assert view.line() == (
        "linking: 40 of 100 rows (40.0%), 3.00 rows/s, 0:00:20 left; 0 errors, 15 decided by evidence, "
        "25 by the model; cache hits -; busy: retrieval 25%, generation 75%"
    )


def test_off_a_terminal_lines_come_from_time_to_time(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gemel_engine.linking.live")
    with LiveView(seconds_between_lines=0.2) as view:
        view.enter("checking")
        time.sleep(0.3)
        view.enter("sorting")
        time.sleep(0.2)
    assert [record.getMessage() for record in caplog.records] == ["checking", "sorting"]
    time.sleep(0.3)
    assert len(caplog.records) == 2


def test_a_terminal_has_one_live_view_and_lines_above_it() -> None:
    """On a terminal of 80 columns, whose last state has nothing of the view left."""
    code = """
import logging, time
from gemel_engine.cli import options
from gemel_engine.linking.live import LiveView
def work():
    with LiveView() as view:
        view.enter("checking input")
        time.sleep(0.6)
        logging.getLogger("gemel_engine.x").info("a line")
        time.sleep(0.4)
options.run(work)
"""
    parent, child = pty.openpty()
    running = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, cwd=ROOT)
    os.close(child)
    written = b""
    with suppress(OSError):  # the end of a terminal
        while part := os.read(parent, 1024):
            written += part
    assert running.wait(60) == 0
    text = written.decode()
    assert "checking input" in text
    assert re.search(r"\d\d:\d\d:\d\d INFO a line", text)
    assert text.rindex("a line") < text.rindex("checking input")  # the view is drawn again, below


@pytest.mark.heavy
def test_logs_of_all_processes_are_json_where_that_is_asked_for(config: LinkConfig, tmp_path: Path) -> None:
    finished = run_job(tmp_path / "link.toml", RAY_LOGGING_CONFIG_ENCODING="JSON")
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    work = [record for record in records if record.get("stage") == "generation"]
    assert sorted(record["shard"] for record in work) == [0, 1, 2]
    assert all(record["attempt"] == 1 and record["actor_id"] and record["node_id"] for record in work)
    (last,) = [record for record in records if record.get("rows") == 9]
    assert (last["planned_rows"], last["errors"]) == (9, {"invalid_mention": 1})
    assert sum("gemel_engine.linking.job: linked" in line for line in finished.stderr.splitlines()) == 0  # not twice

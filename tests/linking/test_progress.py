"""What a run tells: its counters, its lines on a terminal and off it, the logs of all processes."""

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

import pytest
from support.corpus import run_job, toml, write_mentions
from support.paths import ROOT

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linking.live import LiveView
from gemel_engine.linking.progress import Progress, Tally
from gemel_engine.linking.stages import RECEIPT_SCHEMA


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
    assert Tally().unfilled_share is None
    tally = Tally()
    tally.add(receipt(4, image_seconds=1.0, image_peak_bytes=7.0, prompt_tokens=100.0, cached_tokens=10.0))
    tally.add(receipt(2, image_seconds=0.5, image_peak_bytes=5.0, prompt_tokens=100.0, cached_tokens=80.0))
    tally.add(receipt(1, error_kinds=["image"], rollouts=3.0))
    tally.add(receipt(0, generation_seconds=8.0, unfilled_seconds=1.0, waiting_seconds=2.0))
    assert (tally.rows, tally.rollouts, tally.cache_hit_rate) == (7, 3, 0.45)
    assert dict(tally.errors) == {"image": 1}
    assert (tally.stage_seconds, tally.peak_bytes) == ({"image": 1.5, "generation": 8.0}, {"image": 7})
    assert tally.unfilled_share == 0.3


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

"""Stages one after the other in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gemel_engine.config.resources import PoolSettings
from gemel_engine.pipeline.chain import Stage, run_here
from gemel_engine.pipeline.corpus import plan_shards
from gemel_engine.pipeline.stages import read_mentions

pytestmark = pytest.mark.unit


class Count:
    """Adds the number of tables that this object has seen before."""

    def __init__(self, first: int) -> None:
        self._next = first

    def __call__(self, table: pa.Table) -> pa.Table:
        self._next += 1
        return table.append_column("seen", pa.array([self._next - 1] * len(table)))


def test_each_shard_passes_all_stages_and_models_are_loaded_once(tmp_path: Path) -> None:
    rows = [{"mention_id": f"m{n}", "text": f"Look, {name}.", "mention": name} for n, name in enumerate("bacd")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mentions.parquet")
    plan = plan_shards(str(tmp_path / "mentions.parquet"), 2)
    stages = [
        Stage(partial(read_mentions, output=str(tmp_path / "output"), also=())),
        Stage(Count, (5,), PoolSettings()),
        Stage(lambda table: table.append_column("upper", pc.utf8_upper(table["mention"]))),
    ]
    found = [table.select(["mention_id", "seen", "upper"]).to_pydict() for table in run_here(plan, stages)]
    assert found == [
        {"mention_id": ["m1", "m0"], "seen": [5, 5], "upper": ["A", "B"]},
        {"mention_id": ["m2", "m3"], "seen": [6, 6], "upper": ["C", "D"]},
    ]

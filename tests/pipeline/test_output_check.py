"""An output that is not what was planned is refused, each fault with the file and the remedy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemel_engine import storage
from gemel_engine.config.components import EngineSettings, ScoreSettings
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.pipeline import output_check
from gemel_engine.pipeline.corpus import Shard, plan_shards
from gemel_engine.pipeline.identity import identity_json, run_digest, run_identity
from gemel_engine.pipeline.output import check_settings, claim_output, commit_shard, load_plan, save_plan, write_part
from gemel_engine.types import Prediction, predictions_to_table

NUM_ROWS, ROWS_PER_SHARD = 10, 4
IDENTITY: dict[str, Any] = {"settings": {"search": {"objective": "sum"}}}


@pytest.fixture
def plan(tmp_path: Path) -> list[Shard]:
    rows = [{name: f"{name}{row}" for name in ("mention_id", "text", "mention")} for row in range(NUM_ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mentions.parquet")
    return plan_shards(str(tmp_path / "mentions.parquet"), ROWS_PER_SHARD)


def write_shard(output: str, shard: Shard, identity: dict[str, Any] = IDENTITY) -> Path:
    rows = range(shard.start, shard.stop)
    table = predictions_to_table([Prediction(f"mention_id{row}") for row in rows])
    part = write_part(output, shard.index, table.append_column("row", pa.array(rows)))
    assert commit_shard(output, shard, [part], run_digest(identity))
    return Path(output, "data", f"{shard.name}.parquet")


@pytest.fixture
def output(plan: list[Shard], tmp_path: Path) -> str:
    """A finished output of three shards."""
    output = str(tmp_path / "output")
    claim_output(output, IDENTITY)
    for shard in plan:
        write_shard(output, shard)
    return output


def read(output: str, plan: list[Shard]) -> pa.Table:
    return output_check.read_complete(output, plan, run_digest(IDENTITY), ["mention_id", "error"])


def test_an_output_as_planned_is_read(output: str, plan: list[Shard]) -> None:
    finished = output_check.check_finished(output, plan, run_digest(IDENTITY))
    assert finished == {"shard-00000", "shard-00001", "shard-00002"}
    table = read(output, plan)
    assert table.column_names == ["mention_id", "error"]
    assert table["mention_id"].to_pylist() == [f"mention_id{row}" for row in range(NUM_ROWS)]


def test_a_file_that_somebody_has_begun_is_no_fault(output: str, plan: list[Shard]) -> None:
    Path(output, "data/.shard-00001.parquet.0123").write_bytes(b"PAR1")
    assert read(output, plan).num_rows == NUM_ROWS


Fault = Callable[[Path, list[Shard]], object]


def without_rows(data: Path, plan: list[Shard]) -> None:
    pq.write_table(pq.read_table(data / "shard-00001.parquet").slice(1), data / "shard-00001.parquet")


def with_a_row_twice(data: Path, plan: list[Shard]) -> None:
    table = pq.read_table(data / "shard-00001.parquet")
    pq.write_table(table.take([0, 1, 2, 2]), data / "shard-00001.parquet")


def with_rows_in_another_order(data: Path, plan: list[Shard]) -> None:
    table = pq.read_table(data / "shard-00001.parquet")
    pq.write_table(table.take([3, 2, 1, 0]), data / "shard-00001.parquet")


def with_other_columns(data: Path, plan: list[Shard]) -> None:
    table = pq.read_table(data / "shard-00001.parquet")
    pq.write_table(table.drop_columns(["margin"]), data / "shard-00001.parquet")


def with_a_shard_of_another_run(data: Path, plan: list[Shard]) -> None:
    (data / "shard-00001.parquet").unlink()
    write_shard(str(data.parent), plan[1], {"settings": {"search": {"objective": "mean"}}})


def with_a_pipe(data: Path, plan: list[Shard]) -> None:
    (data / "shard-00001.parquet").unlink()
    os.mkfifo(data / "shard-00001.parquet")


def cut(data: Path, plan: list[Shard]) -> None:
    path = data / "shard-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


# What is wrong with an output, and what is said of it.
FAULTS: dict[str, tuple[Fault, str]] = {
    "rows are missing": (without_rows, r"shard-00001\.parquet' has 3 of its 4 rows: remove it and run"),
    "a row is there twice": (with_a_row_twice, r"shard-00001\.parquet' holds other rows than those of shard-00001"),
    "rows changed places": (with_rows_in_another_order, r"shard-00001\.parquet' holds other rows"),
    "a column is missing": (with_other_columns, r"shard-00001\.parquet' is of another run, or was written anew"),
    "a shard is of another run": (with_a_shard_of_another_run, r"shard-00001\.parquet' is of another run"),
    "a shard is empty": (
        lambda data, _: (data / "shard-00001.parquet").write_bytes(b""),
        "shard-00001.parquet' is dam",
    ),
    "a shard is cut": (cut, r"shard-00001\.parquet' is damaged .*: remove it and run the same command again"),
    "a shard is a pipe": (with_a_pipe, r"shard-00001\.parquet' is a pipe"),
    "a shard is a copy of another": (
        lambda data, _: shutil.copy(data / "shard-00000.parquet", data / "shard-00001.parquet"),
        r"shard-00001\.parquet' holds other rows",
    ),
    "a shard has a second name": (
        lambda data, _: shutil.copy(data / "shard-00000.parquet", data / "shard-00003.parquet"),
        r"shard-00003\.parquet' is no shard of this run: remove it",
    ),
    "a shard has another extension": (
        lambda data, _: shutil.copy(data / "shard-00000.parquet", data / "shard-00000"),
        r"shard-00000' is no shard of this run: remove it",
    ),
    "a foreign table": (
        lambda data, _: pq.write_table(pa.table({"a": [1]}), data / "table.parquet"),
        r"table\.parquet' is no shard of this run: remove it",
    ),
    "a foreign table further down": (
        lambda data, _: storage.write_bytes(str(data / "old/table.parquet"), b"PAR1"),
        r"old/table\.parquet' is no shard of this run: remove it",
    ),
    "a link that leads nowhere": (
        lambda data, _: (data / "shard-00009.parquet").symlink_to("nowhere"),
        r"shard-00009\.parquet' leads nowhere: remove it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_output_that_is_not_the_plan_is_refused(output: str, plan: list[Shard], fault: str) -> None:
    bring_about, message = FAULTS[fault]
    bring_about(Path(output, "data"), plan)
    with pytest.raises(InputError, match=message):
        output_check.check_finished(output, plan, run_digest(IDENTITY))
    with pytest.raises(InputError, match=message):
        read(output, plan)


def test_a_finished_output_that_lacks_shards_is_refused(output: str, plan: list[Shard]) -> None:
    Path(output, "data/shard-00001.parquet").rename(Path(output, "data/.hidden"))
    assert output_check.check_finished(output, plan, run_digest(IDENTITY)) == {"shard-00000", "shard-00002"}
    with pytest.raises(InputError, match=r"1 of 3 shards were removed .*shard-00001\.parquet': run the same command"):
        read(output, plan)


def test_an_output_that_was_removed_at_work_is_refused(output: str, plan: list[Shard]) -> None:
    """Its last shard is written to a directory that knows nothing of the run."""
    shutil.rmtree(output)
    write_shard(output, plan[2])
    with pytest.raises(InputError, match=r"_run\.json' is missing: choose another output, or remove this one"):
        read(output, plan)
    with pytest.raises(InputError, match=r"has files in data but no _run\.json.*: remove them, or choose another"):
        claim_output(output, IDENTITY)


def test_other_settings_are_refused_before_models_are_compared(output: str) -> None:
    config = LinkConfig(
        input="a", output=output, knowledge_base="kb", language_model=EngineSettings(name="m"), rows_per_shard=4
    )
    storage.write_bytes(f"{output}/_run.json", identity_json(run_identity(config, [], {"language_model": "sha"})))
    check_settings(output, replace(config, verify_artifacts=False))
    with pytest.raises(
        ConfigurationError, match=r"holds a run that differs in settings\.input, settings\.score\.risk:"
    ):
        check_settings(output, replace(config, input="b", score=ScoreSettings(risk=0.5)))


def test_an_output_that_became_another_run_s_is_refused(output: str, plan: list[Shard]) -> None:
    storage.write_bytes(f"{output}/_run.json", b'{"settings": {}}')
    with pytest.raises(InputError, match=r"_run\.json' became another run's while this one was at work"):
        read(output, plan)
    with pytest.raises(ConfigurationError, match=r"holds a run that differs in settings\.search"):
        claim_output(output, IDENTITY)


@pytest.mark.parametrize("content", [b"", b'{"settings": {', b"\xff\xfe", b"[" * 100_000, b"[]", b"null"])
def test_a_damaged_claim_is_refused(output: str, plan: list[Shard], content: bytes) -> None:
    storage.write_bytes(f"{output}/_run.json", content)
    for check in (lambda: claim_output(output, IDENTITY), lambda: read(output, plan)):
        with pytest.raises(InputError, match=r"_run\.json' (is damaged|describes no run).*: choose another output"):
            check()


@pytest.mark.parametrize("content", [b"", b"[{", b"[]", b"null", b'{"a": 1}', b'[{"index": 0}]', b"[1]"])
def test_a_damaged_plan_is_refused(output: str, plan: list[Shard], content: bytes) -> None:
    storage.write_bytes(f"{output}/_plan.json", content)
    with pytest.raises(InputError, match=r"_plan\.json' is .*: remove it and run the same command again"):
        load_plan(output, NUM_ROWS)


def test_a_plan_comes_back_as_it_was_noted(plan: list[Shard], tmp_path: Path) -> None:
    assert save_plan(str(tmp_path), plan) == plan
    with pytest.raises(InputError, match="is not the plan of this run's 11 rows"):
        load_plan(str(tmp_path), NUM_ROWS + 1)


def test_a_shard_with_an_extension_type_is_refused(output: str, plan: list[Shard]) -> None:
    """Arrow makes such a type when it opens a file, and some types unpickle what the file holds."""
    path = Path(output, "data/shard-00001.parquet")
    planted = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1"] * ROWS_PER_SHARD))
    pq.write_table(pq.read_table(path).append_column("planted", planted), path)
    with pytest.raises(InputError, match=r"shard-00001\.parquet.*extension type"):
        read(output, plan)

"""The directory of a run: claim, plan, finished parts, exclusive commit of shards."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.errors import ConfigurationError, InputError, shown
from gemel_engine.pipeline.corpus import Shard, count_rows, plan_identity
from gemel_engine.pipeline.identity import differences, identity_json
from gemel_engine.storage import parquet
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_COLUMNS, PREDICTION_SCHEMA

RUN_KEY = b"gemel_run"  # in the metadata of a shard's footer


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Addresses of the files in a run's output directory, which is described in `pipeline.corpus`.

    Attributes:
        output: Address of the directory, local or `s3://`.
    """

    output: str

    @property
    def claim(self) -> str:
        """Return the address of the run's identity."""
        return f"{self.output}/_run.json"

    @property
    def plan(self) -> str:
        """Return the address of the shards of an ordered corpus."""
        return f"{self.output}/_plan.json"

    @property
    def ordered(self) -> str:
        """Return the directory of the corpus in the order of its surface forms."""
        return f"{self.output}/_ordered"

    @property
    def parts(self) -> str:
        """Return the directory of finished rows of unfinished shards."""
        return f"{self.output}/_parts"

    @property
    def marks(self) -> str:
        """Return the directory of the marks of batches that are being processed."""
        return f"{self.output}/_marks"

    @property
    def changes(self) -> str:
        """Return the directory of the knowledge base changes since the previous run."""
        return f"{self.output}/_changes"

    @property
    def data(self) -> str:
        """Return the directory of the finished shards."""
        return f"{self.output}/data"

    @property
    def report(self) -> str:
        """Return the address of the run's report."""
        return f"{self.output}/report.json"

    @property
    def examples(self) -> str:
        """Return the directory of prepared training examples."""
        return f"{self.output}/examples"

    @property
    def feature_mapper(self) -> str:
        """Return the directory of the trained feature mapper."""
        return f"{self.output}/feature_mapper"

    @property
    def tensorboard(self) -> str:
        """Return the directory of the training's TensorBoard events."""
        return f"{self.output}/tensorboard"

    def shard(self, name: str) -> str:
        """Return the address of a finished shard."""
        return f"{self.data}/{name}.parquet"

    def new_part(self, name: str) -> str:
        """Return a unique address for finished rows of the shard `name`."""
        return f"{self.parts}/{name}/{uuid.uuid4().hex}.parquet"


def save_plan(output: str, plan: Sequence[Shard]) -> list[Shard]:
    """Note the shards of a run, unless another run was first; returns those that are noted."""
    storage.create_exclusive(RunDirectory(output).plan, json.dumps(plan_identity(plan)).encode())
    noted = load_plan(output, count_rows(plan))
    assert noted is not None, "created just now, or before"
    return noted


def load_plan(output: str, expected_rows: int) -> list[Shard] | None:
    """Return the shards that `save_plan` noted, if it did.

    Raises:
        InputError: What it noted is damaged, or is not of `expected_rows` rows.
    """
    uri = RunDirectory(output).plan
    if not storage.exists(uri):
        return None
    remedy = "remove it and run the same command again"
    found = storage.read_json(uri, remedy)
    try:
        plan = [Shard(**fields) for fields in found]
        is_whole = count_rows(plan) == expected_rows and [shard.index for shard in plan] == list(range(len(plan)))
    except TypeError:  # other JSON than `plan_identity` makes
        plan, is_whole = [], False
    if not is_whole:
        raise InputError(f"{shown(uri)} is not the plan of this run's {expected_rows} rows: {remedy}")
    return plan


def claim_output(output: str, identity: dict[str, Any]) -> None:
    """Make the output this run's, or see that it already is.

    Args:
        output: Directory of the run.
        identity: What makes up the run, as JSON: settings, input files, artifacts.

    Raises:
        ConfigurationError: The output belongs to a run that differs; the message names where.
        InputError: It has shards, but nothing says of which run.
    """
    if data_files(output) and not is_claimed(output):  # in this order: a run claims before it writes shards
        raise InputError(
            f"{shown(output)} has files in data but no _run.json, so that nobody knows of which run they are: remove "
            "them, or choose another output"
        )
    if not storage.create_exclusive(RunDirectory(output).claim, identity_json(identity)):
        check_claim(output, identity)


def is_claimed(output: str) -> bool:
    """Whether the output is a run's already."""
    return storage.exists(RunDirectory(output).claim)


def check_claim(output: str, identity: dict[str, Any]) -> None:
    """Raise if the output, which is a run's, is not this run's.

    Raises:
        ConfigurationError: It belongs to a run that differs; the message names where.
        InputError: What it says of its run is damaged.
    """
    existing = load_claim(output)
    if existing != json.loads(identity_json(identity)):
        raise ConfigurationError(
            f"{output} holds a run that differs in {', '.join(differences(existing, identity))}: "
            "choose another output, or remove it"
        )


def load_claim(output: str) -> dict[str, Any]:
    """Return the identity of the run that the output belongs to.

    Raises:
        InputError: It is missing or damaged.
    """
    uri, remedy = RunDirectory(output).claim, "choose another output, or remove this one"
    found = storage.read_json(uri, remedy)
    if not isinstance(found, dict):
        raise InputError(f"{shown(uri)} describes no run: {remedy}")
    return found


def data_files(output: str) -> set[str]:
    """Return the names of all files in `data/`, without those that somebody has begun to write.

    Raises:
        InputError: One is a link that leads nowhere.
    """
    try:
        return {name for name in storage.list_files(RunDirectory(output).data) if not name.startswith(".")}
    except FileNotFoundError as error:
        raise InputError(
            f"{shown(str(error.filename))} leads nowhere: remove it and run the same command again"
        ) from error


def finished_shards(output: str) -> set[str]:
    """Names of the shards that are complete."""
    return {name.removesuffix(".parquet") for name in data_files(output) if name.endswith(".parquet")}


def write_part(output: str, shard: Shard, table: pa.Table) -> str:
    """Store finished rows of a shard; returns their address. `table` has a column `row` beside the predictions."""
    uri = RunDirectory(output).new_part(shard.name)
    storage.write_bytes(uri, parquet_bytes(table))
    return uri


def commit_shard(output: str, shard: Shard, part_uris: Sequence[str], run: str = "") -> bool:
    """Put a shard's parts together in the order of its input rows, unless another driver was first.

    Args:
        output: Directory of the run.
        shard: What the parts are of.
        part_uris: As `write_part` returned them.
        run: `run_digest` of the run.

    Returns:
        Whether this call created the shard.

    Raises:
        AssertionError: The parts are not exactly the shard's rows.
        InputError: Parts have been removed.
    """
    finished = RunDirectory(output).shard(shard.name)
    try:
        parts = [parquet.from_bytes(storage.read_bytes(uri), uri) for uri in part_uris]
    except FileNotFoundError as error:
        if not storage.exists(finished):
            raise InputError(
                f"parts of {shown(finished)} were removed while the run was at work: run the same command again"
            ) from error
        return False  # another run finished all shards, and removed the parts
    table = pa.concat_tables(parts).sort_by("row")
    assert table["row"].to_pylist() == list(range(shard.start, shard.stop)), f"{shard.name}: rows lost or repeated"
    table = table.select(PREDICTION_SCHEMA.names).replace_schema_metadata({RUN_KEY: run})
    return storage.create_exclusive(finished, parquet_bytes(table))


def read_columns(directory: str, columns: Sequence[str]) -> pa.Table:
    """Small columns of all Parquet files of a directory."""
    return parquet.read_tables(directory, PREDICTION_COLUMNS | MENTION_COLUMNS, columns, columns)

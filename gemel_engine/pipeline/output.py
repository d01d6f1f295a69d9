"""The output directory of a run: claim, plan, finished parts, exclusive commit of shards.

    OUTPUT/_run.json                    identity of the run; created exclusively
    OUTPUT/_mentions/...                output of the search for mentions, if the input are documents
    OUTPUT/_plan.json                   shards of the ordered corpus, if there is one; created
                                        exclusively
    OUTPUT/_ordered/...                 corpus in the order of its surface forms, without pictures
    OUTPUT/_parts/00003/...             finished rows of an unfinished shard
    OUTPUT/_marks/...                   marks of batches that are being processed, see `isolation`
    OUTPUT/_changes/...                 what changed in the knowledge base, see `linking.incremental`
    OUTPUT/data/shard-00003.parquet     exists if and only if the shard is complete; created
                                        exclusively
    OUTPUT/_plan-01234567/...           sample of `gemel plan`, while it is at work
    OUTPUT/_report.json                 counts and costs of the run

Everything but `data/` begins with an underscore, so that readers of Parquet directories skip it.
`data/` is a plain Parquet directory at any time and contains no row twice: the first driver that
finishes a shard creates it, and a rerun skips it. The footer of each shard contains the digest of
its run; `output_check` compares all shards with the plan.
"""

from __future__ import annotations

import errno
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gemel_engine import storage
from gemel_engine.errors import ConfigurationError, InputError, redacted, shown
from gemel_engine.pipeline.corpus import Shard, count_rows, plan_identity
from gemel_engine.pipeline.identity import differences, identity_json, run_identity
from gemel_engine.storage import parquet
from gemel_engine.storage.parquet import parquet_bytes
from gemel_engine.types import MENTION_COLUMNS, PREDICTION_COLUMNS, PREDICTION_SCHEMA

if TYPE_CHECKING:
    from gemel_engine.config.settings import JobConfig

_UNUSABLE = (FileNotFoundError, NotADirectoryError, PermissionError)
RUN_KEY = b"gemel_run"  # in the metadata of a shard's footer


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Addresses of the files in a run's output directory.

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
    def mentions(self) -> str:
        """Return the output directory of the search for mentions."""
        return f"{self.output}/_mentions"

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
        return f"{self.output}/_report.json"

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

    def new_sample(self) -> str:
        """Return a unique directory for the sample of `gemel plan`."""
        return f"{self.output}/_plan-{uuid.uuid4().hex[:8]}"

    def new_part(self, shard: int) -> str:
        """Return a unique address for finished rows of a shard, given by its index."""
        return f"{self.parts}/{shard:05d}/{uuid.uuid4().hex}.parquet"


def save_plan(output: str, plan: Sequence[Shard]) -> list[Shard]:
    """Save the shards of a run unless another driver has saved some; return the saved shards."""
    storage.create_exclusive(RunDirectory(output).plan, json.dumps(plan_identity(plan)).encode())
    noted = load_plan(output, count_rows(plan))
    assert noted is not None, "created just now, or before"
    return noted


def load_plan(output: str, expected_rows: int) -> list[Shard] | None:
    """Return the shards that `save_plan` saved, None without any.

    Raises:
        InputError: The saved plan is damaged, or does not have `expected_rows` rows.
    """
    uri = RunDirectory(output).plan
    if not storage.exists(uri):
        return None
    remedy = "remove it and run the same command again"
    found = storage.read_json(uri, remedy)
    try:
        plan = [Shard(**fields) for fields in found]
        is_whole = count_rows(plan) == expected_rows and [shard.index for shard in plan] == list(range(len(plan)))
    except TypeError:  # JSON of another structure than that of `plan_identity`
        plan, is_whole = [], False
    if not is_whole:
        raise InputError(f"{shown(uri)} is not the plan of this run's {expected_rows} rows: {remedy}")
    return plan


def claim_output(output: str, identity: dict[str, Any]) -> None:
    """Claim the output for this run; raise if it belongs to a different run.

    Args:
        output: Output directory.
        identity: `run_identity` of the run.

    Raises:
        ConfigurationError: The output belongs to a different run, of which the message names the
            settings, or can't be written to.
        InputError: The output contains shards but no claim.
    """
    with _explain_unusable(output):
        if data_files(output) and not is_claimed(output):  # in this order: runs claim first
            raise InputError(
                f"{shown(output)} has files in data but no _run.json, so that nobody knows of which run they are: "
                "remove them, or choose another output"
            )
        is_ours = storage.create_exclusive(RunDirectory(output).claim, identity_json(identity))
    if not is_ours:
        check_claim(output, identity)


def is_claimed(output: str) -> bool:
    """Return whether the output belongs to a run.

    Raises:
        ConfigurationError: The output can't be read.
    """
    with _explain_unusable(output):
        return storage.exists(RunDirectory(output).claim)


@contextmanager
def _explain_unusable(output: str) -> Iterator[None]:
    """Turn the errors of an output that is no directory, or no accessible one, into ConfigurationError."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, _UNUSABLE) and error.errno not in (errno.EROFS, errno.ENAMETOOLONG):
            raise
        raise ConfigurationError(
            f"the output {shown(output)} can't be used ({redacted(str(error), output)}): give a directory, or a "
            "prefix in a bucket that exists, where files may be created, read and removed"
        ) from error


def check_claim(output: str, identity: dict[str, Any]) -> None:
    """Raise if the output belongs to a different run.

    Raises:
        ConfigurationError: It belongs to a different run; the message names the settings.
        InputError: The claim is missing or damaged.
    """
    existing = load_claim(output)
    if existing != json.loads(identity_json(identity)):
        raise _other_run(output, differences(existing, identity))


def check_settings(output: str, config: JobConfig) -> None:
    """Raise if the output belongs to a run with other settings, before anything slow is compared.

    Raises:
        ConfigurationError: It belongs to a run with other settings; the message names them.
        InputError: The claim is damaged.
    """
    if not is_claimed(output):
        return
    settings = {"settings": run_identity(config, None, {})["settings"]}
    if names := differences({"settings": load_claim(output).get("settings")}, settings):
        raise _other_run(output, names)


def _other_run(output: str, names: Sequence[str]) -> ConfigurationError:
    return ConfigurationError(
        f"{output} holds a run that differs in {', '.join(names)}: choose another output, or remove it"
    )


def load_claim(output: str) -> dict[str, Any]:
    """Return the identity of the run that the output belongs to.

    Raises:
        InputError: The claim is missing or damaged.
    """
    uri, remedy = RunDirectory(output).claim, "choose another output, or remove this one"
    found = storage.read_json(uri, remedy)
    if not isinstance(found, dict):
        raise InputError(f"{shown(uri)} describes no run: {remedy}")
    return found


def data_files(output: str) -> set[str]:
    """Return the names of all files in `data/` except unfinished writes, which begin with a dot.

    Raises:
        InputError: `data` is a broken link.
    """
    try:
        return {name for name in storage.list_files(RunDirectory(output).data) if not name.startswith(".")}
    except FileNotFoundError as error:
        raise InputError(
            f"{shown(str(error.filename))} leads nowhere: remove it and run the same command again"
        ) from error


def finished_shards(output: str) -> set[str]:
    """Return the names of the complete shards."""
    return {name.removesuffix(".parquet") for name in data_files(output) if name.endswith(".parquet")}


def write_part(output: str, shard: int, table: pa.Table) -> str:
    """Store finished rows of a shard, with a column `row`; return their address.

    Args:
        output: Output directory of the run.
        shard: Index of the shard.
        table: The rows.
    """
    uri = RunDirectory(output).new_part(shard)
    storage.write_bytes(uri, parquet_bytes(table))
    return uri


def commit_shard(output: str, shard: Shard, part_uris: Sequence[str], run: str = "") -> bool:
    """Join the parts of a shard in the order of its input rows, unless another driver was first.

    Args:
        output: Output directory.
        shard: The shard.
        part_uris: Addresses of its parts, as returned by `write_part`.
        run: `run_digest` of the run.

    Returns:
        Whether this call created the shard.

    Raises:
        AssertionError: The parts do not contain each row of the shard exactly once.
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
        return False  # another driver finished all shards and removed the parts
    table = pa.concat_tables(parts).sort_by("row")
    assert table["row"].to_pylist() == list(range(shard.start, shard.stop)), f"{shard.name}: rows lost or repeated"
    table = table.drop_columns(["row"]).replace_schema_metadata({RUN_KEY: run})
    return storage.create_exclusive(finished, parquet_bytes(table))


def has_predictions(schema: pa.Schema) -> bool:
    """Return whether a table has the columns of a shard: predictions, then those of the input."""
    return bool(pa.schema(list(schema)[: len(PREDICTION_SCHEMA)]) == PREDICTION_SCHEMA)


def read_columns(directory: str, columns: Sequence[str]) -> pa.Table:
    """Read small columns of all Parquet files of a directory."""
    return parquet.read_tables(directory, PREDICTION_COLUMNS | MENTION_COLUMNS, columns, columns)

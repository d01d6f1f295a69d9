"""The identity of a run: saved in `_run.json`, and as a hash in the footer of each shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gemel_engine.errors import shown

if TYPE_CHECKING:
    from gemel_engine.config.settings import JobConfig
    from gemel_engine.fingerprints import Contents

# Settings that change no row of the output, by full name: a continued run may use other values.
_NOT_IDENTITY = (
    "resources",
    "output",
    "max_failed_fraction",
    "verify_artifacts",
    "dry_run",  # of linking
    "find_mentions",  # this and the next belong to the search, whose output is linked
    "finder",
    "workers",  # this and what follows: of training
    "examples",
    "optimisation.max_pack_tokens",
    "language_model.activation_checkpointing",
)
# Settings and artifacts in which an incremental run may differ from the previous run.
_MAY_CHANGE = ("knowledge_base", "evidence", "previous", "calibration", "weights", "output_columns")


def run_identity(config: JobConfig, plan: object, contents: Contents, previous: str | None = None) -> dict[str, Any]:
    """Return what makes up a run, as JSON: settings, input files, models and artifacts.

    Args:
        config: The run.
        plan: `plan_identity` of its corpus, or of each split.
        contents: Fingerprints and manifests of its models and artifacts.
        previous: Identity of the previous run; None if the run is not incremental.
    """
    from gemel_engine.config.loading import config_json  # imports tyro; only the driver needs it

    settings = json.loads(config_json(config))
    for name in _NOT_IDENTITY:
        *groups, key = name.split(".")
        group = settings
        for part in groups:
            group = group.get(part, {})
        group.pop(key, None)
    identity = {"settings": settings, "plan": plan, "artifacts": contents}
    return identity if previous is None else {**identity, "previous": previous}


def identity_json(identity: Mapping[str, Any]) -> bytes:
    """Return an identity as canonical JSON."""
    return json.dumps(identity, indent=2, sort_keys=True).encode()


def run_digest(identity: Mapping[str, Any]) -> str:
    """Return the hash of an identity that the footer of each shard contains."""
    return hashlib.sha256(identity_json(identity)).hexdigest()


def incremental_differences(previous: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Return the differences that an incremental run must not have from the previous run."""
    return differences(_unchanging(previous), _unchanging(json.loads(identity_json(identity))))


def differences(left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the full names of the keys in which two JSON objects differ, of plans with the first file."""
    names = []
    for key in sorted({*left, *right}):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(f"{prefix}{key}{_first_change(a, b)}")
    return names


def _first_change(left: object, right: object) -> str:
    """Say which file two plans differ in first; return nothing for other values."""
    before, now = _shards_by_file(left), _shards_by_file(right)
    for uri in {**before, **now}:
        if before.get(uri) != now.get(uri):
            return f" ({shown(uri)} is not as it was then: put it back, with its time, as `cp -p` does)"
    return ""


def _shards_by_file(plan: object) -> dict[str, list[dict[str, Any]]]:
    """Return the shards of each file, without their places in the plan; none if it is no plan."""
    files: dict[str, list[dict[str, Any]]] = {}
    for shard in plan if isinstance(plan, list) else []:
        if isinstance(shard, dict) and "uri" in shard:
            files.setdefault(str(shard["uri"]), []).append({**shard, "index": None})
    return files


def _unchanging(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an identity that an incremental run must share with the previous run."""
    parts = {
        part: {key: value for key, value in identity[part].items() if key not in _MAY_CHANGE}
        for part in ("settings", "artifacts")
    }
    return {**parts, "input files": identity["plan"]}

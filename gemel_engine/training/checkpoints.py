"""Protects Ray Train's record of the checkpoints from being cut off by a kill."""

from __future__ import annotations

import json
import logging

from gemel_engine import storage
from gemel_engine.errors import shown

logger = logging.getLogger(__name__)

# Ray Train writes this record in place: a kill may cut it off, which prevents any continuation.
_RECORD = "checkpoints/checkpoint_manager_snapshot.json"


def keep_record(output: str) -> None:
    """Copy the record of the checkpoints, unless it is being written; in S3 it is complete or absent."""
    if storage.local_path(output) is None:
        return
    record = _whole_record(f"{output}/{_RECORD}")
    if record is not None:
        storage.write_bytes(f"{output}/{_RECORD}.kept", record)


def restore_record(output: str) -> None:
    """Replace a record that a kill cut off with the kept one; without any, training restarts.

    The checkpoints of the kept record exist: Ray Train removes those of an older record when the
    new one is complete.
    """
    uri = f"{output}/{_RECORD}"
    path = storage.local_path(uri)
    if path is None or not path.exists() or _whole_record(uri) is not None:
        return
    logger.warning("%s was cut off: training goes on from the checkpoint before it", shown(uri))
    if (kept := _whole_record(f"{uri}.kept")) is not None:
        storage.write_bytes(uri, kept)
    else:
        path.unlink()


def _whole_record(uri: str) -> bytes | None:
    try:
        record = storage.read_bytes(uri)
        return record if isinstance(json.loads(record), dict) else None
    except (FileNotFoundError, ValueError):
        return None

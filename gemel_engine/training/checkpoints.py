"""TODO: training.checkpoints."""

from __future__ import annotations

import json
import logging

from gemel_engine import storage
from gemel_engine.errors import shown

logger = logging.getLogger(__name__)


# Ray Train writes its record of the checkpoints in place: a kill may cut it off, and nothing goes on from that.
_RECORD = "checkpoints/checkpoint_manager_snapshot.json"


def keep_record(output: str) -> None:
    """Copy the record of the checkpoints, unless somebody is writing it."""
    record = _whole_record(f"{output}/{_RECORD}")
    if record is not None:
        storage.write_bytes(f"{output}/{_RECORD}.kept", record)


def restore_record(output: str) -> None:
    """Put the kept record in place of one that was cut off by a kill; without any, training begins anew.

    The checkpoints of the kept one are there: Ray Train removes those of an older record when the new one is whole. In
    S3 a record is whole, or not there.
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

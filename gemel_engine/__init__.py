"""Multimodal entity linking by generating entity names."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemel_engine.config.loading import load_config
    from gemel_engine.config.settings import LinkConfig
    from gemel_engine.linker import Linker

__all__ = ["LinkConfig", "Linker", "load_config"]

_MODULES = {
    "LinkConfig": "gemel_engine.config.settings",
    "Linker": "gemel_engine.linker",
    "load_config": "gemel_engine.config.loading",
}

# Ray reads these settings when it is imported, so they are set before any module of this package
# imports it.

# Seconds for which Ray Data keeps the resources of a killed driver reserved (Ray's default is 180).
# The next driver waits for them.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
# Ray Data's newer autoscaler rounds down the fractions of CPUs and GPUs left on each node, so actor
# pools stay small although there is room, even when nodes join.
os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
# Ray Train asks the dashboard every second whether its controller is alive. A Ray that a job starts
# for itself has no dashboard, and each request would log a warning.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Failed to query Ray Train Controller actor state")
# Under `uv run`, Ray would upload the working directory and create an environment for each worker,
# in which relative paths point elsewhere. Workers use the driver's Python and directory instead.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import gemel_engine` itself loads no library."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value

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

# Ray reads some of its settings when it is imported, so they are made before any module of this package does that.

# Ray Data reserves resources for a driver, and for so many seconds after it was killed: 180, were this not here. The
# next driver would wait for them.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
# Ray Data's newer way to share out a cluster rounds down what fractions of CPUs and GPUs leave over on each node: pools
# stay small then although there is room, on nodes that join, too.
os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
# Ray Train asks a cluster's dashboard every second whether its controller lives, and warns each time where there is
# none, as in the Ray that a job starts for itself.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Failed to query Ray Train Controller actor state")
# Behind `uv run` Ray would upload the working directory and have uv make an environment for each worker, where relative
# paths mean other places. The workers take the driver's Python and directory instead, as they do without uv.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import gemel_engine` alone waits for no library."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value

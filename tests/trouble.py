"""What can happen to files: bytes that change, a disk that is full."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


def damage(path: Path, changes: Sequence[tuple[int, int]]) -> bool:
    """Set bytes of a file, by position and value, positions beyond its end counted on from its start.

    Returns:
        Whether that changed it.
    """
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    is_changed = content != path.read_bytes()
    path.write_bytes(content)
    return is_changed


@contextmanager
def small_file_system(directory: Path, size: str) -> Iterator[Path]:
    """A file system of this size at a new directory; who uses it is skipped where it can't be mounted."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)

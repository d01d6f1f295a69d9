"""What can happen to files: bytes that change, a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from gemel_engine.storage.manifest import write_manifest


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


def edit_manifest(path: Path, changes: Mapping[str, object]) -> None:
    """Change what an artifact says of itself, and its checksum with it, as a forger would."""
    contents = json.loads(path.read_text()) | changes
    del contents["manifest_sha256"]
    write_manifest(path, contents.pop("format_version"), contents)


def forget_checksum(path: Path, *, format_version: int, also: Sequence[str] = ()) -> None:
    """Make a manifest one of an earlier release, which had no checksum of its own and nothing of `also`."""
    manifest = json.loads(path.read_text()) | {"format_version": format_version}
    new = {"manifest_sha256", *also}
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key not in new}))


def make_endless(path: Path) -> None:
    """Put a pipe in the place of a file: whoever reads it waits for ever."""
    path.unlink()
    os.mkfifo(path)


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

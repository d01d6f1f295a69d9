"""Fingerprints: every process of a run compares its models and artifacts with those of the driver.

The files of a language model are too large to be read at each start. Its fingerprint covers small
files completely and, of each tensor in a larger file, the name, type, shape and some values at the
beginning, middle and end. It changes if a model is trained further, merged or quantised; an edit of
single values elsewhere is not detected. A model on the hub is known by its commit, however many of
its files are on this machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemel_engine import storage
from gemel_engine.errors import ArtifactError, not_loadable, shown

Contents = Mapping[str, Any]  # fingerprint or manifest of each model and artifact, by name

_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")
_WHOLE_BYTES = 1 << 24  # smaller files are read whole
_SAMPLED_BYTES = 1 << 14
_LONGEST_HEADER = 10**8  # the limit of safetensors itself
_NUM_SAMPLES = 512  # in a large file without a list of its tensors


def read_manifest_at(uri: str) -> Any:
    """Return the manifest at an address, parsed as JSON.

    Raises:
        ArtifactError: The manifest is missing or damaged.
    """
    try:
        return json.loads(storage.read_bytes(uri))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{shown(uri)} is missing or damaged ({error}); build the artifact again") from error


def json_sha256(value: Any) -> str:
    """Return a SHA-256 hash of a manifest or another JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checkpoint_fingerprint(name_or_path: str, what: str = "language model") -> str:
    """Return a hash that identifies a model; the module's docstring says what it covers.

    Args:
        name_or_path: Local directory, or name on the model hub.
        what: Kind of the model, for the message.

    Raises:
        ArtifactError: The model does not exist or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        directory = Path(name_or_path)
        if not (directory / "config.json").is_file():
            from transformers.utils.hub import cached_file  # takes seconds

            return Path(str(cached_file(name_or_path, "config.json"))).parent.name
        for path in sorted(directory.iterdir()):
            if path.suffix in _SUFFIXES and path.is_file():
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                with path.open("rb") as stream:
                    for start, stop in _samples(path):
                        stream.seek(start)
                        digest.update(stream.read(stop - start))
    except OSError as error:
        raise not_loadable(what, name_or_path, error) from error
    return digest.hexdigest()


def files_digest(directory: Path, *, whole: bool = True) -> str:
    """Return a SHA-256 hash of the names and contents of all files below a directory, bytecode apart.

    Args:
        directory: The directory.
        whole: Whether to read large files completely; else what a fingerprint covers of them.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
        with path.open("rb") as stream:
            if whole:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for start, stop in _samples(path):
                stream.seek(start)
                digest.update(stream.read(stop - start))
    return digest.hexdigest()


def check_content(began_with: Contents | None, name: str, address: str | None, found: Any) -> None:
    """Raise if a model or artifact differs from the one that the run began with.

    Args:
        began_with: Fingerprint or manifest of each model and artifact, by name; None: no check.
        name: Name of the model or artifact.
        address: Address of the model or artifact, for the message.
        found: Its fingerprint or manifest in this process.

    Raises:
        ArtifactError: The two differ.
    """
    if began_with is not None and began_with.get(name) != found:
        raise ArtifactError(
            f"the {name.replace('_', ' ')} {address} is not the one that the run began with: it was replaced, or "
            "differs on this node; put the old one back on all nodes, or link to a new output"
        )


def _samples(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of a file that its fingerprint covers."""
    size = path.stat().st_size
    if size <= _WHOLE_BYTES:
        yield 0, size
        return
    header, *ranges = _tensor_ranges(path, size) if path.suffix == ".safetensors" else [(0, 0)]
    yield header
    step = size // _NUM_SAMPLES
    for start, stop in ranges or [(start, start + step) for start in range(0, size, step)]:
        last = max(start, stop - _SAMPLED_BYTES)
        for begin in (start, (start + last) // 2, last):
            yield begin, min(begin + _SAMPLED_BYTES, stop)


def _tensor_ranges(path: Path, size: int) -> list[tuple[int, int]]:
    """Return the byte ranges of header and tensors; one empty range if the header is damaged."""
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if start > min(size, _LONGEST_HEADER):
            return [(0, 0)]
        try:
            header = json.loads(stream.read(start - 8))
            tensors = [tuple(tensor["data_offsets"]) for name, tensor in header.items() if name != "__metadata__"]
            return [(0, start), *((start + first, start + end) for first, end in sorted(tensors))]
        except (ValueError, TypeError, KeyError, AttributeError):
            return [(0, 0)]

"""The S3 half of `storage`, on s3fs.

Credentials, region and endpoint come only from the environment, and no secret is pickled into a
task: a file system that is sent to another process builds its client from the environment there. An
address is `s3://bucket/key` without a trailing slash.

Errors: FileNotFoundError for a missing object or bucket, ConfigurationError for refused
credentials, OSError for any other failure, after `AWS_MAX_ATTEMPTS` attempts.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import NativeFile, PythonFile
from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from gemel_engine.errors import ConfigurationError, redacted, shown

_MAX_ATTEMPTS = 10  # half a minute from the first to the last
_MAX_CONFLICTS = 8
_CONFLICT_PAUSE_SECONDS = 0.05
_MAX_KEYS_PER_DELETION = 1000

_Environment = tuple[tuple[str, str], ...]


def file_system() -> FileSystem:
    """Return this process's file system for pyarrow; its paths are `bucket/key`."""
    return PyFileSystem(FSSpecHandler(_client()))


def head(uri: str) -> tuple[int, str] | None:
    """Return the size in bytes and the ETag of an object, or None if there is none."""
    try:
        with _builtin_errors(uri):
            found = _client().info(uri)
    except FileNotFoundError:
        return None
    return (found["size"], found["ETag"].strip('"')) if found["type"] == "file" else None


def walk(uri: str) -> Iterator[tuple[str, int, str]]:
    """Yield address, size in bytes and ETag of every object below `uri/`; none without a bucket."""
    found: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError), _builtin_errors(uri):
        found = _client().find(uri, detail=True)
    for item in found.values():
        address = f"s3://{item['Key']}"
        if address.startswith(f"{uri}/") and not address.endswith("/"):  # not a directory marker
            yield address, item["size"], item["ETag"].strip('"')


def read_bytes(uri: str, limit: int | None = None, offset: int = 0) -> bytes:
    """Return the content of an object from a byte on, or at most `limit` bytes of it."""
    start, end = (offset or None, None) if limit is None else (offset, offset + limit)
    with _builtin_errors(uri):
        try:
            content: bytes = _client().cat_file(uri, start=start, end=end)
        except OSError as error:
            if error.errno == errno.EINVAL and limit is not None:  # a range of an empty object
                return b""
            raise
    return content


def open_file(uri: str, size: int, etag: str) -> NativeFile:
    """Open an object for reading, without any request before the first read.

    A read raises OSError if the object no longer has this ETag.
    """
    stream = _client().open(uri, size=size)
    stream.details = {"name": stream.path, "size": size, "ETag": etag}  # which it would ask for
    stream.read_kw = {**stream.read_kw, "IfMatch": f'"{etag}"'}
    return PythonFile(stream, mode="r")


def copy_to_local(uri: str, etag: str, path: Path) -> None:
    """Copy an object into a local file.

    Raises:
        OSError: The object no longer has this ETag.
    """
    with _builtin_errors(uri):
        _client().get_file(uri, str(path))
    found = head(uri)
    if found is None or found[1] != etag:
        raise OSError(f"{shown(uri)} was replaced while it was read: run the job again")


def copy_from_local(path: Path, uri: str) -> None:
    """Copy a local file into an object, or replace it; a large one is sent in pieces."""
    with _builtin_errors(uri):
        _client().put_file(str(path), uri)


def write_bytes(uri: str, data: bytes) -> None:
    """Write or replace an object."""
    with _builtin_errors(uri):
        _client().pipe_file(uri, data)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write an object unless it exists; return whether this call created it."""
    for attempt in range(_MAX_CONFLICTS):
        with _builtin_errors(uri):
            try:
                _client().pipe_file(uri, data, mode="create")
            except OSError as error:
                if _status(error) == 412:
                    return False
                if _status(error) != 409:  # 409: a concurrent conditional write of this key
                    raise
                time.sleep(_CONFLICT_PAUSE_SECONDS * 2**attempt)
            else:
                return True
    raise OSError(f"{shown(uri)}: {_MAX_CONFLICTS} conditional writes in a row met another one; run the job again")


def remove_tree(uri: str) -> None:
    """Remove every object below `uri/`."""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    keys = [{"Key": found.removeprefix(f"s3://{bucket}/")} for found, _, _ in walk(uri)]
    for start in range(0, len(keys), _MAX_KEYS_PER_DELETION):
        deletion = {"Objects": keys[start : start + _MAX_KEYS_PER_DELETION], "Quiet": True}
        with _builtin_errors(uri):
            answer = _client().call_s3("delete_objects", Bucket=bucket, Delete=deletion)
        if failures := answer.get("Errors"):  # which s3fs's own removal ignores
            first = redacted(str(failures[0]), uri)
            raise OSError(f"{shown(uri)}: {len(failures)} objects could not be removed, the first: {first}")


def _client() -> Any:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _client_of(tuple(sorted(environment.items())))


# Clients are cached by the variables they were built from: a changed environment gets a new client.
@lru_cache(maxsize=4)
def _client_of(environment: _Environment) -> Any:
    import s3fs  # takes half a second, not needed for local files

    variables = dict(environment)
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    if endpoint and "@" in endpoint:
        raise ConfigurationError(
            f"AWS_ENDPOINT_URL is {shown(endpoint)}: leave credentials out; they belong in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    attempts = variables.get("AWS_MAX_ATTEMPTS", str(_MAX_ATTEMPTS))
    if not attempts.isdecimal() or int(attempts) < 1:
        raise ConfigurationError(f"AWS_MAX_ATTEMPTS is {attempts!r}: give a whole number from 1")
    s3fs.core.set_custom_error_handler(lambda error: _response(error).get("HTTPStatusCode", 0) >= 500)
    client = s3fs.S3FileSystem(
        endpoint_url=endpoint,
        client_kwargs={"region_name": variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION")},
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},  # s3fs retries itself
            "max_pool_connections": 32,
            "s3": {"addressing_style": "path" if endpoint else "auto"},  # other servers: no host per bucket
        },
        max_concurrency=1,  # one request per object, without a request for its size
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    client.retries = int(attempts)
    return client


@contextmanager
def _builtin_errors(uri: str) -> Iterator[None]:
    """Convert the client's errors to those in the module's docstring.

    The client's messages may contain addresses with secrets in their queries: messages are
    redacted, and the client's exceptions are left out of tracebacks.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
    from botocore.parsers import ResponseParserError

    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown(uri)}: no such object or bucket") from None
    except (PermissionError, NoCredentialsError, PartialCredentialsError) as error:
        raise _refused(uri, error) from None
    except (OSError, BotoCoreError, ClientError, ResponseParserError) as error:
        if _status(error) in (401, 403):
            raise _refused(uri, error) from None
        message, number = f"{shown(uri)}: {redacted(str(error), uri)}", getattr(error, "errno", None)
        raise (OSError(message) if number is None else OSError(number, message)) from None


def _refused(uri: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{shown(uri)}: access refused ({redacted(str(error), uri)}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_REGION, AWS_ENDPOINT_URL and the permissions of the bucket"
    )


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error of s3fs or of its cause, the client's error."""
    found = _response(error if hasattr(error, "response") else error.__cause__)
    return found.get("HTTPStatusCode")


def _response(error: BaseException | None) -> dict[str, Any]:
    """Return the metadata of the response in a client's error; empty if there is none."""
    answer: dict[str, Any] = getattr(error, "response", None) or {}
    return dict(answer.get("ResponseMetadata", {}))

"""The S3 half of `storage`, on s3fs.

Credentials, region and endpoint come from the environment alone, and no secret is ever pickled into a task: a file
system that is sent to another process builds its client from the environment there. An address is `s3://bucket/key`
without a slash at its end.

Errors: FileNotFoundError for a missing object or bucket, ConfigurationError for refused credentials, OSError for any
other failure, after as many attempts as `AWS_MAX_ATTEMPTS` says.
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

from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

from gemel_engine.errors import ConfigurationError, redacted, shown

_MAX_ATTEMPTS = 10  # s3fs waits half a minute between the first and the last
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
    """Yield the address, size in bytes and ETag of every object under `uri/`; nothing if the bucket does not exist."""
    found: dict[str, dict[str, Any]] = {}
    with suppress(FileNotFoundError), _builtin_errors(uri):
        found = _client().find(uri, detail=True)
    for item in found.values():
        address = f"s3://{item['Key']}"
        if address.startswith(f"{uri}/") and not address.endswith("/"):  # an empty object that stands for a directory
            yield address, item["size"], item["ETag"].strip('"')


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """Read an object, or at most its first `limit` bytes."""
    with _builtin_errors(uri):
        try:
            content: bytes = _client().cat_file(uri, start=None if limit is None else 0, end=limit)
        except OSError as error:
            if error.errno == errno.EINVAL and limit is not None:  # the range of an empty object
                return b""
            raise
    return content


def copy_to_local(uri: str, etag: str, path: Path) -> None:
    """Copy an object into a local file; OSError if it is no longer the version with this ETag."""
    with _builtin_errors(uri):
        _client().get_file(uri, str(path))
    found = head(uri)
    if found is None or found[1] != etag:
        raise OSError(f"{shown(uri)} was replaced while it was read: run the job again")


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object, replacing what was there."""
    with _builtin_errors(uri):
        _client().pipe_file(uri, data)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write an object unless there is one already, and tell whether this call did."""
    for attempt in range(_MAX_CONFLICTS):
        with _builtin_errors(uri):
            try:
                _client().pipe_file(uri, data, mode="create")
            except OSError as error:
                if _status(error) == 412:
                    return False
                if _status(error) != 409:  # 409: another conditional write of this key was under way
                    raise
                time.sleep(_CONFLICT_PAUSE_SECONDS * 2**attempt)
            else:
                return True
    raise OSError(f"{shown(uri)}: {_MAX_CONFLICTS} conditional writes in a row met another one; run the job again")


def remove_tree(uri: str) -> None:
    """Remove every object under `uri/`."""
    bucket = uri.removeprefix("s3://").partition("/")[0]
    keys = [{"Key": found.removeprefix(f"s3://{bucket}/")} for found, _, _ in walk(uri)]
    for start in range(0, len(keys), _MAX_KEYS_PER_DELETION):
        deletion = {"Objects": keys[start : start + _MAX_KEYS_PER_DELETION], "Quiet": True}
        with _builtin_errors(uri):
            answer = _client().call_s3("delete_objects", Bucket=bucket, Delete=deletion)
        if failures := answer.get("Errors"):  # s3fs's own removal does not look
            first = redacted(str(failures[0]), uri)
            raise OSError(f"{shown(uri)}: {len(failures)} objects could not be removed, the first: {first}")


def _client() -> Any:
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return _client_of(tuple(sorted(environment.items())))


# Clients are cached by the variables they were built from, so that a changed environment is never ignored.
@lru_cache(maxsize=4)
def _client_of(environment: _Environment) -> Any:
    import s3fs  # takes half a second, which a run on local files has no need to wait for

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
            "retries": {"mode": "standard", "total_max_attempts": 1},  # s3fs tries again itself
            "max_pool_connections": 32,
            "s3": {"addressing_style": "path" if endpoint else "auto"},  # other servers have no host name per bucket
        },
        max_concurrency=1,  # one request for an object, whose size need not be asked for first
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    client.retries = int(attempts)
    return client


@contextmanager
def _builtin_errors(uri: str) -> Iterator[None]:
    """Raise the client's errors as those that the module's docstring promises.

    The client repeats addresses with their queries: its text is redacted, and its exception is in no traceback.
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
    """The HTTP status behind an error of s3fs, which has the client's as its cause."""
    found = _response(error if hasattr(error, "response") else error.__cause__)
    return found.get("HTTPStatusCode")


def _response(error: BaseException | None) -> dict[str, Any]:
    """What the answer says of itself; nothing where there was none."""
    answer: dict[str, Any] = getattr(error, "response", None) or {}
    return dict(answer.get("ResponseMetadata", {}))

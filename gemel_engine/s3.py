"""The S3 half of `storage`: what pyarrow's file system cannot do, and how both clients are built.

Credentials, region and endpoint come from the environment alone, and a client is built in the process that uses it, so
that no secret is ever pickled into a task. An address is `s3://bucket/key` without a slash at its end.

Errors: FileNotFoundError for a missing object or bucket, ConfigurationError for refused credentials, OSError for any
other failure, after as many attempts as `AWS_MAX_ATTEMPTS` says.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from botocore.parsers import ResponseParserError
from botocore.session import Session
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from gemel_engine.errors import ConfigurationError, redacted, shown

_COPY_CHUNK_BYTES = 1 << 20
_MAX_ATTEMPTS = 8  # they last half a minute
_LONGEST_PAUSE_SECONDS = 20.0
_MAX_CONFLICTS = 8
_CONFLICT_PAUSE_SECONDS = 0.05
_MAX_KEYS_PER_DELETION = 1000
_BROKEN_BODIES = (IncompleteReadError, ReadTimeoutError, ResponseStreamingError)

_Environment = tuple[tuple[str, str], ...]
_Content = TypeVar("_Content")


def file_system() -> S3FileSystem:
    """Return this process's pyarrow file system; its paths are `bucket/key`."""
    return _file_system(_aws_environment())


def head(uri: str) -> tuple[int, str] | None:
    """Return the size in bytes and the ETag of an object, or None if there is none."""
    bucket, key = _bucket_and_key(uri)
    if not key:
        return None
    try:
        with _builtin_errors(uri):
            answer = _client().head_object(Bucket=bucket, Key=key)
    except FileNotFoundError:
        return None
    return answer["ContentLength"], answer["ETag"].strip('"')


def walk(uri: str) -> Iterator[tuple[str, int, str]]:
    """Yield the address, size in bytes and ETag of every object under `uri/`; nothing if the bucket does not exist."""
    bucket, key = _bucket_and_key(uri)
    arguments = {"Bucket": bucket, "Prefix": f"{key}/" if key else ""}
    with suppress(FileNotFoundError), _builtin_errors(uri):
        while True:
            page = _complete(partial(_client().list_objects_v2, **arguments), dict)
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # an empty object that stands for a directory
                    yield f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"')
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """Read an object, or at most its first `limit` bytes."""
    bucket, key = _bucket_and_key(uri)

    def read(answer: dict[str, Any]) -> bytes:
        with closing(answer["Body"]) as body:
            content: bytes = body.read(limit)
        expected = answer["ContentLength"] if limit is None else min(answer["ContentLength"], limit)
        if len(content) < expected:  # with a limit, the client does not look
            raise IncompleteReadError(actual_bytes=len(content), expected_bytes=expected)
        return content

    with _builtin_errors(uri):
        return _complete(partial(_client().get_object, Bucket=bucket, Key=key), read)


def copy_to_local(uri: str, etag: str, path: Path) -> None:
    """Copy an object into a local file; OSError if it is no longer the version with this ETag."""
    bucket, key = _bucket_and_key(uri)

    def copy(answer: dict[str, Any]) -> None:
        with closing(answer["Body"]) as body, path.open("wb") as stream:
            for chunk in body.iter_chunks(_COPY_CHUNK_BYTES):
                stream.write(chunk)

    with _builtin_errors(uri):
        _complete(partial(_client().get_object, Bucket=bucket, Key=key, IfMatch=f'"{etag}"'), copy)


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object, replacing what was there."""
    bucket, key = _bucket_and_key(uri)
    with _builtin_errors(uri):
        _client().put_object(Bucket=bucket, Key=key, Body=data)


def create_exclusive(uri: str, data: bytes) -> bool:
    """Write an object unless there is one already, and tell whether this call did.

    pyarrow ignores the condition and would overwrite, hence botocore.
    """
    bucket, key = _bucket_and_key(uri)
    with _builtin_errors(uri):
        for attempt in range(_MAX_CONFLICTS):
            try:
                _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except ClientError as error:
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
    bucket, _ = _bucket_and_key(uri)
    keys = [{"Key": _bucket_and_key(found)[1]} for found, _, _ in walk(uri)]
    for start in range(0, len(keys), _MAX_KEYS_PER_DELETION):
        batch = keys[start : start + _MAX_KEYS_PER_DELETION]
        with _builtin_errors(uri):
            deletion = {"Objects": batch, "Quiet": True}
            answer = _complete(partial(_client().delete_objects, Bucket=bucket, Delete=deletion), dict)
        if failures := answer.get("Errors"):
            first = redacted(str(failures[0]), uri)
            raise OSError(f"{shown(uri)}: {len(failures)} objects could not be removed, the first: {first}")


def _complete(request: Callable[[], Any], read: Callable[[dict[str, Any]], _Content]) -> _Content:
    """Make a request again while its answer breaks off; what fails before that, the client tries again itself.

    Args:
        request: Whose answer, without its body, the client has read and parsed.
        read: Takes from the answer what is wanted, the body included.
    """
    num_attempts = _max_attempts(_aws_environment())
    for attempt in range(1, num_attempts + 1):
        broken: tuple[type[Exception], ...] = (ResponseParserError,)
        try:
            answer = request()
            broken = _BROKEN_BODIES
            return read(answer)
        except broken:
            if attempt == num_attempts:
                raise
            time.sleep(random.random() * min(2.0**attempt, _LONGEST_PAUSE_SECONDS))
    raise AssertionError("at least one attempt is made")


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _aws_environment() -> _Environment:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def _client() -> Any:
    return _client_of(_aws_environment())


# Clients are cached by the variables they were built from, so that a changed environment is never ignored.
@lru_cache(maxsize=4)
def _client_of(environment: _Environment) -> Any:
    endpoint, region = _endpoint_and_region(environment)
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _max_attempts(environment)},
        max_pool_connections=32,
        s3={"addressing_style": "path" if endpoint else "auto"},  # other servers have no host name per bucket
    )
    return Session().create_client("s3", endpoint_url=endpoint, region_name=region, config=config)


@lru_cache(maxsize=4)
def _file_system(environment: _Environment) -> S3FileSystem:
    endpoint, region = _endpoint_and_region(environment)
    retries = AwsStandardS3RetryStrategy(max_attempts=_max_attempts(environment))
    if endpoint is None:
        return S3FileSystem(region=region, retry_strategy=retries)
    address = urlsplit(endpoint)
    return S3FileSystem(region=region, endpoint_override=address.netloc, scheme=address.scheme, retry_strategy=retries)


def _max_attempts(environment: _Environment) -> int:
    given = dict(environment).get("AWS_MAX_ATTEMPTS", str(_MAX_ATTEMPTS))
    if not given.isdecimal() or int(given) < 1:
        raise ConfigurationError(f"AWS_MAX_ATTEMPTS is {given!r}: give a whole number from 1")
    return int(given)


def _endpoint_and_region(environment: _Environment) -> tuple[str | None, str | None]:
    variables = dict(environment)
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL")
    if endpoint and "@" in endpoint:
        raise ConfigurationError(
            f"AWS_ENDPOINT_URL is {shown(endpoint)}: leave credentials out; they belong in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    return endpoint, variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION")


@contextmanager
def _builtin_errors(uri: str) -> Iterator[None]:
    """Raise the client's errors as those that the module's docstring promises.

    The client repeats addresses with their queries: its text is redacted, and its exception is in no traceback.
    """
    try:
        yield
    except ClientError as error:
        if _status(error) == 404:
            raise FileNotFoundError(f"{shown(uri)}: no such object or bucket") from None
        if _status(error) in (401, 403):
            raise _refused(uri, error) from None
        raise OSError(f"{shown(uri)}: {redacted(str(error), uri)}") from None
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise _refused(uri, error) from None
    except (BotoCoreError, ResponseParserError) as error:
        raise OSError(f"{shown(uri)}: {redacted(str(error), uri)}") from None


def _refused(uri: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{shown(uri)}: access refused ({redacted(str(error), uri)}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
        "AWS_REGION, AWS_ENDPOINT_URL and the permissions of the bucket"
    )


def _status(error: ClientError) -> int:
    status: int = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status

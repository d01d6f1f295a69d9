"""Local and S3 addresses, and the canonical form in which image addresses match prefixes."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from gemel_engine.errors import ConfigurationError, shown

_DEFAULT_PORTS = {"http": 80, "https": 443}
HTTP = ("http://", "https://")
RAY_WORKING_DIRECTORIES = "working_dir_files"  # has Ray's copies of what submitted jobs bring


def local_path(uri: str) -> Path | None:
    """Return the absolute local path of an address, or None for an address in S3.

    Raises:
        ConfigurationError: The address is of another kind, names no bucket, contains a NUL
            character, or contains credentials, which would be written to logs and outputs.
    """
    if "\0" in uri:
        raise ConfigurationError(f"cannot use the address {shown(uri)}: it holds a NUL; remove that character")
    scheme, separator, rest = uri.partition("://")
    if not separator and uri:
        return Path(os.path.abspath(uri))
    if scheme == "file" and rest.startswith("/"):
        return Path(os.path.abspath(unquote(rest)))
    if scheme == "s3" and rest and not rest.startswith("/") and "@" not in rest.partition("/")[0]:
        return None
    raise ConfigurationError(
        f"cannot use the address {shown(uri)}: give a local path, file:///path or s3://bucket/key, and credentials in "
        "the environment"
    )


def canonical_address(uri: str) -> str:
    """Return the canonical form of an image address, to be compared with prefixes as a string.

    The form is the real path of a local file, the unchanged address in S3, and scheme, host, port
    and path over HTTP.

    Raises:
        ValueError: The address is of another kind, malformed, contains a user name, names no host
            or bucket, or its path has a segment `.` or `..`.
    """
    if uri.startswith("/"):
        return os.path.realpath(uri)
    if uri.startswith("file:///"):
        return os.path.realpath(unquote(uri.removeprefix("file://")))
    if uri.startswith(HTTP):
        try:
            url = parse_url(uri)
        except LocationParseError:
            raise ValueError("it is malformed") from None  # the original error contains the address
        if url.auth is not None:
            raise ValueError("it carries a user name")
        location = f"{url.scheme}://{url.host or ''}:{port_of(url)}{url.path or '/'}"
    elif uri.startswith("s3://"):
        location = uri
    else:
        raise ValueError("it must begin with /, file:///, s3://, https:// or http://")
    host, _, path = location.partition("://")[2].partition("/")
    if not host or host.startswith(":"):
        raise ValueError("it names no host or bucket")
    # Some servers read a backslash as a slash, decode twice, or cut a segment off at its semicolon.
    segments = unquote(unquote(path)).replace("\\", "/").split("/")
    if {".", ".."} & {segment.partition(";")[0] for segment in segments}:
        raise ValueError("its path has a segment . or ..")
    return location


def port_of(url: Url) -> int:
    """Return the port of an HTTP address; the default is the port of its scheme."""
    return url.port or _DEFAULT_PORTS[url.scheme or ""]

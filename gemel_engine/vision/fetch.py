"""Reads images from the addresses that the configuration allows, and from no others.

A row's image address comes from the data, so it is treated as hostile: it must lie under an allowed
prefix after symbolic links, dot segments and redirects are resolved, a host name must not lead into
a private network, and size, time and number of attempts are bounded. Its query may contain a
signature, so no message shows it. Images are not decoded here.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from urllib3 import BaseHTTPResponse, HTTPConnectionPool, HTTPSConnectionPool, Timeout
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, NewConnectionError, ProtocolError
from urllib3.exceptions import TimeoutError as NetworkTimeoutError
from urllib3.util import Url, parse_url

from gemel_engine import storage
from gemel_engine.config.addresses import HTTP, canonical_address, port_of
from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import ConfigurationError, ImageFetchError, redacted, shown
from gemel_engine.vision.archive import read_member, split_address

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


_THREADS = 16
_FETCHED_AHEAD = 64  # maximum number of image files in memory
_MAX_REDIRECTS = 3
_FIRST_PAUSE_SECONDS = 0.2
_CHUNK_BYTES = 1 << 16
# Public IPv6 addresses, and those with an IPv4 address in their last 32 bits (RFC 6052).
_GLOBAL_UNICAST, _NAT64 = IPv6Network("2000::/3"), IPv6Network("64:ff9b::/96")
_PROTOCOL_ASSIGNMENTS = ip_network("192.0.0.0/24")  # some clouds serve credentials there


class _TransientError(ImageFetchError):
    """An error after which another attempt may succeed."""


def fetch_image(uri: str, policy: ImagePolicy) -> bytes:
    """Read one image file, or a member of a tar archive (see `archive`).

    A relative address begins at the first of the allowed prefixes.

    An HTTP connection goes to the IP address that was checked, so that a second name lookup cannot
    lead elsewhere; proxies are not used.

    Raises:
        ImageFetchError: The address is not allowed or cannot be read, or the file is too large.
    """
    uri = _absolute(uri, policy)
    archive, member = split_address(uri)
    location = _allowed(archive, policy)
    if location.startswith(HTTP):
        if member:
            raise ImageFetchError(f"{shown(uri)}: archives are read from a disk or S3, not over HTTP")
        return _fetch_with_retries(uri, policy)
    if location.startswith("/") and not os.path.isfile(location):  # a device or a pipe might never end
        raise ImageFetchError(f"{shown(uri)}: no such file")
    try:
        if member:
            return read_member(location, member, policy.max_bytes)
        data = storage.read_bytes(location, policy.max_bytes + 1)
    except (OSError, ConfigurationError) as error:
        raise ImageFetchError(f"{shown(uri)}: cannot be read: {redacted(str(error), uri)}") from error
    _check_size(uri, len(data), policy)
    return data


def fetch_images(
    pictures: Iterable[bytes | str | None], policy: ImagePolicy
) -> Iterator[bytes | ImageFetchError | None]:
    """Yield image files in the order given; several are fetched at the same time.

    Args:
        pictures: Image files, addresses, or None where there is no picture.
        policy: Which addresses may be read.
    """

    def fetched(uri: str) -> bytes | ImageFetchError:
        try:
            return fetch_image(uri, policy)
        except ImageFetchError as error:
            return error

    ahead: deque[bytes | Future[bytes | ImageFetchError] | None] = deque()
    with ThreadPoolExecutor(_THREADS) as threads:
        for picture in pictures:
            ahead.append(threads.submit(fetched, picture) if isinstance(picture, str) else picture)
            if len(ahead) == _FETCHED_AHEAD:
                yield _result(ahead.popleft())
        yield from map(_result, ahead)


def _result(file: bytes | Future[bytes | ImageFetchError] | None) -> bytes | ImageFetchError | None:
    return file.result() if isinstance(file, Future) else file


def is_relative(uri: str) -> bool:
    """Return whether an image address is relative: neither a local path from the root nor one with a scheme."""
    return bool(uri) and not uri.startswith("/") and ":" not in uri.partition("/")[0]


def _absolute(uri: str, policy: ImagePolicy) -> str:
    if not policy.allowed_prefixes or not is_relative(uri):
        return uri
    return f"{policy.allowed_prefixes[0].rstrip('/')}/{uri}"


def _allowed(uri: str, policy: ImagePolicy) -> str:
    """Return the canonical form of an address; raise ImageFetchError if no prefix allows it."""
    try:
        location = canonical_address(uri)
    except ValueError as error:
        raise ImageFetchError(f"{shown(uri)}: not a usable image address: {error}") from error
    if not any(
        f"{location}/".startswith(canonical_address(prefix).rstrip("/") + "/") for prefix in policy.allowed_prefixes
    ):
        raise ImageFetchError(f"{shown(uri)}: under none of allowed_prefixes {list(policy.allowed_prefixes)}")
    return location


def _check_size(uri: str, size: int, policy: ImagePolicy) -> None:
    if size > policy.max_bytes:
        raise ImageFetchError(f"{shown(uri)}: larger than max_bytes, {policy.max_bytes}")


def _fetch_with_retries(uri: str, policy: ImagePolicy) -> bytes:
    for attempt in range(policy.max_retries):
        try:
            return _fetch_once(uri, policy)
        except _TransientError:
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
    return _fetch_once(uri, policy)


def _fetch_once(uri: str, policy: ImagePolicy) -> bytes:
    try:
        return _follow(uri, policy, time.monotonic() + policy.timeout_seconds)
    except (NewConnectionError, ProtocolError) as error:
        raise _TransientError(f"{shown(uri)}: {redacted(str(error), uri)}") from error
    except NetworkTimeoutError as error:
        message = f"{shown(uri)}: timed out after timeout_seconds, {policy.timeout_seconds}"
        raise _TransientError(message) from error
    except (HTTPError, OSError) as error:
        raise ImageFetchError(f"{shown(uri)}: {redacted(str(error), uri)}") from error


def _follow(uri: str, policy: ImagePolicy, deadline: float) -> bytes:
    target = uri
    for _ in range(_MAX_REDIRECTS + 1):
        if not _allowed(target, policy).startswith(HTTP):
            raise ImageFetchError(f"{shown(uri)}: redirected to {shown(target)}")
        response = _request(parse_url(target), deadline)
        try:
            redirection = response.get_redirect_location()
            if not redirection:
                return _read(uri, response, policy, deadline)
            target = _join(target, redirection)
        finally:
            response.close()
    raise ImageFetchError(f"{shown(uri)}: more than {_MAX_REDIRECTS} redirects")


def _join(address: str, redirection: str) -> str:
    try:
        return urljoin(address, redirection)
    except ValueError as error:
        raise ImageFetchError(f"{shown(address)}: redirected to an address that is malformed") from error


def _request(url: Url, deadline: float) -> BaseHTTPResponse:
    host = (url.host or "").strip("[]")
    headers = {"Host": url.netloc or "", "User-Agent": "gemel-engine", "Accept-Encoding": "identity"}
    unreachable = None
    for address in _checked_addresses(host, port_of(url)):
        try:
            return _pool(url.scheme or "", host, port_of(url), address).urlopen(
                "GET",
                url.request_uri,
                headers=headers,
                timeout=Timeout(total=_remaining_seconds(deadline)),
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
            )
        except NewConnectionError as error:
            unreachable = error
    raise unreachable or OSError(f"{host} has no address")


def _read(uri: str, response: BaseHTTPResponse, policy: ImagePolicy, deadline: float) -> bytes:
    if response.status == 429 or response.status >= 500:
        raise _TransientError(f"{shown(uri)}: the server answered {response.status}")
    if response.status != 200:
        raise ImageFetchError(f"{shown(uri)}: the server answered {response.status}")
    data = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        data += chunk
        _check_size(uri, len(data), policy)
        _remaining_seconds(deadline)
    return bytes(data)


def _remaining_seconds(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise NetworkTimeoutError("no time is left")
    return remaining


def _checked_addresses(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host; raise ImageFetchError if a name has a private one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ImageFetchError(f"{host!r} is not a host name") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if host != "localhost" and host not in addresses:  # else the configuration names this address
        for address in addresses:
            if not _is_public(ip_address(address)):
                raise ImageFetchError(f"{host!r} leads to {address}, which is not a public address")
    return addresses


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded is not None:
            return _is_public(embedded)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and not address.is_multicast and address not in _PROTOCOL_ASSIGNMENTS


class _TimedStream(io.RawIOBase):
    """Reads from a socket; the socket's timeout applies to all reads together."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._stream = sock.makefile("rb", buffering=0)
        self._deadline = time.monotonic() + (sock.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("no time is left")
        self._socket.settimeout(remaining)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response whose status line, headers and body share one timeout."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_TimedStream(sock))


class _Connection(HTTPConnection):
    response_class = _TimedResponse


class _SecureConnection(HTTPSConnection):
    response_class = _TimedResponse


@lru_cache(maxsize=64)
def _pool(scheme: str, host: str, port: int, address: str) -> HTTPConnectionPool:
    """Return the connection pool of one address; a certificate must be for the host's name."""
    pool: HTTPConnectionPool
    if scheme == "https":
        pool = HTTPSConnectionPool(
            address, port, maxsize=8, cert_reqs="CERT_REQUIRED", server_hostname=host, assert_hostname=host
        )
        pool.ConnectionCls = _SecureConnection
    else:
        pool = HTTPConnectionPool(address, port, maxsize=8)
        pool.ConnectionCls = _Connection
    return pool

"""Polite downloads over HTTP that go on where they stopped.

One request at a time, a pause between two requests to a host, pauses that grow after errors, and as long a pause as the
server asks for (Retry-After). Addresses come from data: only listed origins are asked, also after redirects.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urljoin

from urllib3 import BaseHTTPResponse, PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError, LocationParseError, MaxRetryError
from urllib3.util import parse_url

from gemel_engine.errors import ImageError
from gemel_engine.importers.commons import picture_address
from gemel_engine.vision.decode import decode_image

logger = logging.getLogger(__name__)

_RETRIED = (429, 500, 502, 503, 504)
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_MAX_PIXELS = 50_000_000
_WIDTH: Literal[500] = 500  # of a thumbnail; image encoders take at most 384 pixels
_COMMONS = re.compile(r"https://upload\.wikimedia\.org/wikipedia/commons/(?:thumb/)?./../(?P<name>[^/?#]+)")


class DownloadError(Exception):
    """A file that could not be downloaded.

    Attributes:
        is_permanent: Whether another attempt would fail as well.
    """

    def __init__(self, message: str, *, is_permanent: bool) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


@dataclass(frozen=True, slots=True, kw_only=True)
class Politeness:
    """From where, how often and how much is downloaded.

    Attributes:
        origins: The only scheme://host[:port] that are asked.
        seconds_between_requests: Least time between two requests to a host.
        max_retries: Number of further attempts after a broken connection, a timeout or one of the statuses 429 and
            5xx.
        backoff_seconds: First pause before a further attempt; each is twice as long as the one before, at most 120.
        max_wait_seconds: Longest pause that a server may ask for.
        timeout_seconds: Maximum time to connect, and between two packets.
    """

    origins: tuple[str, ...]
    seconds_between_requests: float = 0.5
    max_retries: int = 5
    backoff_seconds: float = 1.0
    max_wait_seconds: int = 600
    timeout_seconds: float = 60.0


@dataclass(slots=True)
class Downloader:
    """A client that downloads one file after another.

    Attributes:
        politeness: Limits.
        user_agent: Name of the client and an address of its user, as Wikimedia asks for.
    """

    politeness: Politeness
    user_agent: str
    _last: dict[str, float] = field(default_factory=dict)  # time of the last request to an origin
    _pool: PoolManager = field(init=False)

    def __post_init__(self) -> None:
        polite = self.politeness
        self._pool = PoolManager(
            headers={"User-Agent": self.user_agent},
            timeout=Timeout(connect=polite.timeout_seconds, read=polite.timeout_seconds),
            retries=Retry(
                total=polite.max_retries,
                status_forcelist=_RETRIED,
                backoff_factor=polite.backoff_seconds,
                retry_after_max=polite.max_wait_seconds,
            ),
        )

    def download(
        self, address: str, path: Path, max_bytes: int, check: Callable[[Path], None] = lambda _: None
    ) -> None:
        """Write a file, whole or not at all.

        Args:
            address: Address to ask for.
            path: The file.
            max_bytes: Maximum size.
            check: Function that raises ValueError if a file is unusable.

        Raises:
            DownloadError: The address is not allowed, does not answer or answers with an error, or the file is too
                large or unusable.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            response = self._follow(address)
            try:
                with part.open("wb") as stream:
                    for chunk in response.stream(_CHUNK_BYTES):
                        stream.write(chunk)
                        if stream.tell() > max_bytes:
                            raise DownloadError(f"larger than {max_bytes} bytes", is_permanent=True)
            finally:
                response.close()
            check(part)
            os.replace(part, path)
        except ValueError as error:
            raise DownloadError(f"unusable: {error}", is_permanent=True) from error
        except MaxRetryError as error:
            raise DownloadError(f"no answer: {error.reason}", is_permanent=False) from error
        except HTTPError as error:
            raise DownloadError(f"broken off: {error}", is_permanent=False) from error
        finally:
            part.unlink(missing_ok=True)

    def _follow(self, address: str) -> BaseHTTPResponse:
        for _ in range(_MAX_REDIRECTS + 1):
            self._wait_for(address)
            response = self._pool.request("GET", address, redirect=False, preload_content=False)
            target = response.get_redirect_location()
            if not target:
                if response.status != 200:
                    response.close()
                    raise DownloadError(f"the server answered {response.status}", is_permanent=True)
                return response
            response.close()
            address = urljoin(address, target)
        raise DownloadError(f"more than {_MAX_REDIRECTS} redirects", is_permanent=True)

    def _wait_for(self, address: str) -> None:
        """Wait until the host of an address may be asked again; raise if it may not be asked at all."""
        try:
            url = parse_url(address)
        except LocationParseError as error:
            raise DownloadError("no address that can be read", is_permanent=True) from error
        origin = f"{url.scheme}://{url.netloc}"
        if origin not in self.politeness.origins:
            raise DownloadError(f"{origin} is none of {list(self.politeness.origins)}", is_permanent=True)
        pause = self._last.get(origin, float("-inf")) + self.politeness.seconds_between_requests - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        self._last[origin] = time.monotonic()


def download_all(
    addresses: Iterable[str],
    directory: Path,
    downloader: Downloader,
    max_bytes: int,
    *,
    asked_for: Callable[[str], str] = str,
    check: Callable[[Path], None] = lambda _: None,
) -> dict[str, str]:
    """Download files that are missing, and note the result of each in `DIRECTORY/_downloads.jsonl`.

    Files that are there, and those that failed for good in an earlier run, are not asked for again.

    Args:
        addresses: Addresses.
        directory: Directory of the files.
        downloader: Client.
        max_bytes: Maximum size of a file; a larger one has failed.
        asked_for: Function that returns the address to ask for in place of one of `addresses`.
        check: See `Downloader.download`.

    Returns:
        Name of the file in the directory for each address, without those that failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    notes = directory / "_downloads.jsonl"
    earlier = map(json.loads, notes.read_text("utf-8").splitlines()) if notes.exists() else ()
    hopeless = {note["address"] for note in earlier if note["is_permanent"]}
    names, num_failed = {}, 0
    with notes.open("a", encoding="utf-8") as stream:
        for number, address in enumerate(dict.fromkeys(addresses)):
            name = hashlib.sha256(address.encode()).hexdigest()[:32]
            path = directory / name
            if not path.exists() and address not in hopeless:
                try:
                    downloader.download(asked_for(address), path, max_bytes, check)
                except DownloadError as error:
                    note = {"address": address, "error": str(error), "is_permanent": error.is_permanent}
                    stream.write(json.dumps(note) + "\n")
                    stream.flush()
            if path.exists():
                names[address] = name
            num_failed += not path.exists()
            if number % 500 == 499:
                logger.info("%d addresses, %d of them failed", number + 1, num_failed)
    logger.info("%s: %d files, %d failed (%s)", directory, len(names), num_failed, notes.name)
    return names


def thumbnail(address: str) -> str:
    """Return the address of a picture of Wikimedia Commons in a small size; others are unchanged."""
    found = _COMMONS.match(address)
    return address if found is None else picture_address(unquote(found["name"]), _WIDTH)


def check_picture(path: Path) -> None:
    """Raise ValueError if a file is no picture that linking takes."""
    try:
        decode_image(path.read_bytes(), _MAX_PIXELS)
    except ImageError as error:
        raise ValueError(str(error)) from error

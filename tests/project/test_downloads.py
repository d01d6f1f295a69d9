"""Downloads ask politely, go on where they stopped, and ask only where they may."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loopback import Answer, Loopback, serve

from examples.downloads import Downloader, DownloadError, Politeness, download_all

pytestmark = pytest.mark.unit

AGENT = "test/1 (test@example.org)"
ANSWERS: dict[str, list[Answer]] = {}


@pytest.fixture
def server() -> Iterator[Loopback]:
    """Gives the answers of ANSWERS in turn, the last one again and again; any other path is its own content."""
    ANSWERS.clear()

    def answer(path: str) -> Answer:
        listed = ANSWERS.get(path)
        return Answer(body=path.encode()) if not listed else listed.pop(0) if len(listed) > 1 else listed[0]

    with serve(answer) as running:
        yield running


def downloader(server: Loopback, pause: float = 0.0) -> Downloader:
    return Downloader(
        Politeness(origins=(server.url,), seconds_between_requests=pause, max_retries=2, backoff_seconds=0.01),
        AGENT,
    )


def refused(server: Loopback, path: str, directory: Path, max_bytes: int = 100) -> DownloadError:
    with pytest.raises(DownloadError) as refusal:
        downloader(server).download(f"{server.url}{path}", directory / "file", max_bytes)
    assert list(directory.iterdir()) == []
    return refusal.value


def test_a_server_that_is_busy_is_asked_again_after_the_time_that_it_names(server: Loopback, tmp_path: Path) -> None:
    ANSWERS["/a"] = [Answer(503), Answer(429, headers={"Retry-After": "1"}), Answer(body=b"picture")]
    started = time.monotonic()
    downloader(server).download(f"{server.url}/a", tmp_path / "a", 100)
    assert time.monotonic() - started >= 1
    assert (tmp_path / "a").read_bytes() == b"picture"
    assert server.requests == ["/a"] * 3
    assert set(server.user_agents) == {AGENT}


def test_two_requests_to_a_host_are_apart(server: Loopback, tmp_path: Path) -> None:
    started = time.monotonic()
    download_all([f"{server.url}/{n}" for n in range(3)], tmp_path, downloader(server, 0.1), 100)
    assert time.monotonic() - started >= 0.2


def test_a_second_run_asks_for_what_may_still_come(server: Loopback, tmp_path: Path) -> None:
    ANSWERS.update({"/gone": [Answer(404)], "/broken": [Answer(500)], "/bad": [Answer(body=b"bad")]})
    addresses = [f"{server.url}/{name}" for name in ("good", "gone", "broken", "bad", "good")]

    def check(path: Path) -> None:
        if path.read_bytes() == b"bad":
            raise ValueError("no picture")

    names = download_all(addresses, tmp_path, downloader(server), 100, check=check)
    assert [*names] == [addresses[0]]
    assert (tmp_path / names[addresses[0]]).read_bytes() == b"/good"
    assert server.requests == ["/good", "/gone", "/broken", "/broken", "/broken", "/bad"]
    notes = [json.loads(line) for line in (tmp_path / "_downloads.jsonl").read_text().splitlines()]
    assert [(note["address"], note["is_permanent"]) for note in notes] == [
        (addresses[1], True),
        (addresses[2], False),
        (addresses[3], True),
    ]
    assert [note["error"] for note in notes][::2] == ["the server answered 404", "unusable: no picture"]
    ANSWERS["/broken"] = [Answer(body=b"mended")]
    server.requests.clear()
    assert [*download_all(addresses, tmp_path, downloader(server), 100)] == [addresses[0], addresses[2]]
    assert server.requests == ["/broken"]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_too_large_or_broken_off_leaves_nothing(server: Loopback, tmp_path: Path) -> None:
    ANSWERS["/large"] = [Answer(body=b"x" * 101)]
    ANSWERS["/cut"] = [Answer(body=b"x", promised_bytes=50)]
    assert (str(error := refused(server, "/large", tmp_path)), error.is_permanent) == ("larger than 100 bytes", True)
    assert not refused(server, "/cut", tmp_path).is_permanent


def test_only_the_listed_origins_are_asked_also_after_a_redirect(server: Loopback, tmp_path: Path) -> None:
    with serve(lambda _: Answer(body=b"secret")) as other:
        ANSWERS["/away"] = [Answer(302, headers={"Location": f"{other.url}/b"})]
        ANSWERS["/round"] = [Answer(302, headers={"Location": "/round"})]
        ANSWERS["/here"] = [Answer(302, headers={"Location": "/a"})]
        assert "is none of" in str(refused(server, "/away", tmp_path))
        assert "redirects" in str(refused(server, "/round", tmp_path))
        for address in (f"{other.url}/b", f"http://user@{other.url[7:]}/b", "file:///etc/passwd", "a"):
            with pytest.raises(DownloadError, match="is none of"):
                downloader(server).download(address, tmp_path / "a", 100)
        assert other.requests == []
    downloader(server).download(f"{server.url}/here", tmp_path / "a", 100)
    assert (tmp_path / "a").read_bytes() == b"/a"


def test_a_host_that_is_not_there_is_asked_again_by_the_next_run(tmp_path: Path) -> None:
    with serve(lambda _: Answer()) as closed:
        pass
    asks = Downloader(Politeness(origins=(closed.url,), max_retries=0, timeout_seconds=1), AGENT)
    with pytest.raises(DownloadError) as refusal:
        asks.download(f"{closed.url}/a", tmp_path / "a", 100)
    assert not refusal.value.is_permanent

"""Images from a local disk, from S3 and over HTTP: what is read, and above all what is refused."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loopback import Answer, Loopback, serve
from support.s3_server import S3Server, run_s3_server  # noqa: F401

from gemel_engine import storage
from gemel_engine.config.components import ImagePolicy
from gemel_engine.errors import ConfigurationError, ImageFetchError
from gemel_engine.vision import archive
from gemel_engine.vision import fetch as image_source
from gemel_engine.vision.fetch import fetch_image

PICTURE = b"a picture, as far as this module can tell"


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_source, "_FIRST_PAUSE_SECONDS", 0.0)


def policy(*prefixes: str, max_bytes: int = 1000, timeout_seconds: float = 5.0, max_retries: int = 2) -> ImagePolicy:
    return ImagePolicy(prefixes, max_bytes, timeout_seconds, max_retries)


def fetch_over_http(*answers: Answer, path: str = "/images/a.png", **limits: Any) -> tuple[bytes | str, Loopback]:
    """Fetch from a server that gives these answers in turn; returns the image or the error, and the server."""
    remaining = iter(answers)
    with serve(lambda _: next(remaining)) as server:
        try:
            return fetch_image(server.url + path, policy(f"{server.url}/images", **limits)), server
        except ImageFetchError as error:
            return str(error), server


def trickle(listener: socket.socket, beginning: bytes) -> None:
    """Answer the first connection at once with a beginning, then with a byte every 20 ms until the client leaves."""

    def run() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(beginning)
            for _ in range(1000):
                connection.sendall(b"1")
                time.sleep(0.02)

    threading.Thread(target=run).start()


# Local files.


@pytest.mark.parametrize("form", ["{}/images/a b.png", "file://{}/images/a%20b.png", "{}/images/../images/a b.png"])
def test_a_local_image_under_a_prefix_is_read(form: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/images/a b.png", PICTURE)
    for prefix in (f"{tmp_path}/images", f"{tmp_path}/images/", f"file://{tmp_path}", "/"):
        assert fetch_image(form.format(tmp_path), policy(prefix)) == PICTURE


@pytest.mark.parametrize(
    "form", ["{}/images/../secret", "{}/secret", "file://{}/images/%2e%2e/secret", "{}/images2/a", "../secret"]
)
def test_a_local_file_outside_the_prefixes_is_refused(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("images/a", "secret", "images2/a"):
        storage.write_bytes(f"{tmp_path}/{name}", PICTURE)
    monkeypatch.chdir(tmp_path / "images")
    with pytest.raises(ImageFetchError):
        fetch_image(form.format(tmp_path), policy(f"{tmp_path}/images"))
    with pytest.raises(ImageFetchError):
        fetch_image(f"{tmp_path}/images/a", policy())


def test_a_relative_address_begins_at_the_first_prefix(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/photos/a.png", PICTURE)
    assert fetch_image("photos/a.png", policy(f"{tmp_path}", "/elsewhere")) == PICTURE
    for wrong in ("photos/../../a.png", "b.png"):
        with pytest.raises(ImageFetchError, match=str(tmp_path)):
            fetch_image(wrong, policy(f"{tmp_path}"))
    assert fetch_over_http(Answer(200, PICTURE), path="/images/a.png")[0] == PICTURE


def test_a_symbolic_link_out_of_the_prefix_is_refused(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/secret", PICTURE)
    storage.write_bytes(f"{tmp_path}/images/a", PICTURE)
    (tmp_path / "images/out").symlink_to(tmp_path / "secret")
    (tmp_path / "images/in").symlink_to(tmp_path / "images/a")
    (tmp_path / "alias").symlink_to(tmp_path / "images")
    with pytest.raises(ImageFetchError, match="allowed_prefixes"):
        fetch_image(f"{tmp_path}/images/out", policy(f"{tmp_path}/images"))
    assert fetch_image(f"{tmp_path}/images/in", policy(f"{tmp_path}/images")) == PICTURE
    assert fetch_image(f"{tmp_path}/alias/a", policy(f"{tmp_path}/alias")) == PICTURE


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a", b"x" * 1000)
    assert len(fetch_image(f"{tmp_path}/a", policy(str(tmp_path)))) == 1000
    with pytest.raises(ImageFetchError, match="max_bytes, 999"):
        fetch_image(f"{tmp_path}/a", policy(str(tmp_path), max_bytes=999))
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "absent", "."):
        with pytest.raises(ImageFetchError, match="no such file"):
            fetch_image(f"{tmp_path}/{name}", policy(str(tmp_path)))


@pytest.mark.parametrize(
    "uri", ["", "a\0b", "/a\0b", "ftp://host/a", "http://", "http://[", "http://:80/", "https://a:b/"]
)
def test_a_malformed_address_is_a_row_error(uri: str) -> None:
    with pytest.raises(ImageFetchError, match="image_fetch: "):
        fetch_image(uri, policy("/", "https://a"))


@pytest.mark.parametrize("prefix", ["images", "", "https://", "s3://", "s3:///a", "gs://bucket", "https://a:b/"])
def test_a_malformed_prefix_is_a_configuration_error(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{prefix}'"):
        policy(prefix)


@pytest.mark.parametrize("prefix", ["https://user:SECRET@host/", "https://SECRET@host/", "https://host/a?token=SECRET"])
def test_a_prefix_that_holds_a_secret_is_refused_and_not_repeated(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot use 'https://(\.\.\.@)?host/") as refusal:
        policy(prefix)
    assert "SECRET" not in str(refusal.value)


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:SECRET@host/a.png",
        "https://user:pass/SECRET@host/a.png",
        "https://SECRET@host/a.png",
        "//user:SECRET@host/a.png",
        "user:SECRET@host/a.png",
        "https://host/a.png?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET",
        "https://[/?token=SECRET",
        "https://host:port/?token=SECRET#SECRET",
        "s3://bucket/a.png?X-Amz-Signature=SECRET",
        "s3://user:SECRET@bucket/a.png",
        "file:///a.png?token=SECRET",
    ],
)
def test_what_may_be_secret_in_an_address_is_in_no_error(uri: str) -> None:
    with pytest.raises(ImageFetchError) as refusal:
        fetch_image(uri, policy("/images", "https://images.example", "s3://images"))
    assert "SECRET" not in str(refusal.value)


@settings(max_examples=50)
@given(st.text(st.sampled_from([*"/.%2eE5cC:;?#[]@\\&= \0\n\r\ta0é北\u202e\u3002\ufdd0"]), max_size=12))
def test_no_address_raises_anything_but_an_image_error(text: str) -> None:
    """Whatever stands behind a prefix, or in place of a host."""
    for uri in (f"http://127.0.0.1:1{text}", f"http://127.0.0.1:1/images/{text}", f"http://{text}", f"/images/{text}"):
        with pytest.raises(ImageFetchError):
            fetch_image(uri, policy("http://127.0.0.1:1", "/images", max_retries=0))


# S3.


def test_an_image_in_s3(s3_server: S3Server) -> None:
    for name in ("images/a.png", "images2/a.png"):
        storage.write_bytes(f"{s3_server.uri}/{name}", PICTURE)
    allowed = policy(f"{s3_server.uri}/images/")
    assert fetch_image(f"{s3_server.uri}/images/a.png", allowed) == PICTURE
    for name in ("images2/a.png", "images/../images2/a.png", "images/%2e%2e/images2/a.png", "images/absent.png"):
        with pytest.raises(ImageFetchError, match=name):
            fetch_image(f"{s3_server.uri}/{name}", allowed)
    with pytest.raises(ImageFetchError, match="max_bytes, 10"):
        fetch_image(f"{s3_server.uri}/images/a.png", policy(s3_server.uri, max_bytes=10))


# HTTP.


def test_an_image_over_http_is_asked_for_with_its_query() -> None:
    image, server = fetch_over_http(Answer(body=PICTURE), path="/images/a%20b.png?width=260")
    assert image == PICTURE
    assert server.requests == ["/images/a%20b.png?width=260"]


@pytest.mark.parametrize(
    "path",
    [
        "/a.png",
        "/images2/a.png",
        "/images/../a.png",
        "/images/%2e%2e/a.png",
        "/images/..%2Fa.png",
        "/images/%252e%252e%252fa.png",
        "/images/..%5Ca.png",
        "/images/..\\a.png",
        "/images/..;/a.png",
    ],
)
def test_a_path_outside_the_prefix_is_never_asked_for(path: str) -> None:
    _, server = fetch_over_http(path=path)
    assert server.requests == []


def test_another_scheme_host_or_port_is_refused() -> None:
    allowed = policy("https://images.example/a")
    for uri in (
        "http://images.example/a/b.png",
        "https://images.example:8443/a/b.png",
        "https://images.example.evil.example/a/b.png",
        "https://images.example@evil.example/a/b.png",
        "https://evil.example\\@images.example/a/b.png",
    ):
        with pytest.raises(ImageFetchError, match=r"allowed_prefixes|user name"):
            fetch_image(uri, allowed)


def test_redirects_are_followed_within_the_prefix() -> None:
    steps = [Answer(302, headers={"Location": "b.png"}), Answer(308, headers={"Location": "/images/c.png"})]
    image, server = fetch_over_http(*steps, Answer(body=PICTURE))
    assert image == PICTURE
    assert server.requests == ["/images/a.png", "/images/b.png", "/images/c.png"]


@pytest.mark.parametrize(
    "target",
    [
        "/secret",
        "http://169.254.169.254/latest/meta-data",
        "http://2852039166/latest/meta-data",
        "//evil.example/",
        "//user:SECRET@evil.example/",
        "gopher://a?token=SECRET",
        "//[",
        "http://a]/SECRET",
    ],
)
def test_a_redirect_out_of_the_prefix_is_refused(target: str) -> None:
    error, server = fetch_over_http(Answer(302, headers={"Location": target}))
    assert "allowed_prefixes" in str(error) or "not a usable image address" in str(error) or "malformed" in str(error)
    assert "SECRET" not in str(error)
    assert len(server.requests) == 1


def test_a_presigned_address_is_asked_for_whole_and_shown_without_its_signature() -> None:
    secret = "/images/a.png?X-Amz-Signature=SECRET"
    answers = [
        [Answer(404)],
        [Answer(503)] * 3,
        [Answer(body=b"x" * 1001)],
        [Answer(body=b"x", promised_bytes=9)] * 3,
        [Answer(302, headers={"Location": "a.png?SECRET"})] * 4,
    ]
    for steps in answers:
        error, server = fetch_over_http(*steps, path=secret)
        assert "a.png?..." in str(error)
        assert "SECRET" not in str(error)
        assert server.requests[0] == secret
    slow = Answer(delay_seconds=0.3)
    assert "SECRET" not in str(fetch_over_http(slow, path=secret, timeout_seconds=0.1, max_retries=0)[0])


def test_a_redirect_to_a_local_file_is_refused_even_if_that_is_allowed(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a", PICTURE)
    answer = Answer(302, headers={"Location": f"file://{tmp_path}/a"})
    with serve(lambda _: answer) as server, pytest.raises(ImageFetchError, match="redirected to"):
        fetch_image(f"{server.url}/", policy(server.url, str(tmp_path)))


def test_a_fourth_redirect_is_one_too_many() -> None:
    error, server = fetch_over_http(*[Answer(302, headers={"Location": "a.png"})] * 9)
    assert "more than 3 redirects" in str(error)
    assert len(server.requests) == 4


def test_the_size_is_bounded_whatever_the_server_promises() -> None:
    assert fetch_over_http(Answer(body=b"x" * 1000))[0] == b"x" * 1000
    for promised in (None, 10_000_000):
        error, server = fetch_over_http(Answer(body=b"x" * 1001, promised_bytes=promised))
        assert "larger than max_bytes, 1000" in str(error)
        assert len(server.requests) == 1


def test_a_chunked_answer_is_read_and_bounded() -> None:
    chunks = Answer(body=b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", headers={"Transfer-Encoding": "chunked"})
    assert fetch_over_http(chunks)[0] == b"abcde"
    assert "larger" in str(fetch_over_http(chunks, max_bytes=4)[0])


@pytest.mark.parametrize("failure", [Answer(500), Answer(503), Answer(429), Answer(body=b"abc", promised_bytes=10)])
def test_a_passing_failure_is_tried_again(failure: Answer) -> None:
    assert fetch_over_http(failure, failure, Answer(body=PICTURE))[0] == PICTURE
    error, server = fetch_over_http(failure, failure, failure, Answer(body=PICTURE))
    assert "image_fetch" in str(error)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [204, 304, 403, 404])
def test_a_lasting_failure_is_not_tried_again(status: int) -> None:
    error, server = fetch_over_http(Answer(status), Answer(body=PICTURE))
    assert f"answered {status}" in str(error)
    assert len(server.requests) == 1


def test_a_slow_answer_times_out_and_is_tried_again() -> None:
    slow = Answer(body=PICTURE, delay_seconds=0.5)
    image, server = fetch_over_http(slow, Answer(body=PICTURE), timeout_seconds=0.1)
    assert image == PICTURE
    assert len(server.requests) == 2
    assert "timed out" in str(fetch_over_http(slow, timeout_seconds=0.1, max_retries=0)[0])


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
    ids=["status", "header", "body", "chunk size"],
)
def test_a_server_that_trickles_does_not_hold_the_row_up(beginning: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        trickle(listener, beginning)
        started = time.monotonic()
        with pytest.raises(ImageFetchError, match=r"timed out after timeout_seconds, 0\.2"):
            fetch_image(url, policy(url, timeout_seconds=0.2, max_retries=0))
        assert time.monotonic() - started < 5  # 1,000 bytes take 20 s


def test_a_refused_connection_is_a_row_error() -> None:
    with serve(lambda _: Answer()) as server:
        pass
    with pytest.raises(ImageFetchError, match="refused"):
        fetch_image(server.url, policy(server.url))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "192.0.0.192",
        "224.0.0.1",
        "::1",
        "::",
        "fe80::1%2",
        "fec0::1",
        "fd00:ec2::254",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::a9fe:a9fe",
    ],
)
def test_a_name_that_leads_into_a_private_network_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public_too = [("93.184.215.14", 443), (address, 443)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", pair) for pair in public_too])
    with pytest.raises(ImageFetchError, match=f"'images.example' leads to {address}"):
        fetch_image("https://images.example/a.png", policy("https://images.example"))


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800::1", "::ffff:93.184.215.14", "64:ff9b::5db8:d70e"])
def test_a_name_that_leads_to_a_public_address_is_connected_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 443))])
    assert image_source._checked_addresses("images.example", 443) == [address]


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_another_spelling_of_a_private_address_is_refused_even_as_a_prefix(host: str) -> None:
    with serve(lambda _: Answer(body=PICTURE)) as server:
        url = f"http://{host}:{server.port}"
        with pytest.raises(ImageFetchError, match=r"leads to 127\.0\.0\.1, which is not a public address"):
            fetch_image(f"{url}/a.png", policy(url))
    assert server.requests == []


def test_the_checked_address_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo
    names: list[str] = []

    def record(host: str, *arguments: Any, **options: Any) -> list[Any]:
        names.append(host)
        return look_up("127.0.0.1" if host == "localhost" else host, *arguments, **options)

    with serve(lambda _: Answer(body=PICTURE)) as server:
        monkeypatch.setattr(socket, "getaddrinfo", record)
        url = f"http://localhost:{server.port}"
        assert fetch_image(url, policy(url)) == PICTURE
    assert names == ["localhost", "127.0.0.1"]


# Members of tar archives.


def write_archive(path: Path, **members: bytes) -> str:
    with tarfile.open(path, "w") as writer:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"pictures/{name}.png")
            entry.size = len(data)
            writer.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        writer.addfile(link)
    return str(path)


@pytest.mark.parametrize("form", ["{}/shard 1.tar#", "file://{}/shard%201.tar#"])
def test_a_member_of_an_archive_is_read_without_unpacking(form: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "shard 1.tar", a=PICTURE, b=b"x" * 700, **{"a#b": b"y"}, empty=b"")
    address, allowed = form.format(tmp_path), policy(str(tmp_path), max_bytes=699)
    assert fetch_image(f"{address}pictures/a.png", allowed) == PICTURE
    assert fetch_image(f"{address}pictures/a#b.png", allowed) == b"y"
    assert fetch_image(f"{address}pictures/empty.png", allowed) == b""
    assert fetch_image(f"{address}pictures/b.png", policy(f"{tmp_path}/shard 1.tar")) == b"x" * 700
    with pytest.raises(ImageFetchError, match=r"member 'pictures/b\.png' is larger than max_bytes, 699"):
        fetch_image(f"{address}pictures/b.png", allowed)
    for member in ("link.png", "pictures/absent.png", "../secret", "pictures"):
        with pytest.raises(ImageFetchError, match="no regular member"):
            fetch_image(f"{address}{member}", allowed)
    with pytest.raises(ImageFetchError, match="allowed_prefixes"):
        fetch_image(f"{address}pictures/a.png", policy(f"{tmp_path}/other"))
    write_archive(tmp_path / "shard 1.tar", z=b"z" * 2000, a=b"new")  # at another place than before
    assert fetch_image(f"{address}pictures/a.png", allowed) == b"new"


def test_a_damaged_archive_is_a_row_error(tmp_path: Path) -> None:
    whole = Path(write_archive(tmp_path / "a.tar", a=PICTURE)).read_bytes()
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    header = long_name.tobuf(tarfile.GNU_FORMAT)
    for number, data in enumerate((b"no archive" * 100, b"\0" * 200, header + whole, gzip.compress(whole))):
        storage.write_bytes(f"{tmp_path}/{number}.tar", data)
        with pytest.raises(ImageFetchError, match="not a readable tar archive"):
            fetch_image(f"{tmp_path}/{number}.tar#a.png", policy(str(tmp_path)))
    with pytest.raises(ImageFetchError, match="no such file"):
        fetch_image(f"{tmp_path}/absent.tar#a.png", policy(str(tmp_path)))
    with pytest.raises(ImageFetchError, match="not over HTTP"):
        fetch_image("http://127.0.0.1/a.tar#a.png", policy("http://127.0.0.1/"))


@pytest.mark.parametrize(
    ("cut", "changed", "fault"),
    [
        (2200, b"", "unexpected end of data"),
        (2600, b"", "no header at byte 2560"),
        (2560, b"?" * 512, "no header at byte 2560"),
        (1024, b"?" * 512, "no header at byte 1024"),
        (4096, b"", ""),  # the end may lack its two empty blocks
    ],
)
def test_members_in_front_of_damage_are_read_and_no_archive_is_searched_twice(
    cut: int, changed: bytes, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path(write_archive(tmp_path / "a.tar", a=PICTURE, b=b"x" * 700, c=b"y")).read_bytes()
    searched: list[str] = []
    search = archive._write_index

    def count(uri: str, directory: Path) -> None:
        searched.append(uri)
        search(uri, directory)

    monkeypatch.setattr(archive, "_write_index", count)
    uri, allowed = f"{tmp_path}/damaged.tar", policy(str(tmp_path))
    storage.write_bytes(uri, whole[:cut] + changed + (whole[cut + len(changed) :] if changed else b""))
    for _ in range(2):
        archive._index.cache_clear()
        assert fetch_image(f"{uri}#pictures/a.png", allowed) == PICTURE
        if cut >= 2560:
            assert fetch_image(f"{uri}#pictures/b.png", allowed) == b"x" * 700
        lacking = f"not a readable tar archive: {fault}; no member" if fault else "no regular member"
        for member in ("pictures/absent.png", *(("pictures/c.png",) if fault else ())):
            with pytest.raises(ImageFetchError, match=f"{lacking} '{member}'"):
                fetch_image(f"{uri}#{member}", allowed)
    assert searched == [uri]


def test_a_member_of_an_archive_in_s3(s3_server: S3Server, tmp_path: Path) -> None:
    data = Path(write_archive(tmp_path / "a.tar", a=PICTURE, b=b"x")).read_bytes()
    uri = f"{s3_server.uri}/shards/a.tar"
    storage.write_bytes(uri, data)
    assert fetch_image(f"{uri}#pictures/a.png", policy(f"{s3_server.uri}/shards")) == PICTURE
    assert fetch_image(f"{uri}#pictures/b.png", policy(uri)) == b"x"
    with pytest.raises(ImageFetchError, match="allowed_prefixes"):
        fetch_image(f"{uri}#pictures/a.png", policy(f"{s3_server.uri}/other"))
    with pytest.raises(ImageFetchError, match="no regular member"):
        fetch_image(f"{uri}#a.png", policy(uri))

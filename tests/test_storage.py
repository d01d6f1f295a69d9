"""Storage on a local disk and on a real S3 server: each test runs on both unless it says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Answer, serve
from s3_server import S3Server, run_s3_server  # noqa: F401

from gemel_engine import storage
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError


@pytest.fixture
def s3_directory(s3_server: S3Server) -> Iterator[str]:
    directory = f"{s3_server.uri}/{uuid.uuid4().hex}"
    yield directory
    storage.remove_tree(directory)


@pytest.fixture(params=["local", "s3"])
def directory(request: pytest.FixtureRequest) -> str:
    """An empty directory of each kind, without a slash at its end."""
    return str(request.getfixturevalue("tmp_path" if request.param == "local" else "s3_directory"))


@pytest.fixture
def fake_s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A server that answers each request with a listing: for names that a good server refuses to store."""
    listing = ""

    def set_listing(contents: str) -> None:
        nonlocal listing
        listing = contents

    with serve(lambda _: Answer(body=f"<ListBucketResult>{listing}</ListBucketResult>".encode())) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield set_listing


def test_bytes_are_read_as_written(directory: str) -> None:
    storage.write_bytes(f"{directory}/a/b", b"old content")
    storage.write_bytes(f"{directory}/a/b", b"new")
    assert storage.read_bytes(f"{directory}/a/b") == b"new"
    assert storage.read_bytes(f"{directory}/a/b", 2) == b"ne"


def test_a_missing_file_is_not_found(directory: str) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.read_bytes(f"{directory}/absent")


def test_exists_for_a_file_and_for_the_directory_it_is_in(directory: str) -> None:
    assert not storage.exists(f"{directory}/a")
    storage.write_bytes(f"{directory}/a/b", b"")
    assert storage.exists(f"{directory}/a/b")
    assert storage.exists(f"{directory}/a")
    assert storage.exists(f"{directory}/a/")
    assert not storage.exists(f"{directory}/a/b/c")
    assert not storage.exists(f"{directory}/a/bb")


def test_remove_tree_removes_what_is_under_it_and_nothing_else(directory: str) -> None:
    for name in ("tree/a", "tree/deep/b", "tree2/c"):
        storage.write_bytes(f"{directory}/{name}", b"x")
    storage.remove_tree(f"{directory}/tree")
    storage.remove_tree(f"{directory}/tree")
    assert not storage.exists(f"{directory}/tree")
    assert storage.read_bytes(f"{directory}/tree2/c") == b"x"


def test_pyarrow_writes_and_reads_a_resolved_path(directory: str) -> None:
    table = pa.table({"mention_id": ["a", "b"]})
    file_system, path = storage.resolve(f"{directory}/table.parquet")
    pq.write_table(table, path, filesystem=file_system)
    assert pq.read_table(path, filesystem=file_system).equals(table)
    assert storage.list_parquet(directory)[0].size == file_system.get_file_info(path).size


def test_list_parquet_is_sorted_recursive_and_leaves_out_hidden_names(directory: str) -> None:
    listed = ["10.parquet", "9.parquet", "deep/er/a b%20#?é.parquet"]
    for name in [*listed, "_SUCCESS", "note.txt", "_parts/0.parquet", ".tmp/1.parquet", "deep/.2.parquet"]:
        storage.write_bytes(f"{directory}/{name}", name.encode())
    storage.write_bytes(f"{directory}2/0.parquet", b"a neighbour whose name begins alike")
    files = storage.list_parquet(directory + "/")
    storage.remove_tree(f"{directory}2")
    assert [file.uri for file in files] == [f"{directory}/{name}" for name in listed]
    assert [storage.read_bytes(file.uri).decode() for file in files] == listed
    assert [file.size for file in files] == [len(name.encode()) for name in listed]


def test_the_version_of_a_single_file_changes_with_its_content(directory: str) -> None:
    uri = f"{directory}/a.parquet"
    storage.write_bytes(uri, b"one")
    (before,) = storage.list_parquet(uri)
    assert [before] == storage.list_parquet(directory)
    storage.write_bytes(uri, b"two")
    (after,) = storage.list_parquet(uri)
    assert (after.uri, after.size) == (before.uri, before.size)
    assert after.version != before.version


def test_nothing_to_list_is_an_input_error(directory: str) -> None:
    storage.write_bytes(f"{directory}/present/note.txt", b"")
    for name in ("absent", "absent.parquet", "present"):
        with pytest.raises(InputError, match=f"{directory}/{name}"):
            storage.list_parquet(f"{directory}/{name}")


def test_sixteen_exclusive_writers_have_one_winner(directory: str) -> None:
    uri = f"{directory}/data/shard.parquet"
    barrier = threading.Barrier(16)

    def write(rank: int) -> bool:
        barrier.wait()
        return storage.create_exclusive(uri, b"%d" % rank * 10_000)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(write, range(16)))
    assert sum(won) == 1
    assert storage.read_bytes(uri) == b"%d" % won.index(True) * 10_000
    assert [file.uri for file in storage.list_parquet(f"{directory}/data")] == [uri]
    assert not storage.create_exclusive(uri, b"late")


def test_a_local_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"1")
    storage.create_exclusive(str(tmp_path / "b"), b"2")
    storage.create_exclusive(str(tmp_path / "b"), b"3")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_local_addresses_may_be_relative_or_file_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("a b.parquet", b"x")
    assert storage.read_bytes(f"file://{tmp_path}/a%20b.parquet") == b"x"
    assert storage.list_parquet(".")[0].uri == f"{tmp_path}/a b.parquet"
    assert storage.resolve("a b.parquet")[1] == f"{tmp_path}/a b.parquet"


@pytest.mark.parametrize("uri", ["", "gs://bucket/key", "s3://", "s3:///key", "file://host/path"])
def test_an_address_of_another_kind_is_a_configuration_error(uri: str) -> None:
    with pytest.raises(ConfigurationError, match=f"'{uri}'"):
        storage.resolve(uri)


def test_download_directory_returns_a_local_one_as_it_is(tmp_path: Path) -> None:
    assert storage.download_directory(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_download_directory_copies_each_version_once(s3_directory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_directory}/trie/meta.json", b"{}")
    storage.write_bytes(f"{s3_directory}/trie/arrays/tokens.npy", b"1" * 3_000_000)
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: storage.download_directory(f"{s3_directory}/trie/", tmp_path), range(4)))
    assert len(set(copies)) == 1
    assert list(tmp_path.iterdir()) == [copies[0]]
    assert (copies[0] / "meta.json").read_bytes() == b"{}"
    assert (copies[0] / "arrays/tokens.npy").read_bytes() == b"1" * 3_000_000

    storage.write_bytes(f"{s3_directory}/trie/meta.json", b"{ }")
    newer = storage.download_directory(f"{s3_directory}/trie", tmp_path)
    assert newer != copies[0]
    assert (newer / "meta.json").read_bytes() == b"{ }"


def test_download_directory_without_the_directory_is_an_artifact_error(directory: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{directory}/file", b"")
    for name in ("absent", "file"):
        with pytest.raises(ArtifactError, match=f"{directory}/{name}"):
            storage.download_directory(f"{directory}/{name}", tmp_path / "cache")


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped"])
def test_download_directory_never_leaves_its_directory(
    name: str, tmp_path: Path, fake_s3: Callable[[str], None]
) -> None:
    fake_s3(f"<Contents><Key>art/{name}</Key><Size>1</Size><ETag>x</ETag></Contents>")
    with pytest.raises(ArtifactError, match="no safe local name"):
        storage.download_directory("s3://bucket/art", tmp_path / "cache" / "artifacts")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_conflict_of_conditional_writes_is_tried_again(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter([409, 409, 200])
    with serve(lambda _: Answer(next(statuses))) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert storage.create_exclusive("s3://bucket/key", b"x")
        assert server.requests == ["/bucket/key"] * 3


def test_a_wrong_secret_is_a_configuration_error(s3_directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_directory}/a", b"x")
    with monkeypatch.context() as environment:
        environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for attempt in (
            lambda: storage.read_bytes(f"{s3_directory}/a"),
            lambda: storage.exists(f"{s3_directory}/a"),
            lambda: storage.list_parquet(s3_directory),
            lambda: storage.create_exclusive(f"{s3_directory}/b", b""),
        ):
            with pytest.raises(ConfigurationError, match=rf"{s3_directory}.*AWS_SECRET_ACCESS_KEY"):
                attempt()
    assert storage.read_bytes(f"{s3_directory}/a") == b"x"


def test_credentials_come_from_the_environment_of_each_process(s3_directory: str) -> None:
    storage.write_bytes(f"{s3_directory}/a", b"from another process")
    program = "import sys; from gemel_engine import storage; sys.stdout.buffer.write(storage.read_bytes(sys.argv[1]))"
    answer = subprocess.run([sys.executable, "-c", program, f"{s3_directory}/a"], capture_output=True, check=True)
    assert answer.stdout == b"from another process"


def test_an_endpoint_that_does_not_answer_is_an_os_error(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        storage.read_bytes("s3://bucket/key")

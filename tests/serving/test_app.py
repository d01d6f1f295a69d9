"""The page and its JSON API: answers of linking, limits, and what is refused."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from support.corpus import picture, toml

from gemel_engine.cli.serving import serve
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import EngineDiedError
from gemel_engine.linker import Linker
from gemel_engine.serving import app as serving
from gemel_engine.serving.app import create_app
from gemel_engine.types import Mention, Prediction

TEXT, FORM = "Look at the brown bear over there.", "brown bear"


@pytest.fixture(scope="module")
def configuration(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serving") / "link.toml"
    path.write_text(toml(artifacts, "none.parquet", "none"))
    return path


@pytest.fixture(scope="module")
def linker(configuration: Path) -> Linker:
    return Linker(load_config(LinkConfig, configuration))


@pytest.fixture
def client(linker: Linker) -> Iterator[TestClient]:
    with TestClient(create_app(linker, ["testserver"], on_death=lambda: None)) as client:
        yield client


def test_an_answer_is_that_of_linking(client: TestClient, linker: Linker) -> None:
    (expected,) = linker.link([Mention("0", TEXT, FORM)], [picture("red")])
    question = {"text": TEXT, "mention": FORM, "picture": base64.b64encode(picture("red")).decode()}
    answer = client.post("/api/link", json=question).json()
    assert answer["entity_id"] == expected.entity_id
    assert [candidate["log_prob"] for candidate in answer["candidates"]] == pytest.approx(
        [candidate.log_prob for candidate in expected.candidates]
    )
    assert answer["certified"] is True
    assert answer["error"] is None


def test_a_picture_without_an_image_encoder_fails_for_its_question_alone(
    client: TestClient, linker: Linker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linker, "_pictures", None)
    question = {"text": TEXT, "mention": FORM, "picture": base64.b64encode(picture("red")).decode()}
    questions = [question, {"text": TEXT, "mention": FORM}] * 4
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda asked: client.post("/api/link", json=asked), questions))
    assert [answer.status_code for answer in answers] == [400, 200] * 4
    assert "vision.image_encoder" in answers[0].json()["error"]


def test_an_explanation_has_demonstrations_prompt_and_the_answer_without_the_picture(client: TestClient) -> None:
    question = {"text": f"\u202e{TEXT}", "mention": FORM, "picture": base64.b64encode(picture("red")).decode()}
    answer = client.post("/api/explain", json=question).json()
    assert answer["demonstrations"]
    assert "[picture: 2 embeddings]" in answer["prompt"]
    assert "‹U+202E›" in answer["prompt"]
    assert answer["without_picture"]["entity_id"]


def test_what_waits_is_linked_together(linker: Linker, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    may_go, link = threading.Event(), linker.link

    def counted(mentions: Sequence[Mention], pictures: Sequence[bytes | None]) -> list[Prediction]:
        sizes.append(len(mentions))
        may_go.wait(60)
        return link(mentions, pictures)

    monkeypatch.setattr(linker, "link", counted)
    app = create_app(linker, ["testserver"], on_death=lambda: None)
    with TestClient(app) as client, ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(client.post, "/api/link", json={"text": TEXT, "mention": FORM}) for _ in range(6)]
        while not sizes:
            time.sleep(0.1)
        time.sleep(1.0)  # the others wait by then
        may_go.set()
        assert {answer.result().status_code for answer in answers} == {200}
    assert sum(sizes) == 6
    assert len(sizes) < 6


@pytest.mark.parametrize(
    ("question", "status", "message"),
    [
        ({"text": TEXT}, 422, "mention"),
        ({"text": TEXT, "mention": FORM, "unknown": 1}, 422, "unknown"),
        ({"text": TEXT, "mention": FORM, "picture": "?"}, 422, "base64"),
        ({"text": TEXT, "mention": FORM, "picture": 5}, 422, "base64"),
        ({"text": "x" * 70_000, "mention": FORM}, 422, "text"),
        ({"text": TEXT, "mention": FORM, "mention_start": -1}, 422, "mention_start"),
    ],
)
def test_a_malformed_question_is_refused(
    client: TestClient, question: dict[str, object], status: int, message: str
) -> None:
    response = client.post("/api/link", json=question)
    assert response.status_code == status
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    "question",
    [{"text": "\ud800", "mention": FORM}, {"\ud800" * 10_000: 1}, {"text": TEXT, "picture": "?" * 1_000_000}],
)
def test_what_is_malformed_is_not_sent_back(client: TestClient, question: dict[str, object]) -> None:
    body = json.dumps(question)
    response = client.post("/api/link", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert len(response.text) < 10_000


def test_a_question_that_cannot_be_linked_is_an_answer_with_an_error(client: TestClient) -> None:
    question = {"text": TEXT, "mention": FORM, "candidate_ids": ["nobody"]}
    assert "nobody" in client.post("/api/link", json=question).json()["error"]
    response = client.post("/api/explain", json=question)
    assert response.status_code == 422
    assert "nobody" in response.json()["error"]
    question = {"text": TEXT, "mention": FORM, "picture": base64.b64encode(b"no picture").decode()}
    assert "picture" in client.post("/api/link", json=question).json()["error"]


def test_a_request_must_be_json_of_a_bounded_size(client: TestClient, linker: Linker) -> None:
    body = '{"text": "a", "mention": "a"}'
    assert client.post("/api/link", content=body, headers={"Content-Type": "text/plain"}).status_code == 415
    size = linker.config.image_source.max_bytes * 4 // 3 + (1 << 20)
    response = client.post("/api/link", content=b" " * size, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "smaller picture" in response.json()["error"]


def test_a_client_that_asks_too_often_is_told_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_PER_MINUTE", 2)
    statuses = [client.post("/api/link", json={"text": TEXT}).status_code for _ in range(3)]
    assert statuses == [422, 422, 429]


def test_questions_beyond_those_that_may_wait_are_refused(linker: Linker, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go = threading.Event()

    def wait(*_: object) -> None:
        may_go.wait(60)
        raise EngineDiedError("the engine has ended")

    monkeypatch.setattr(serving, "MAX_WAITING", 2)
    monkeypatch.setattr(serving, "explain", wait)
    question = {"text": TEXT, "mention": FORM}
    app = create_app(linker, ["testserver"], on_death=lambda: None)
    with TestClient(app) as client, ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(client.post, "/api/explain", json=question) for _ in range(3)]
        while not any(answer.done() for answer in answers):
            time.sleep(0.05)
        (refused,) = (answer.result().json()["error"] for answer in answers if answer.done())
        assert refused == client.post("/api/link", json=question).json()["error"]
        may_go.set()
    assert "2 requests are waiting" in refused
    monkeypatch.undo()
    with TestClient(app) as client:
        assert client.post("/api/explain", json=question).status_code == 200


def test_a_host_of_another_name_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_the_page_allows_only_its_own_style_and_script(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "<script>" in response.text


@pytest.mark.parametrize("path", ["/api/link", "/api/explain"])
def test_the_death_of_the_engine_ends_the_server(linker: Linker, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    def die(*_: object) -> list[Prediction]:
        raise EngineDiedError("the engine has ended")

    deaths: list[bool] = []
    monkeypatch.setattr(linker.generator, "generate", die)
    with TestClient(create_app(linker, ["testserver"], on_death=lambda: deaths.append(True))) as client:
        assert client.post(path, json={"text": TEXT, "mention": FORM}).status_code == 503
    assert deaths == [True]


def test_browsers_reach_an_address_of_ipv6(
    configuration: Path, linker: Linker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = []

    def ask(server: uvicorn.Server) -> None:
        app = server.config.app
        assert isinstance(app, FastAPI)
        with TestClient(app) as client:
            statuses.append(client.get("/", headers={"Host": "[fd00::5]:8000"}).status_code)

    monkeypatch.setattr("gemel_engine.linker.Linker", lambda _: linker)
    monkeypatch.setattr(uvicorn.Server, "run", ask)
    with caplog.at_level(logging.INFO):
        serve([str(configuration), "--host", "fd00::5"])
    assert statuses == [200]
    assert "http://[fd00::5]:8000/" in caplog.text

"""The page in a browser, with hostile text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait
from support.browser import FAINT_TEXTS, needs_browser, open_browser, show
from support.corpus import picture, toml

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linker import Linker
from gemel_engine.serving.app import create_app

pytestmark = [pytest.mark.heavy, needs_browser]

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def address(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("serving") / "link.toml"
    path.write_text(toml(artifacts, "none.parquet", "none"))
    app = create_app(Linker(load_config(LinkConfig, path)), ["127.0.0.1"], on_death=lambda: None)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_mention_is_linked_with_and_without_its_picture(
    browser: Chrome, address: str, tmp_path: Path, width: int, scheme: str
) -> None:
    show(browser, width, scheme)
    browser.get(address)
    (tmp_path / "red.png").write_bytes(picture("red"))
    browser.find_element(By.NAME, "text").send_keys(f"A {HOSTILE} and a brown bear.")
    browser.find_element(By.NAME, "mention").send_keys("brown bear")
    browser.find_element(By.NAME, "picture").send_keys(str(tmp_path / "red.png"))
    browser.find_element(By.TAG_NAME, "button").click()
    WebDriverWait(browser, 120).until(lambda opened: opened.find_element(By.ID, "answer").is_displayed())

    rows = browser.find_elements(By.CSS_SELECTOR, "#candidates tr")
    assert rows
    assert "search" in browser.find_element(By.ID, "how").text
    assert any("place" in row.text for row in rows)
    assert HOSTILE in str(browser.find_element(By.ID, "prompt").get_property("textContent"))
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script(FAINT_TEXTS) == []
    log = browser.get_log("browser")  # type: ignore[no-untyped-call]
    assert [entry for entry in log if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize(("edited", "start"), [("", 14), ("text", None), ("mention", None)])
def test_a_selected_mention_is_sent_with_its_place(
    browser: Chrome, address: str, edited: str, start: int | None
) -> None:
    browser.get(address)
    script = """
        const [edited, done] = arguments, { text, mention } = document.forms[0].elements;
        window.fetch = (_, request) => { done(JSON.parse(request.body)); return new Promise(() => {}); };
        text.value = "A bear \U0001f43b or a bear.";
        text.setSelectionRange(text.value.lastIndexOf(" bear"), text.value.length - 1);
        text.dispatchEvent(new Event("select"));
        if (edited) document.forms[0].elements[edited].value += "s";
        document.forms[0].requestSubmit();
    """
    sent = browser.execute_async_script(script, edited)
    assert sent["mention"].startswith("bear")
    assert sent.get("mention_start") == start


def test_an_error_is_shown(browser: Chrome, address: str, tmp_path: Path) -> None:
    browser.get(address)
    (tmp_path / "none.png").write_bytes(b"no picture")
    browser.find_element(By.NAME, "text").send_keys("A bear.")
    browser.find_element(By.NAME, "mention").send_keys("bear")
    browser.find_element(By.NAME, "picture").send_keys(str(tmp_path / "none.png"))
    browser.find_element(By.TAG_NAME, "button").click()
    state = browser.find_element(By.ID, "state")
    WebDriverWait(browser, 60).until(lambda _: "picture" in state.text)
    assert not browser.find_element(By.ID, "answer").is_displayed()

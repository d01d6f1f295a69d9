"""The report in a browser: a headless Chromium, with pictures and texts of the emoji corpus and one hostile mention."""

from __future__ import annotations

import random
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from support.browser import FAINT_TEXTS, needs_browser, open_browser, show
from support.paths import ROOT
from support.reports import COLUMNS, QUALITY, RUN, evaluation

from gemel_engine.report.gallery import gallery_items
from gemel_engine.report.page import render_report
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.retrieval.index import DemonstrationIndex
from gemel_engine.retrieval.reading import read_demonstrations, read_names
from gemel_engine.types import PREDICTION_SCHEMA

EMOJI = ROOT / "examples" / "emoji"
HOSTILE = "</article><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> bear\x00\u202e"
pytestmark = [pytest.mark.heavy, needs_browser]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, encoder: MentionEncoder) -> Path:
    """A report of 30 mentions: a third right, a third wrong, a third errors."""
    directory = tmp_path_factory.mktemp("report")
    names = read_names(str(EMOJI / "entities.parquet"))
    training = pq.read_table(EMOJI / "train.parquet").slice(0, 100)
    pq.write_table(training, directory / "train.parquet")
    demonstrations = read_demonstrations(str(directory / "train.parquet"), names)
    index = DemonstrationIndex.build(directory / "index", demonstrations, encoder)
    mentions = pq.read_table(EMOJI / "sample.parquet").slice(0, 30).to_pylist()
    mentions[0] |= {"text": f"A {HOSTILE} dances.", "mention": HOSTILE, "mention_start": 2}
    pq.write_table(pa.Table.from_pylist(mentions), directory / "mentions.parquet")
    demonstration_ids = training["mention_id"].to_pylist()[:8]
    rows = [answer(n, mention["entity_id"], names, demonstration_ids) for n, mention in enumerate(mentions)]
    for row, mention in zip(rows, mentions, strict=True):
        row["mention_id"] = mention["mention_id"]
    judged = [
        {
            "mention_id": mention["mention_id"],
            "entity_id": mention["entity_id"],
            "entity_name": names[mention["entity_id"]],
            "right": row["entity_id"] == mention["entity_id"],
        }
        for row, mention in zip(rows, mentions, strict=True)
    ]
    predictions = pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)
    gallery = gallery_items(
        predictions,
        str(directory / "mentions.parquet"),
        index,
        size=30,
        judged=pa.Table.from_pylist(judged),
        training=str(directory / "train.parquet"),
    )
    html = render_report(
        title="Emoji",
        run=RUN,
        predictions=predictions.select(COLUMNS),
        gallery=gallery,
        evaluation=evaluation("surface forms"),
        confidence={"confidence": QUALITY, "probability": QUALITY},
    )
    (directory / "report.html").write_text(html)
    return directory / "report.html"


def answer(number: int, entity_id: str, names: dict[str, str], demonstration_ids: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(PREDICTION_SCHEMA.names)
    if number % 3 == 2:
        return row | {"error": "image: 12 bytes are not a picture; accepted are PNG, JPEG, WEBP"}
    others = random.Random(number).sample(sorted(names.keys() - {entity_id}), 4)
    ranked = [entity_id, *others] if number % 3 == 0 else [*others, entity_id]
    return row | {
        "entity_id": ranked[0],
        "entity_name": names[ranked[0]],
        "probability": 0.5,
        "certified": number % 2 == 0,
        "num_rollouts": 1 + number,
        "candidates": [
            {"entity_id": candidate, "name": names[candidate], "log_prob": -1.0 - place}
            for place, candidate in enumerate(ranked)
        ],
        "demonstration_ids": demonstration_ids,
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def opened(browser: Chrome, page: Path) -> Chrome:
    """The page in a wide, light window, just loaded."""
    show(browser, width=1280, scheme="light")
    browser.get(page.as_uri())
    return browser


def screenshot(browser: Chrome, path: Path) -> NDArray[np.uint8]:
    """The whole page, stored as a file; returns its grey levels (height, width)."""
    size = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(b64decode(shot["data"]))
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def visible_cards(browser: Chrome) -> list[str]:
    cards = "[...document.querySelectorAll('.card')].filter((card) => card.checkVisibility())"
    texts: list[str] = browser.execute_script(f"return {cards}.map((card) => card.innerText)")
    return texts


def test_it_loads_without_a_complaint_and_without_a_request(opened: Chrome) -> None:
    assert opened.get_log("browser") == []  # type: ignore[no-untyped-call]
    loaded = opened.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert opened.execute_script("return window.hacked") is None
    assert len(visible_cards(opened)) == 30
    images = opened.execute_script("return [...document.images].map((image) => image.complete && image.naturalWidth)")
    assert len(images) >= 30
    assert all(images)
    (hostile,) = [text for text in visible_cards(opened) if "window.hacked" in text]
    assert "</article><script>" in hostile


def test_the_policy_stops_what_would_be_injected(opened: Chrome) -> None:
    script = """
        window.stopped = [];
        document.addEventListener("securitypolicyviolation", (event) => window.stopped.push(event.effectiveDirective));
        document.body.insertAdjacentHTML("beforeend", `<p style="color: red"></p><img src="https://example.invalid/x">
            <img src="data:," onerror="window.hacked = 1"><iframe src="data:text/html,x"></iframe>`);
        const script = document.createElement("script");
        script.textContent = "window.hacked = 1";
        document.body.append(script);
        setTimeout(arguments[0], 500);
    """
    opened.execute_async_script(script)
    assert opened.execute_script("return window.hacked") is None
    stopped = set(opened.execute_script("return window.stopped"))
    assert stopped == {"style-src-attr", "img-src", "script-src-attr", "frame-src", "script-src-elem"}


def test_filters_and_search(opened: Chrome) -> None:
    shown = opened.find_element(By.ID, "shown")
    for button in opened.find_elements(By.CSS_SELECTOR, "button[data-filter]"):
        count = int(button.find_element(By.CLASS_NAME, "count").text)
        if not count:
            assert not button.is_enabled()
            continue
        button.send_keys(Keys.SPACE)  # a button takes keys when it has the focus
        assert len(visible_cards(opened)) == count
        assert shown.text == f"{count} of 30 shown"
        assert button.get_attribute("aria-pressed") == "true"
        assert len(opened.find_elements(By.CSS_SELECTOR, '[aria-pressed="true"]')) == 1
    assert all("not a picture" in text for text in visible_cards(opened))
    opened.find_element(By.CSS_SELECTOR, '[data-filter="all"]').click()
    search = opened.find_element(By.ID, "search")
    search.send_keys("NOT  picture")
    assert shown.text == "10 of 30 shown"
    search.send_keys(" no such word")
    assert (visible_cards(opened), shown.text) == ([], "0 of 30 shown")


def test_demonstrations_unfold(opened: Chrome) -> None:
    details = opened.find_element(By.CSS_SELECTOR, ".card details")
    assert not details.find_element(By.TAG_NAME, "li").is_displayed()
    details.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert details.find_element(By.TAG_NAME, "li").is_displayed()


@pytest.mark.parametrize(
    ("width", "scheme"), [(320, "light"), (375, "dark"), (768, "light"), (1280, "light"), (1280, "dark")]
)
def test_it_fits_every_window_in_both_colour_schemes(opened: Chrome, page: Path, width: int, scheme: str) -> None:
    show(opened, width, scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    levels = screenshot(opened, page.parent / f"{scheme}-{width}.png")
    assert levels.shape[1] == width
    assert levels[2, 2] > 240 if scheme == "light" else levels[2, 2] < 40
    assert opened.execute_script(FAINT_TEXTS) == []

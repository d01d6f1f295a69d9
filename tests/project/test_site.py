"""The documents as a site: every link leads somewhere, nothing is loaded from elsewhere, and it fits a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import needs_browser, open_browser, show
from support.paths import ROOT

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a network: a proxy that is not there answers."""
    directory = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return directory


def test_every_document_is_a_page(site: Path) -> None:
    documents = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(path) for path in documents if not (site / path).is_file()] == []
    assert "no longer search would change them" in (site / "index.html").read_text("utf-8")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>")
    assert [found for page in site.rglob("*.html") for found in loaded.findall(page.read_text("utf-8"))] == []


def test_figures_stand_without_their_marks(site: Path) -> None:
    shown = re.sub(r"<!--.*?-->", "", (site / "score.html").read_text("utf-8"))
    assert re.search(r"<td>evidence alone</td>\s*<td>0\.\d{3}</td>", shown)
    assert "&lt;!--" not in shown


@needs_browser
def test_pages_fit_desk_and_phone(site: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        for width in (390, 1400):
            show(browser, width, "light")
            for name in ("index.html", "results.html", "reference/configuration.html", "troubleshooting.html"):
                browser.get((site / name).as_uri())
                assert browser.execute_script("return document.documentElement.scrollWidth") <= width, (name, width)

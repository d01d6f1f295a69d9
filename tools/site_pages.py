"""The hook of mkdocs: pages of the site that lie outside of `docs/`, with their links."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "SECURITY.md": "security.md",
}
COPIES = ("CITATION.cff", "NOTICE", "examples/quickstart.ipynb")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the files of the root that documents link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=with_links((ROOT / name).read_text("utf-8"))))
    for name in COPIES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def with_links(text: str) -> str:
    """Return a page from outside of `docs/` with its links as they are on the site."""

    def moved(link: re.Match[str]) -> str:
        target = PAGES.get(link[1], link[1].removeprefix("../").removeprefix("docs/"))
        return f"]({target}{link[2] or ''})"

    return re.sub(r"\]\(([^)#:\s]+)(#[^)]*)?\)", moved, text)

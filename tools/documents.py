"""Write the figures, the results and the reference of the documents: `make docs`.

python tools/documents.py [--check]

With `--check` nothing is written; documents that are not up to date are named, and the exit code is 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

from figures import Results, fill_in
from reference import pages
from results import page
from sizing import on_paper

ROOT = Path(__file__).parent.parent


def documents(root: Path) -> dict[Path, str]:
    """Return what each document that is generated, or has figures, must contain."""
    results = Results(root / "benchmarks/results", {"on_paper": on_paper})
    written = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    found = {path: fill_in(path.read_text("utf-8"), results) for path in written if path.is_file()}
    generated = {f"reference/{name}": text for name, text in pages().items()} | {"results": page(results)}
    return found | {root / f"docs/{name}.md": text for name, text in generated.items()}


def outdated(root: Path) -> dict[Path, str]:
    """Return the documents that are not as they must be, with what they must contain."""
    return {
        path: text for path, text in documents(root).items() if not path.is_file() or path.read_text("utf-8") != text
    }


def main() -> int:
    """Write the documents that are out of date, or name them."""
    found = outdated(ROOT)
    for path, text in found.items():
        sys.stdout.write(f"{path.relative_to(ROOT)}\n")
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    return 1 if found and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

"""A corpus as a user has it, linked and judged by the commands: CSV, own column names, pictures in a tar archive."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support.corpus import mention_rows, predictions, toml, write_mentions

from gemel_engine.cli.main import main

COLUMNS = """
[columns]
mention_id = "id"
text = "caption"
mention = "surface"
image_uri = "picture"
entity_id = "label"
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gemel", *map(str, arguments)])
    main()


def write_csv(directory: Path, rows: list[dict[str, Any]]) -> Path:
    """Write mentions as a compressed CSV, and their pictures as members of an archive."""
    with (
        gzip.open(directory / "mentions.csv.gz", "wt", newline="") as stream,
        tarfile.open(directory / "pictures.tar", "w") as archive,
    ):
        writer = csv.writer(stream)
        writer.writerow(["id", "caption", "surface", "mention_start", "picture", "label", "source"])
        for number, row in enumerate(rows):
            member = tarfile.TarInfo(f"{number}.png")
            if (data := row["image_bytes"]) is not None:
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            picture = f"{directory}/pictures.tar#{member.name}" if data else ""
            written = [
                row["mention_id"],
                row["text"],
                row["mention"],
                f"{row['mention_start']}.0",
                picture,
                f"Q{number}",
            ]
            writer.writerow([*written, "news"])
    return directory / "mentions.csv.gz"


def test_a_csv_with_pictures_in_an_archive_is_linked_as_parquet_is(
    artifacts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "link.toml"
    rows = mention_rows()
    rows[1] |= {"text": f"{rows[1]['text']} {'More of the same. ' * 400}"}
    path.write_text(toml(artifacts, write_mentions(tmp_path / "mentions.parquet", (1, rows[1])), tmp_path / "plain"))
    run(monkeypatch, "link", path)
    allowed = f'[image_source]\nallowed_prefixes = ["{tmp_path}/pictures.tar"]\n'
    path.write_text(toml(artifacts, write_csv(tmp_path, rows), tmp_path / "output") + COLUMNS + allowed)
    for _ in range(2):  # a second time finds everything done
        run(monkeypatch, "link", path)
    found = sorted(predictions(f"{tmp_path}/output"), key=lambda row: row["mention_id"])
    expected = predictions(f"{tmp_path}/plain")
    same = ("mention_id", "entity_id", "demonstration_ids", "num_characters_dropped", "error")
    assert [[row[name] for name in same] for row in found] == [[row[name] for name in same] for row in expected]
    log_probs = [row["log_prob"] for row in expected]  # batches, and so the last bits, differ
    assert [row["log_prob"] for row in found] == pytest.approx(log_probs, abs=1e-3)
    dropped = [row["num_characters_dropped"] for row in found]
    assert dropped[1] > 5000
    assert not any(dropped[:1] + dropped[2:])
    run(monkeypatch, "evaluate", tmp_path / "output", "--allowed-image-prefixes", tmp_path / "pictures.tar")
    metrics = json.loads((tmp_path / "output/_evaluation/metrics.json").read_text())
    assert metrics["evaluation"]["num_mentions"] + metrics["evaluation"]["num_nil"] == len(rows)

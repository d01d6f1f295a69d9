from __future__ import annotations

import bz2
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.paths import ROOT

from gemel_engine.knowledge_base.build import read_entities


def table(*arguments: str | Path) -> list[dict[str, object]]:
    command = [sys.executable, "examples/entity_tables.py", *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows: list[dict[str, object]] = pq.read_table(arguments[2]).to_pylist()
    return rows


def test_wikidata_items_become_entities(tmp_path: Path) -> None:
    items = [
        {"id": "Q90", "type": "item", "labels": {"en": {"value": "Paris"}, "fr": {"value": "Paris"}},
         "descriptions": {"en": {"value": "capital of France"}}, "sitelinks": {"enwiki": {}, "frwiki": {}}},
        {"id": "Q1", "type": "item", "labels": {"de": {"value": "Weltall"}}},
        {"id": "P31", "type": "property", "labels": {"en": {"value": "instance of"}}},
    ]  # fmt: skip
    dump = tmp_path / "dump.json.gz"
    dump.write_bytes(gzip.compress(("[\n" + ",\n".join(map(json.dumps, items)) + "\n]\n").encode()))
    output = tmp_path / "entities.parquet"
    assert table("wikidata", dump, output) == [
        {"entity_id": "Q90", "name": "Paris", "description": "capital of France", "popularity": 2.0}
    ]
    assert [row["name"] for row in table("wikidata", dump, output, "--language", "de")] == ["Weltall"]
    assert read_entities(str(output))["entity_id"].to_pylist() == ["Q1"]


def test_a_dump_without_entities_is_refused(tmp_path: Path) -> None:
    dump, output = tmp_path / "dump.json", tmp_path / "entities.parquet"
    command = [sys.executable, "examples/entity_tables.py", "wikidata", str(dump), str(output)]
    for content, message in ((None, "No such file"), ("[\n]\n", "no entity with a label")):
        if content is not None:
            dump.write_text(content)
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert message in ended.stderr
        assert "Traceback" not in ended.stderr
        assert not output.exists()


@pytest.mark.parametrize("pack", [None, bz2.compress])
def test_dbpedia_labels_become_entities(tmp_path: Path, pack: object) -> None:
    label = "<http://www.w3.org/2000/01/rdf-schema#label>"
    lines = [
        f'<http://dbpedia.org/resource/Caf%C3%A9> {label} "Caf\\u00E9 \\"X\\""@en .',
        f'<http://dbpedia.org/resource/Paris> {label} "Paris"@fr .',
        "# completed",
    ]
    dump = tmp_path / ("labels.ttl.bz2" if pack else "labels.ttl")
    content = "\n".join(lines).encode()
    dump.write_bytes(bz2.compress(content) if pack else content)
    found = table("dbpedia", dump, tmp_path / "entities.parquet")
    assert [(row["entity_id"], row["name"]) for row in found] == [("Café", 'Café "X"')]

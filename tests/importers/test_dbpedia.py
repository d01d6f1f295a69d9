# ruff: noqa: E501
"""Triples of DBpedia, each on one line as in its dumps."""

from __future__ import annotations

import bz2
from pathlib import Path

import pytest

from gemel_engine.errors import ConfigurationError, InputError
from gemel_engine.importers import dbpedia
from gemel_engine.importers.dbpedia import read_dbpedia
from gemel_engine.importers.entities import ImportedEntity, ImportReport

pytestmark = pytest.mark.unit

LABELS = r"""
# started 2022-12-01T00:00:00Z
<http://dbpedia.org/resource/Paris> <http://www.w3.org/2000/01/rdf-schema#label> "Paris"@en .
<http://dbpedia.org/resource/City_of_Light> <http://www.w3.org/2000/01/rdf-schema#label> "City of Light"@en .
<http://dbpedia.org/resource/Caf%C3%A9> <http://www.w3.org/2000/01/rdf-schema#label> "Caf\u00E9 \"X\" \U0001F600"@en .
<http://dbpedia.org/resource/1984> <http://www.w3.org/2000/01/rdf-schema#label> "1984"@en .
<http://dbpedia.org/resource/Alien> <http://www.w3.org/2000/01/rdf-schema#label> "Alien"@en .
<http://dbpedia.org/resource/Berlin> <http://www.w3.org/2000/01/rdf-schema#label> "Berlino"@it .
"""
GERMAN_LABELS = """
<http://de.dbpedia.org/resource/Paris> <http://www.w3.org/2000/01/rdf-schema#label> "Paris (Stadt)"@de .
<http://de.dbpedia.org/resource/Köln> <http://www.w3.org/2000/01/rdf-schema#label> "Köln"@de .
"""
ABSTRACTS = r"""
<http://dbpedia.org/resource/Paris> <http://www.w3.org/2000/01/rdf-schema#comment> "Paris is the capital.\nOf France."@en .
<http://de.dbpedia.org/resource/Paris> <http://www.w3.org/2000/01/rdf-schema#comment> "Paris ist die Hauptstadt."@de .
"""
REDIRECTS = """
<http://dbpedia.org/resource/City_of_Light> <http://dbpedia.org/ontology/wikiPageRedirects> <http://dbpedia.org/resource/Paris,_France> .
<http://dbpedia.org/resource/Paris,_France> <http://dbpedia.org/ontology/wikiPageRedirects> <http://dbpedia.org/resource/Paris> .
<http://dbpedia.org/resource/A> <http://dbpedia.org/ontology/wikiPageRedirects> <http://dbpedia.org/resource/B> .
<http://dbpedia.org/resource/B> <http://dbpedia.org/ontology/wikiPageRedirects> <http://dbpedia.org/resource/A> .
"""
DISAMBIGUATIONS = """
<http://dbpedia.org/resource/Alien> <http://dbpedia.org/ontology/wikiPageDisambiguates> <http://dbpedia.org/resource/Alien_(law)> .
"""
IMAGES = """
<http://dbpedia.org/resource/Paris> <http://dbpedia.org/ontology/thumbnail> <http://commons.wikimedia.org/wiki/Special:FilePath/La_Tour_(%C3%A9t%C3%A9).jpg?width=300> .
<http://dbpedia.org/resource/Paris> <http://xmlns.com/foaf/0.1/depiction> <http://commons.wikimedia.org/wiki/Special:FilePath/La_Tour_(été).jpg> .
<http://commons.wikimedia.org/wiki/Special:FilePath/La_Tour_(été).jpg> <http://purl.org/dc/elements/1.1/rights> <http://en.wikipedia.org/wiki/File:La_Tour_(été).jpg> .
<http://dbpedia.org/resource/1984> <http://dbpedia.org/ontology/thumbnail> <http://example.org/1984.png> .
"""
LINKS = """
<http://dbpedia.org/resource/1984> <http://dbpedia.org/ontology/wikiPageWikiLink> <http://dbpedia.org/resource/Paris> .
<http://dbpedia.org/resource/Alien> <http://dbpedia.org/ontology/wikiPageWikiLink> <http://dbpedia.org/resource/City_of_Light> .
<http://dbpedia.org/resource/Paris> <http://dbpedia.org/ontology/wikiPageWikiLink> <http://dbpedia.org/resource/Category:Cities> .
"""
INTERLANGUAGE = """
<http://dbpedia.org/resource/Paris> <http://www.w3.org/2002/07/owl#sameAs> <http://de.dbpedia.org/resource/Paris> .
<http://dbpedia.org/resource/Paris> <http://www.w3.org/2002/07/owl#sameAs> <http://www.wikidata.org/entity/Q90> .
"""


def read(directory: Path, *contents: str, languages: tuple[str, ...] = ("en",)) -> tuple[
    dict[str, ImportedEntity], ImportReport
]:  # fmt: skip
    dumps = []
    for number, content in enumerate(contents):
        path = directory / f"{number}.ttl.bz2"
        path.write_bytes(bz2.compress(content.encode()))
        dumps.append(str(path))
    report = ImportReport()
    found = list(read_dbpedia(dumps, report, languages=languages, image_width=330))
    assert len({entity.entity_id for entity in found}) == len(found)
    return {entity.entity_id: entity for entity in found}, report


def test_labels_alone_are_enough(tmp_path: Path) -> None:
    found, report = read(tmp_path, LABELS)
    assert {name: entity.name for name, entity in found.items()} == {
        "1984": "1984",
        "Alien": "Alien",
        "Café": 'Café "X" 😀',
        "City_of_Light": "City of Light",
        "Paris": "Paris",
    }
    assert found["Paris"] == ImportedEntity(entity_id="Paris", name="Paris", aliases=[], image_uri=[], language="en")
    assert report.num_unusable == 0


def test_all_files_together_fill_every_column(tmp_path: Path) -> None:
    contents = (LINKS, IMAGES, REDIRECTS, ABSTRACTS, DISAMBIGUATIONS, INTERLANGUAGE, GERMAN_LABELS, LABELS)
    found, report = read(tmp_path, *contents, languages=("en", "de"))
    assert found["Paris"] == ImportedEntity(
        entity_id="Paris",
        name="Paris",
        description="Paris is the capital.\nOf France.",
        popularity=2.0,
        aliases=["Paris (Stadt)", "City of Light", "Paris, France"],
        image_uri=["https://commons.wikimedia.org/wiki/Special:FilePath/La_Tour_%28%C3%A9t%C3%A9%29.jpg?width=330"],
        language="en",
    )
    assert found["1984"].image_uri == ["http://example.org/1984.png"]
    assert found["1984"].popularity == 0
    assert found["http://de.dbpedia.org/resource/Köln"].language == "de"
    assert set(found) == {"Paris", "1984", "Café", "http://de.dbpedia.org/resource/Köln"}
    assert report.num_left_out["disambiguation page"] == 1
    assert report.num_left_out["no label in these languages"] == 3  # A, B and the category


def test_another_language_can_be_the_first(tmp_path: Path) -> None:
    found, _ = read(tmp_path, GERMAN_LABELS, ABSTRACTS, languages=("de",))
    assert {name: entity.description for name, entity in found.items()} == {
        "Paris": "Paris ist die Hauptstadt.",
        "Köln": None,
    }


def test_the_order_of_files_does_not_matter(tmp_path: Path) -> None:
    contents = [LABELS, ABSTRACTS, REDIRECTS, DISAMBIGUATIONS, IMAGES, LINKS, INTERLANGUAGE, GERMAN_LABELS]
    expected = read(tmp_path, *contents, languages=("en", "de"))
    assert read(tmp_path, *reversed(contents), languages=("en", "de")) == expected


def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path) -> None:
    label = "<http://www.w3.org/2000/01/rdf-schema#label>"
    broken = [
        "<http://dbpedia.org/resource/A> nonsense",
        f'<http://dbpedia.org/resource/A> {label} "A\\q"@en .',
        f'<http://dbpedia.org/resource/A> {label} "\\uD800"@en .',
        f'<http://dbpedia.org/resource/A> {label} "A"@en',
    ]
    found, report = read(tmp_path, LABELS + "\n".join(broken))
    assert "A" not in found
    assert report.num_unusable == len(broken)
    assert "line 9: not a triple" in report.examples[0]
    assert "line 10: unknown escape" in report.examples[1]


def test_a_file_without_a_known_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1\.ttl\.bz2' has no label"):
        read(tmp_path, LABELS, GERMAN_LABELS)


def test_a_dump_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.ttl.bz2"
    path.write_bytes(bz2.compress(LABELS.encode() * 100)[:-5])
    with pytest.raises(InputError, match="damaged or cut off"):
        list(read_dbpedia([str(path)], ImportReport(), languages=("en",), image_width=500))


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dbpedia, "_SCHEMA", f"PRAGMA max_page_count = 20; {dbpedia._SCHEMA}")
    with pytest.raises(ConfigurationError, match=r"database or disk is full\): make room, or set TMPDIR"):
        read(tmp_path, LABELS * 1000)

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gemel_engine.errors import InputError
from gemel_engine.importers.entities import ImportedEntity, ImportReport
from gemel_engine.importers.wikidata import WIKIMEDIA_PAGES, read_wikidata

pytestmark = pytest.mark.unit


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


PACKS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bz2": bz2.compress, "zstd": zstd}


def terms(**texts: str) -> dict[str, Any]:
    return {code: {"language": code, "value": text} for code, text in texts.items()}


def statement(value: object, rank: str = "normal") -> dict[str, Any]:
    snak = {"snaktype": "value", "property": "P0", "datavalue": {"value": value, "type": "string"}}
    return {"mainsnak": snak, "type": "statement", "id": "Q0$1", "rank": rank, "references": []}


def item(number: int, **fields: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"labels": {}, "descriptions": [], "aliases": [], "claims": [], "sitelinks": {}}
    return {"type": "item", "id": f"Q{number}", "pageid": 1, "ns": 0, **empty, **fields}


PARIS = item(
    90,
    labels=terms(en="Paris", de="Paris", ja="パリ"),
    descriptions=terms(en="capital of France", de="Hauptstadt Frankreichs"),
    aliases={"en": [{"language": "en", "value": "City of Light"}], "fr": [{"language": "fr", "value": "Paname"}]},
    claims={
        "P31": [statement({"entity-type": "item", "numeric-id": 515, "id": "Q515"})],
        "P18": [
            statement("Old.jpg", "deprecated"),
            statement("La Tour Eiffel & Seine, 50% (été)?.jpg"),
            statement("Best view.svg", "preferred"),
            {"mainsnak": {"snaktype": "somevalue", "property": "P18"}, "type": "statement", "rank": "normal"},
        ],
        "P1082": [{"mainsnak": {"snaktype": "value", "datavalue": {"value": {"amount": "+1"}}}, "rank": "normal"}],
    },
    sitelinks={"enwiki": {"site": "enwiki", "title": "Paris", "badges": []}, "dewiki": {"site": "dewiki"}},
)


def dump(directory: Path, *lines: object, pack: Callable[[bytes], bytes] = bytes) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path = directory / "dump.json"
    path.write_bytes(pack(("[\n" + ",\n".join(texts) + "\n]\n").encode()))
    return str(path)


def read(
    source: str, *languages: str, left_out: tuple[str, ...] = WIKIMEDIA_PAGES
) -> tuple[list[ImportedEntity], ImportReport]:
    report = ImportReport()
    found = read_wikidata(source, report, languages=languages or ("en",), left_out_types=left_out, image_width=500)
    return list(found), report


@pytest.mark.parametrize("pack", [bytes, *PACKS.values()], ids=["plain", *PACKS])
def test_an_item_becomes_an_entity(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (paris,), _ = read(dump(tmp_path, PARIS, pack=pack), "en", "ja", "de")
    assert paris == ImportedEntity(
        entity_id="Q90",
        name="Paris",
        description="capital of France",
        popularity=2.0,
        aliases=["City of Light", "パリ"],
        image_uri=[
            "https://commons.wikimedia.org/wiki/Special:FilePath/Best_view.svg?width=500",
            "https://commons.wikimedia.org/wiki/Special:FilePath/"
            "La_Tour_Eiffel_%26_Seine%2C_50%25_%28%C3%A9t%C3%A9%29%3F.jpg?width=500",
        ],
        language="en",
    )


def test_labels_in_the_other_languages_may_be_generated_if_asked_for(tmp_path: Path) -> None:
    (paris,) = read_wikidata(
        dump(tmp_path, PARIS),
        ImportReport(),
        languages=("en", "ja", "de"),
        left_out_types=(),
        image_width=500,
        with_other_names=True,
    )
    assert paris.other_names == ("パリ",)
    assert "パリ" in paris.aliases


def test_the_first_language_with_a_label_gives_the_name(tmp_path: Path) -> None:
    source = dump(tmp_path, PARIS, item(1, labels=terms(de="Weltall"), descriptions=terms(en="everything")))
    found, report = read(source, "ja", "de")
    assert [(entity.name, entity.language, entity.description) for entity in found] == [
        ("パリ", "ja", None),
        ("Weltall", "de", None),
    ]
    assert found[0].aliases == ["Paris"]
    assert not report.num_left_out


def test_the_label_of_all_languages_stands_in_for_a_missing_one(tmp_path: Path) -> None:
    adams = item(
        42,
        labels=terms(mul="Douglas Adams", ja="ダグラス・アダムズ"),
        aliases={"mul": [{"language": "mul", "value": "DNA"}]},
        descriptions=terms(en="English author"),
    )
    (found,), _ = read(dump(tmp_path, adams), "en", "ja")
    assert (found.name, found.language, found.description) == ("Douglas Adams", "en", "English author")
    assert found.aliases == ["ダグラス・アダムズ", "DNA"]


def test_what_is_no_entity_is_counted(tmp_path: Path) -> None:
    source = dump(
        tmp_path,
        PARIS,
        item(2, labels=terms(en="Paris"), claims={"P31": [statement({"id": "Q4167410"})]}),
        item(3, labels=terms(en="Cities"), claims={"P31": [statement({"id": "Q4167836"}, "deprecated")]}),
        item(4, labels=terms(en="A paper"), claims={"P31": [statement({"id": "Q13442814"})]}),
        item(5, labels=terms(fr="Terre")),
        {"type": "property", "id": "P31", "datatype": "wikibase-item", "labels": terms(en="instance of")},
        {"type": "lexeme", "id": "L1", "lemmas": terms(en="first"), "claims": [], "forms": []},
    )
    found, report = read(source, left_out=("Q4167410", "Q4167836", "Q13442814"))
    assert [entity.entity_id for entity in found] == ["Q90", "Q3"]
    assert report.num_left_out == {
        "of a type that is left out": 2,
        "no label in these languages": 1,
        "not an item": 2,
    }


def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path) -> None:
    broken = ['{"id": "Q5", "type": "item", "labels": {"en"', '{"type": "item"}', '"Q6"', '{"id": "Q7", "type": 7}']
    source = dump(tmp_path, *broken, PARIS, item(8, labels={"en": "Earth"}), '{"a":' * 5000)
    found, report = read(source)
    assert [entity.entity_id for entity in found] == ["Q90"]
    assert report.num_unusable == 6
    assert len(report.examples) == 5
    for example, words in zip(
        report.examples, ("line 2: ", "line 3: id: ", "line 4: ", "line 5: type: "), strict=False
    ):
        assert f"{source!r}, {words}" in example


def test_a_large_dump_is_read_in_order_by_several_processes(tmp_path: Path) -> None:
    labels = terms(en="long", fr="x" * (1 << 20))
    source = dump(tmp_path, *(item(number, labels=labels) if number % 4 else "{" for number in range(20)))
    found, report = read(source)
    assert [entity.entity_id for entity in found] == [f"Q{number}" for number in range(20) if number % 4]
    assert report.num_unusable == 5
    for number, example in zip(range(2, 22, 4), report.examples, strict=True):
        assert f"line {number}: " in example


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_dump_that_is_cut_off_is_refused(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    source = Path(dump(tmp_path, *[PARIS] * 50, pack=pack))
    source.write_bytes(source.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"damaged or cut off after line \d+ .*Truncated.* download"):
        read(str(source))


def test_a_plain_dump_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    source = Path(dump(tmp_path, PARIS, PARIS))
    source.write_bytes(source.read_bytes()[:-3])
    with pytest.raises(InputError, match="lacks the ]"):
        read(str(source))


def test_a_missing_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json' cannot be read"):
        read(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="no regular file"):
        read(str(tmp_path))

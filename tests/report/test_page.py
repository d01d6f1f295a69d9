"""The report as a parser sees it: nothing from a corpus becomes markup, and nothing is loaded."""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pytest
from support.reports import COLUMNS, NOTHING, QUALITY, RUN, evaluation

from gemel_engine.display import cut, excerpt, shares, visible
from gemel_engine.evaluation.judge import Comparison, Measured
from gemel_engine.evaluation.leaks import LeakAudit
from gemel_engine.evaluation.quality import ConfidenceQuality
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.knowledge_base.store import Entity
from gemel_engine.report.entities import ShownEntity
from gemel_engine.report.gallery import GalleryItem, ShownDemonstration
from gemel_engine.report.page import render_report
from gemel_engine.report.pictures import Thumbnail
from gemel_engine.retrieval.table import Demonstration
from gemel_engine.types import PREDICTION_SCHEMA, Mention

HOSTILE = [
    "<script>alert(1)</script>",
    '" onload="alert(1)" x="',
    "' onload='alert(1)",
    "</style><img src=x onerror=alert(1)>",
    "</script><script>",
    "--><!--",
    "]]></svg>",
    "{{ 7 * 7 }}{% raw %}&amp;",
    "a\x00b\x1b[31m\x7f\x9b\ud800",
    "\u202eright to left\u2067",
    "\u200bno width\u2060\U000e0041\ufeff",
    "javascript:alert(1)",
    "x" * 100_000,
]


class Page(HTMLParser):
    """What a browser would build: elements with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(attributes)) for tag, attributes in self.elements]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def count(self, tag: str, css_class: str) -> int:
        return sum(name == tag and css_class in a.get("class", "").split() for name, a in self.elements)


def prediction(mention_id: str, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(PREDICTION_SCHEMA.names) | {"mention_id": mention_id, "candidates": []} | values


def gallery(word: str = "bear") -> list[GalleryItem]:
    """A right answer, a wrong one and an error, with one word wherever a corpus has a say."""
    candidates = [
        {"entity_id": word, "name": word, "log_prob": -0.5},
        {"entity_id": "Q2", "name": word, "log_prob": -1.5},
    ]
    pool = [
        {"entity_id": entity_id, "score": 1.0, "reasons": [("form", 3.0), (word, 0.5)]}
        for entity_id in ("Q2", *(f"Q{n}" for n in range(10, 18)), word)
    ]
    answer = {"entity_id": word, "entity_name": word, "probability": 0.6, "candidates": candidates, "num_rollouts": 2}
    answer["pool"] = pool
    entity = ShownEntity(word, Entity(word, word, f"About {word}.", None), Thumbnail(fault=word))
    pictured = ShownEntity("Q2", Entity("Q2", word, f"About {word}.", None), Thumbnail(b"webp"))
    demonstration = Demonstration(word, f"A {word} dances.", word, word, word, word)
    mention = Mention(word, f"A {word} plays.", word, 2)
    common: dict[str, Any] = {
        "mention": mention,
        "picture": Thumbnail(b"webp"),
        "demonstrations": (ShownDemonstration(demonstration, Thumbnail(fault=word)), entity),
        "entities": {word: entity, "Q2": pictured},
    }
    return [
        GalleryItem(
            prediction=prediction(word, **answer, certified=True, margin=1.0, is_nil=False, confidence=0.9),
            right=True,
            gold_id=word,
            gold_name=word,
            **common,
        ),
        GalleryItem(
            prediction=prediction(word, **answer, certified=False, is_nil=True, nil_probability=0.2),
            right=False,
            gold_id="Q3",
            **common,
        ),
        GalleryItem(
            prediction=prediction(word, error=word), right=False, mention=mention, picture=Thumbnail(fault=word)
        ),
    ]


def table(items: list[GalleryItem]) -> pa.Table:
    rows = [{name: item.prediction[name] for name in COLUMNS} for item in items]
    schema = pa.schema([PREDICTION_SCHEMA.field(name) for name in COLUMNS])
    return pa.Table.from_pylist(rows, schema=schema)


def everything(word: str = "bear", figure: Measured = Measured(0.5, 0.25, 0.75, 3)) -> dict[str, Any]:  # noqa: B008
    items = gallery(word)
    return {
        "title": word,
        "run": RUN | {"errors": {word: 1}, "stage_seconds": {word: 1.0}, "feature_mapper": word},
        "predictions": table(items),
        "gallery": items,
        "evaluation": evaluation(word, figure),
        "confidence": {word: QUALITY, "probability": QUALITY},
        "comparisons": {
            "Beside another run": Comparison(
                difference=figure, num_changed=2, won=(word,), lost=(word,) * 200, p_value=0.01
            )
        },
        "weights": ScoreWeights(
            features={"form_prior": 2.0, "likeness": -1.0}, language_model=1.0, risks=(), fitted_on={}
        ),
        "leaks": LeakAudit(num_mentions=3, mention_ids=0, texts=1, mentions_in_texts=0, pictures=None),
    }


@pytest.fixture(scope="module")
def harmless() -> Page:
    return Page(render_report(**everything()))


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_of_a_corpus_becomes_markup(harmless: Page, word: str) -> None:
    html = render_report(**everything(word))
    page = Page(html)
    assert page.structure == harmless.structure
    assert visible(cut(word, 100)).rstrip("…") in page.text
    assert len(html.encode()) < 500_000
    assert not {chr(code) for code in range(32) if code not in (9, 10)} & set(html)
    assert not {*"\u202e\u2067\u200b\u2060\U000e0041\ufeff"} & set(html)


def test_the_page_loads_nothing_and_runs_its_own_script_alone(harmless: Page) -> None:
    html = render_report(**everything())
    for _, attributes in harmless.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        addresses = [attributes[name] for name in ("src", "href", "xlink:href", "srcset") if name in attributes]
        assert all(address.startswith(("data:image/webp;base64,", "#")) for address in addresses), addresses
        assert all("url(" not in value or "url(#" in value for value in attributes.values())
    (policy,) = (a["content"] for _, a in harmless.elements if a.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        assert [name for name, _ in harmless.elements].count(tag) == 1
        content = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy


def test_identifiers_are_unique_and_references_lead_somewhere(harmless: Page) -> None:
    identifiers = [attributes["id"] for _, attributes in harmless.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for _, attributes in harmless.elements:
        for name, value in attributes.items():
            if name == "href" and value.startswith("#"):
                assert value[1:] in identifiers
            elif value.startswith("url(#"):
                assert value[5:-1] in identifiers
            elif name == "aria-labelledby":
                assert value in identifiers


def test_everything_that_is_drawn_has_a_name(harmless: Page) -> None:
    for tag, attributes in harmless.elements:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes["aria-label"]
        if tag == "input":
            assert attributes["aria-label"]


def test_equal_input_gives_equal_bytes() -> None:
    assert render_report(**everything()) == render_report(**everything())


def test_candidates_the_pool_and_cards_have_their_entities(harmless: Page) -> None:
    classes = [attributes.get("class") for _, attributes in harmless.elements]
    assert classes.count("entity") == 4  # two candidates of two mentions
    titles = [attributes["title"] for _, attributes in harmless.elements if "title" in attributes]
    assert titles == ["bear"] * 2 * 3  # a candidate, a demonstration and a card, whose pictures have a fault
    starts = [attributes["start"] for tag, attributes in harmless.elements if tag == "ol" and "start" in attributes]
    assert starts == ["1", "9"] * 2
    text = " ".join(harmless.text.split())
    assert text.count("Candidate pool (10)") == 2
    assert text.count("Candidate pool (10), without the gold entity") == 1
    assert "2 more" in text
    assert "training mentions of this form: 3; bear 0.50" in text
    assert "card: bear gold About bear." in text
    assert "Q17" in text


def test_bars_show_what_each_feature_adds(harmless: Page) -> None:
    assert "form prior 6.9" in harmless.text
    assert "likeness −0.2" in harmless.text
    without = Page(render_report(**(everything() | {"weights": None})))
    assert "form prior" not in without.text
    assert without.count("svg", "bar") < harmless.count("svg", "bar")


def test_an_output_without_pools_has_no_pool() -> None:
    items = gallery()
    for item in items:
        assert isinstance(item.prediction, dict)
        item.prediction.pop("pool")
    arguments = everything() | {"gallery": items, "evaluation": replace(evaluation(), pool_recall=None)}
    text = Page(render_report(**arguments)).text
    assert "andidate pool" not in text
    assert "Gold in the candidate pool" in Page(render_report(**everything())).text


def test_what_is_known_with_gold(harmless: Page) -> None:
    flags = [attributes["data-flags"] for tag, attributes in harmless.elements if tag == "article"]
    assert flags == ["right certified", "wrong uncertified nil", "wrong error"]
    filters = [attributes["data-filter"] for tag, attributes in harmless.elements if tag == "button"]
    assert filters == ["all", "right", "wrong", "certified", "uncertified", "nil", "error"]
    assert harmless.count("svg", "plot") == 3
    for expected in (
        "50.0\u202f%",
        "[25.0, 75.0]",
        "[0.250, 0.750]",
        "gold: Q3",
        "and 100 more",
        "0.0100",
        "base: 1, 1 of",
    ):
        assert expected in harmless.text


def test_no_search_was_stopped_where_evidence_decided() -> None:
    items = gallery()
    for item in items:
        assert isinstance(item.prediction, dict)
        item.prediction.update(certified=False, decided_by="evidence", num_rollouts=0)
    page = Page(render_report(**(everything() | {"gallery": items, "predictions": table(items)})))
    assert page.count("svg", "plot") == 2  # none of rollouts
    flags = [attributes["data-flags"] for tag, attributes in page.elements if tag == "article"]
    assert flags == ["right", "wrong nil", "wrong error"]
    assert not [text for text in page.text.splitlines() if text.strip() == "search stopped early"]


def test_without_gold_the_gold_parts_are_left_out() -> None:
    items = [replace(item, right=None, gold_id=None, gold_name=None) for item in gallery()]
    page = Page(render_report(title="bears", run=RUN, predictions=table(items), gallery=items))
    filters = [attributes["data-filter"] for tag, attributes in page.elements if tag == "button"]
    assert filters == ["all", "certified", "uncertified", "nil", "error"]
    assert page.count("svg", "plot") == 1
    for absent in ("Accuracy", "gold", "Confidence", "Beside another run", "training split", "right\n"):
        assert absent not in page.text.partition('"use strict"')[0].rpartition("}")[2]


def test_an_empty_gallery_and_a_run_of_errors() -> None:
    items = gallery()[2:]
    run = RUN | {"certified_share": None, "rollouts_per_mention": None, "stage_seconds": {}, "rows_linked_now": 0}
    page = Page(render_report(title="bears", run=run, predictions=table(items), gallery=items))
    assert page.count("article", "card") == 1
    assert page.count("svg", "plot") == 0
    page = Page(render_report(title="bears", run=run, predictions=table([]), gallery=[]))
    assert page.count("article", "card") == 0
    assert "None were drawn" in page.text


def test_figures_that_are_no_numbers() -> None:
    bad = ConfidenceQuality(
        expected_calibration_error=math.nan,
        brier_score=math.nan,
        area_under_risk_coverage=math.nan,
        reliability=((math.nan, math.nan, 0), (0.5, math.nan, 3)),
        risk_coverage=((0.5, math.nan),),
    )
    empty = replace(bad, reliability=(), risk_coverage=())
    arguments = everything(figure=NOTHING) | {"confidence": {"confidence": bad, "probability": empty}}
    page = Page(render_report(**arguments))
    assert "nan" not in page.text.partition('"use strict"')[0].rpartition("}")[2].lower()
    assert not [value for _, attributes in page.elements for value in attributes.values() if "nan" in value.lower()]


def test_long_texts_are_cut_around_the_surface_form() -> None:
    text = "a" * 500 + "bear" + "b" * 500 + "bear"
    assert excerpt(text, "bear", None, 5) == ("…aaaa", "bear", "bbbb…")
    assert excerpt(text, "bear", 1004, 5) == ("…bbbb", "bear", "")
    assert excerpt(text, "bear", 7, 5) == ("…aaaa", "bear", "bbbb…")  # a wrong offset
    assert excerpt(text, "wolf", 3, 5) == ("aaaaaaaaa…", "", "")
    assert excerpt("bear", "bear", 0, 5) == ("", "bear", "")


def test_shares_are_relative_to_the_first_name() -> None:
    assert shares(0.6, [-1.0, -1.0 + math.log(0.5), -1.0]) == pytest.approx([0.6, 0.3, 0.6])
    assert shares(0.25, [-2.0, -2.0 + math.log(2)]) == pytest.approx([0.25, 0.5])  # ranked by another objective
    assert shares(1e-300, [-700.0, -0.1]) == pytest.approx([1e-300, 1.0])
    assert shares(None, [-1.0]) == [0.0]
    assert shares(None, []) == []

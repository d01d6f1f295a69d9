"""Render the report of a run: numbers, plots and a gallery, as one HTML file that needs no network.

Text from a corpus is untrusted: it is escaped, its invisible characters are made visible, and a
content security policy allows only scripts, styles and pictures that the file itself contains.
Equal arguments give equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gemel_engine.config.components import ImagePolicy
from gemel_engine.display import cut, excerpt, shares, visible
from gemel_engine.evaluation.judge import Comparison, Evaluation, Measured
from gemel_engine.evaluation.leaks import LeakAudit
from gemel_engine.evaluation.quality import ConfidenceQuality
from gemel_engine.evaluation.run import JudgedRun, LinkedRun
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.extras import extra
from gemel_engine.report import plots
from gemel_engine.report.entities import ShownEntity
from gemel_engine.report.gallery import GalleryItem, ShownDemonstration, gallery_items
from gemel_engine.report.pictures import Thumbnail
from gemel_engine.report.proposed import Proposed, proposed
from gemel_engine.retrieval.index import MANIFEST, DemonstrationIndex
from gemel_engine.storage.cache import download_directory

with extra("report"):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

NOTHING = "–"
_CONTEXT = 240  # characters on each side of a surface form
_MAX_NAME, _MAX_ERROR = 120, 400
_POOL_SHOWN = 8  # number of entities of a candidate pool that need no unfolding
_PROTOCOLS = {
    "entity": "the entity’s id, of all entities",
    "name": "the entity’s name, of all names",
    "candidates": "the entity’s id, of the mention’s own candidates",
}
_FILTERS = {
    "all": "All",
    "right": "Right",
    "wrong": "Wrong",
    "certified": "Search complete",
    "uncertified": "Search stopped early",
    "nil": "NIL",
    "error": "Errors",
}


def render_report(
    *,
    title: str,
    run: Mapping[str, Any],
    predictions: pa.Table,
    gallery: Sequence[GalleryItem],
    evaluation: Evaluation | None = None,
    confidence: Mapping[str, ConfidenceQuality] | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
    leaks: LeakAudit | None = None,
    weights: ScoreWeights | None = None,
) -> str:
    """Render a report; it has no section for an argument that is None.

    Args:
        title: Title of the page.
        run: Contents of the run's `_report.json`.
        predictions: Output of the run, at least `certified`, `is_nil` and `num_rollouts`.
        gallery: Mentions to show (see `gallery_items`).
        evaluation: Accuracy of the run.
        confidence: Quality of each score, by its name; the first is drawn most prominently.
        comparisons: Comparisons with other runs, by their headings.
        leaks: Overlap with the training split.
        weights: Weights of the run's score, to show what each feature adds to it.
    """
    cards = [_Card.of(item, weights) for item in gallery]
    num_rollouts = predictions["num_rollouts"].drop_null().to_numpy()
    num_rollouts = num_rollouts[num_rollouts > 0]  # evidence decides without a search
    flags = Counter(flag for card in cards for flag in card.flags) | {"all": len(cards)}
    return _ENVIRONMENT.get_template("page.html.j2").render(
        title=title,
        run=run,
        protocol=evaluation and _PROTOCOLS[evaluation.protocol],
        evaluation=evaluation,
        shares=_shares(predictions),
        confidence=confidence,
        comparisons=comparisons or {},
        leaks=leaks,
        stages=_stages(run),
        rollouts_plot=plots.rollouts(num_rollouts) if len(num_rollouts) else None,
        plots=plots,
        cards=cards,
        filters=[
            (flag, label, flags.get(flag, 0))
            for flag, label in _FILTERS.items()
            if evaluation or flag not in ("right", "wrong") or flags.get(flag)
        ],
    )


def report_of(
    linked: LinkedRun,
    judged: JudgedRun | None,
    *,
    training: str | None,
    gallery_size: int,
    entities: str | None = None,
    image_source: ImagePolicy | None = None,
    comparisons: Mapping[str, Comparison] | None = None,
) -> str:
    """Render the report of a finished run, without what is not there any more of its artifacts.

    Args:
        linked: The run.
        judged: Results of judging the run; None without gold labels.
        training: Table file or directory with the pictures of the demonstrations; None: without.
        gallery_size: Number of mentions to show.
        entities: Table file or directory with the pictures of entities; None: only addresses in
            the run's knowledge base.
        image_source: Policy for reading image addresses, independent of the run's own; None: no
            address is read.
        comparisons: Comparisons with further runs, by their headings.
    """
    gallery = gallery_items(
        linked.predictions,
        linked.settings["input"],
        _open_demonstrations(linked),
        size=gallery_size,
        stored_names=linked.stored_names,
        judged=None if judged is None else judged.verdicts,
        training=training,
        knowledge_base=linked.open_knowledge_base() if linked.has_knowledge_base() else None,
        entities=entities,
        image_source=image_source,
    )
    page = partial(
        render_report,
        title=linked.output,
        run=linked.report,
        predictions=linked.predictions,
        gallery=gallery,
        weights=linked.open_weights(),
    )
    if judged is None:
        return page()
    return page(
        evaluation=judged.evaluation,
        confidence=judged.confidence,
        comparisons={
            **({} if judged.comparison is None else {"Beside another run": judged.comparison}),
            **(comparisons or {}),
        },
        leaks=judged.leaks,
    )


def _open_demonstrations(linked: LinkedRun) -> DemonstrationIndex | None:
    """Open the demonstrations of a run; None if it had none, or if they are not there any more."""
    address = linked.settings["demonstrations"]
    if address is None or not linked.has_artifact("demonstrations", f"{address}/{MANIFEST}"):
        return None
    return DemonstrationIndex.open(download_directory(address))


@dataclass(frozen=True, slots=True)
class _Text:
    """An excerpt of a text: the surface form and what surrounds it."""

    before: str
    mention: str
    after: str

    @classmethod
    def of(cls, text: str, surface_form: str, start: int | None = None) -> _Text:
        return cls(*excerpt(text, surface_form, start, _CONTEXT))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Card:
    """A gallery item, prepared for the template.

    Attributes:
        item: The gallery item.
        text: Excerpt of the text around the mention.
        flags: Filters that show the item.
        candidates: Candidates, each with a lower bound of its share of the probability of all
            names, and its entity.
        are_pictured: Whether a candidate has a picture, be it one that can't be shown.
        pool: The candidate pool in two parts: what is shown, and what is folded.
        pool_lacks_gold: Whether there is a pool, and the gold entity is not in it.
        demonstrations: Demonstrations, each with an excerpt of its text, and entities of cards,
            each with None.
    """

    item: GalleryItem
    text: _Text
    flags: list[str]
    candidates: list[tuple[Mapping[str, Any], float, ShownEntity]]
    are_pictured: bool
    pool: tuple[list[Proposed], list[Proposed]]
    pool_lacks_gold: bool
    demonstrations: list[tuple[_Text | None, ShownDemonstration | ShownEntity]]

    @classmethod
    def of(cls, item: GalleryItem, weights: ScoreWeights | None) -> _Card:
        row, mention = item.prediction, item.mention
        is_set = {
            "right": item.right is True,
            "wrong": item.right is False,
            "certified": row["certified"] is True,
            "uncertified": row["certified"] is False and row.get("decided_by") != "evidence",
            "nil": row["is_nil"] is True,
            "error": row["error"] is not None,
        }
        candidates = row["candidates"] or []
        entities = [item.entity(candidate["entity_id"]) for candidate in candidates]
        pool = proposed(item, weights)
        return cls(
            item=item,
            text=_Text.of(mention.text, mention.mention, mention.mention_start),
            flags=[flag for flag, holds in is_set.items() if holds],
            candidates=list(
                zip(candidates, shares(row["probability"], [c["log_prob"] for c in candidates]), entities, strict=True)
            ),
            are_pictured=any(entity.picture != Thumbnail() for entity in entities),
            pool=(pool[:_POOL_SHOWN], pool[_POOL_SHOWN:]),
            pool_lacks_gold=bool(pool) and item.gold_id not in (None, *(found.entity.entity_id for found in pool)),
            demonstrations=[(_text_of(shown), shown) for shown in item.demonstrations],
        )


def _text_of(shown: ShownDemonstration | ShownEntity) -> _Text | None:
    if isinstance(shown, ShownEntity):
        return None
    return _Text.of(shown.demonstration.text, shown.demonstration.mention)


def _shares(predictions: pa.Table) -> dict[str, float | None]:
    """Return the shares of rows that are certified and NIL; None if unknown for all rows."""
    return {name: pc.mean(predictions[name]).as_py() for name in ("certified", "is_nil")}


def _stages(run: Mapping[str, Any]) -> list[tuple[str, float, float, float | None]]:
    """Return each stage's name, busy seconds, share of them all, and mentions per busy second."""
    seconds: Mapping[str, float] = run.get("stage_seconds") or {}
    total, rows = sum(seconds.values()), run.get("rows_linked_now") or 0
    return [
        (name, spent, spent / total if total else 0.0, rows / spent if spent else None)
        for name, spent in seconds.items()
    ]


def _is_nothing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _number(value: float | None, digits: int = 0) -> str:
    """Format a number with a proper minus sign and thin spaces between thousands."""
    return NOTHING if _is_nothing(value) else f"{value:,.{digits}f}".replace(",", "\u202f").replace("-", "−")


def _percent(value: float | None, digits: int = 1) -> str:
    return NOTHING if value is None or _is_nothing(value) else f"{_number(100 * value, digits)}\u202f%"


def _interval(measured: Measured, scale: float = 100, digits: int = 1) -> str:
    if _is_nothing(measured.low) or _is_nothing(measured.high):
        return NOTHING
    return f"[{_number(scale * measured.low, digits)}, {_number(scale * measured.high, digits)}]"


def _extent(share: float | None) -> str:
    """Format a share as a length in SVG; 0% if it is not a number."""
    return "0%" if share is None or _is_nothing(share) else f"{100 * min(1.0, max(0.0, share)):.2f}%"


def _data_uri(picture: bytes) -> str:
    return f"data:image/webp;base64,{b64encode(picture).decode()}"


def _csp_hash(content: str) -> str:
    """Return the source by which a content security policy allows this style sheet or script."""
    return f"sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _shown(value: object) -> object:
    """Prepare a value for the template, which escapes it afterwards."""
    if value is None:
        return NOTHING
    return visible(value, lines=True) if type(value) is str else value  # Markup is trusted


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "interval": _interval,
        "extent": _extent,
        "data_uri": _data_uri,
        "csp_hash": _csp_hash,
        "name": lambda name: cut(name or NOTHING, _MAX_NAME),
        "error": lambda message: cut(message, _MAX_ERROR),
    }
    return environment


_ENVIRONMENT = _environment()

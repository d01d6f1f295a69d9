"""Draw the plots of the report with matplotlib, as SVG inside the HTML page.

Text stays text, and colours become CSS variables of the page, so plots follow its dark mode. There
are no style attributes or style elements, because the page's content security policy forbids them.
Equal data gives equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from gemel_engine.evaluation.quality import ConfidenceQuality
from gemel_engine.extras import extra

with extra("report"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

# Placeholder colours, replaced by variables of the page's style sheet.
_INK, _MUTED, _RULE, _ACCENT = "#000001", "#000002", "#000003", "#000004"
_VARIABLES = {_INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)", _ACCENT: "var(--accent)"}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gemel",  # makes identifiers reproducible
    "font.size": 9,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
}
_SIZE_INCHES = (4.8, 3.3)


class _Line(NamedTuple):
    """The line style of a score; styles differ in more than their colours."""

    color: str
    marker: str
    linestyle: str
    dashes: str


_LINES = (_Line(_ACCENT, "o", "-", "none"), _Line(_MUTED, "s", "--", "5 3"), _Line(_INK, "^", ":", "1.5 2.5"))


def swatch(number: int) -> Markup:
    """Draw a short piece of the line of the n-th score, for a legend."""
    line = _LINES[number % len(_LINES)]
    return Markup(
        '<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><path d="M0 4H24" stroke="{}" stroke-width="2" '
        'stroke-dasharray="{}"/></svg>'
    ).format(_VARIABLES[line.color], line.dashes)


def reliability(confidence: Mapping[str, ConfidenceQuality]) -> Markup:
    """Plot accuracy over confidence by bins, with 95% Wilson intervals and the diagonal."""
    figure, axes = _percentages("confidence", "accuracy")
    axes.plot([0, 1], [0, 1], color=_RULE, linewidth=1.5)
    for quality, line in _first_on_top(confidence):
        bins = [item for item in quality.reliability if item[2] and np.isfinite(item[:2]).all()]
        for place, accuracy, num_mentions in bins:
            interval = binomtest(round(accuracy * num_mentions), num_mentions).proportion_ci(method="wilson")
            axes.plot([place, place], [interval.low, interval.high], color=line.color, linewidth=0.8)
        points = [item[0] for item in bins], [item[1] for item in bins]
        axes.plot(*points, line.marker, linestyle=line.linestyle, color=line.color, markersize=4.5, linewidth=1.5)
    return _markup(figure, "reliability", "Reliability diagram: accuracy over confidence")


def risk_coverage(confidence: Mapping[str, ConfidenceQuality]) -> Markup:
    """Plot the error rate of the most confident answers over the share of mentions answered."""
    figure, axes = _percentages("share of mentions answered", "error rate among them")
    highest = 0.0
    for quality, line in _first_on_top(confidence):
        curve = np.array([point for point in quality.risk_coverage if np.isfinite(point).all()]).reshape(-1, 2)
        axes.plot(curve[:, 0], curve[:, 1], linestyle=line.linestyle, color=line.color, linewidth=1.8)
        highest = max(highest, curve[:, 1].max(initial=0.0))
    axes.set_ylim(0, min(1.05 * highest, 1.0) or 1.0)
    return _markup(figure, "risk", "Risk and coverage: error rate over the share of mentions answered")


def rollouts(counts: ArrayLike) -> Markup:
    """Plot the share of searches by number of rollouts (integers from 1), in bins that double."""
    numbers = np.asarray(counts, np.float64)
    shares = np.bincount(np.ceil(np.log2(numbers)).astype(np.intp), minlength=1) / max(1, len(numbers))
    labels = ["1", "2", *(f"{2 ** (k - 1) + 1}–{2**k}" for k in range(2, len(shares)))][: len(shares)]
    figure, axes = _percentages("rollouts", "share of searches")
    axes.grid(visible=False, axis="x")
    axes.bar(range(len(shares)), shares, width=0.7, color=_ACCENT)
    axes.set(xlim=(-0.6, max(len(shares), 5) - 0.4), ylim=(0, 1.05 * shares.max(initial=0.0) or 1.0))
    axes.set_xticks(range(len(shares)), labels)
    axes.tick_params(axis="x", length=0)
    return _markup(figure, "rollouts", "Rollouts per search: share of searches by number of rollouts")


def _first_on_top(confidence: Mapping[str, ConfidenceQuality]) -> Iterator[tuple[ConfidenceQuality, _Line]]:
    """Yield scores and their lines in reverse, so that the first one is drawn on top."""
    return reversed(list(zip(confidence.values(), cycle(_LINES), strict=False)))


def _percentages(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Create a figure, independent of pyplot's state, with axes from 0 to 100%."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE_INCHES)
        figure.subplots_adjust(left=0.14, right=0.95, bottom=0.14, top=0.97)
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, xlim=(0, 1), ylim=(0, 1))
        axes.grid(visible=True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def _markup(figure: Figure, name: str, label: str) -> Markup:
    """Convert a figure to an `svg` element; `name` prefixes ids and must be unique on the page."""
    with matplotlib.rc_context(_SETTINGS), io.BytesIO() as file:
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = dict(_attributes(element.attrib, name))
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": "plot", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attributes(attributes: Mapping[str, str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield an element's attributes, with its style split into one attribute per property."""
    for key, value in attributes.items():
        if key == "style":
            for declaration in filter(None, value.split(";")):
                style, _, setting = (part.strip() for part in declaration.partition(":"))
                if style != "font-family":  # the page sets it
                    yield style, _VARIABLES.get(setting, setting)
        elif key == "id":
            yield key, f"{prefix}-{value}"
        else:
            yield key.rpartition("}")[2], value.replace("#", f"#{prefix}-")  # references to ids

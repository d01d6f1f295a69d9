"""The page of results: which figures of `benchmarks/results/*.json` stand on it, by topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from accuracy import ablations, cards, confidence, mapper, models, score, share
from costs import candidates, decoding, finding, runs, sizing, speed, start
from figures import Results
from tables import Facts, Table, rendered

HEAD = """# Results

Every figure here was measured on one machine with two CPU cores; none comes from a GPU. This page
is generated: `make docs` writes it from `benchmarks/results/*.json`, where each figure has its
command, its commit and its conditions. A command *at* a commit is to be run there: its script has
another name since, or was needed once. What can be measured again stands in `benchmarks/README.md`.
WIKIDIVERSE and DATA stand for directories with that corpus, TITLES for a table of names.

The models are small: SmolLM2-135M, MiniLM and EfficientNet-Lite2. What the tables compare holds for
them; the level of accuracy does not carry over to larger ones. In brackets are 95% intervals, by
bootstrap over the mentions; differences are paired.
"""
Sections = Mapping[str, tuple[Table | Facts, ...]]


def page(results: Results) -> str:
    """Return `docs/results.md`."""
    shown = sections(results)
    parts = [HEAD]
    for title, tables in shown.items():
        parts += [f"## {title}\n", *(rendered(table, results) + "\n" for table in tables)]
    if rest := [name for name in results.names() if not any(name in sources(tables) for tables in shown.values())]:
        parts.append("## Other measurements\n")
        parts += [rendered(everything(name, results), results) + "\n" for name in rest]
    return "\n".join(parts)


def sources(tables: tuple[Table | Facts, ...]) -> set[str]:
    """Return the names of the files that some tables read."""
    places = [column.place for table in tables if isinstance(table, Table) for column in table.columns]
    named = {table.source for table in tables if isinstance(table, Facts)}
    return named | {place.partition("/")[0] for place in places}


def everything(name: str, results: Results) -> Facts:
    """Return a table of all plain figures of a file that has no table of its own."""
    rows = []
    for key, value in leaves(results.read(name), ()):
        layout = ".4g" if isinstance(value, float) else ""
        rows.append((", ".join(key).replace("|", "/"), "/".join(key), layout))
    return Facts(f"From `benchmarks/results/{name}.json`.", name, rows)


def leaves(found: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield the place and the value of each number or short text of a file of results."""
    if isinstance(found, dict):
        found = found.get("value", found)
    if isinstance(found, dict):
        for name, value in found.items():
            yield from leaves(value, (*key, name))
    elif isinstance(found, int | float) or (isinstance(found, str) and len(found) < 60):
        yield key, found


def sections(results: Results) -> Sections:
    """Return the tables by topic."""
    return {
        "The score of language model and evidence": score(),
        "What small language models add": share(results),
        "Other language models": (models(results),),
        "Which cards a prompt has": cards(),
        "What each part adds": tuple(ablations(results)),
        "Confidence and NIL": (confidence(),),
        "Exact decoding": decoding(results),
        "Pictures, and training of the feature mapper": mapper(results),
        "Mentions of documents": finding(),
        "Candidates": (candidates(),),
        "Speed of parts": speed(),
        "From the shell to the rows": start(results),
        "Runs: faults, overhead, changes, plans": runs(),
        "Sizes on paper": sizing(results),
    }

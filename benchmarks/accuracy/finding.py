"""Mentions by dictionary: precision, recall and F1 on WikiDiverse, and what settings change.

    python -m benchmarks.accuracy finding DATA
    python -m benchmarks.accuracy finding DATA --link LINK.toml --num-documents 100

Finding alone takes a few minutes on two cores, linking 100 captions the better part of an hour. The rows of a text are
its gold mentions, each at the next whole-word occurrence of its surface form. The settings were chosen on train, whose
halves are each other's gold; dev is measured once with the defaults. "place and entity" takes the most frequent entity
of a form in train, else the entity of that name, as `gemel evaluate` does for its accuracy without a model. The
knowledge base are the entities of the dataset alone, those of dev's gold among them: a larger one has more names that
are no mentions.

With `--link`, the captions of a sample of dev are linked from end to end instead, as documents without pictures, by a
configuration that names knowledge base, demonstrations of train and models; `input` and `output` are set here.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks.corpora import read_rows
from benchmarks.record import ResultFile
from gemel_engine.config.finding import FinderSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.evaluation.spans import Agreement, Place, occurrences
from gemel_engine.evidence.normal_form import without_qualifier
from gemel_engine.finding.dictionary import DictionaryFinder, TrainingText, lower_case_words

WORK = Path("build/finding")
DEFAULTS = FinderSettings()

Texts = Mapping[str, Sequence[str]]  # surface forms of the mentions of each text


def main(
    data: tyro.conf.Positional[Path],
    *,
    link: Path | None = None,
    num_documents: int = 100,
) -> None:
    """Mentions by dictionary: measure finding alone, or linked from end to end.

    Args:
        data: Directory of the corpus.
        link: Configuration that links; without one, finding alone is measured.
        num_documents: Number of captions to link.
    """
    results = ResultFile("finding", {"DATA": data} if link is None else {"DATA": data, "LINK.toml": link})
    if link is None:
        measure_finding(data, results)
    else:
        measure_linked(data, link, num_documents, results)


def measure_linked(data: Path, link: Path, num_documents: int, results: ResultFile) -> None:
    """Note mentions found and linked by the commands, by `find_mentions = true`, compared with dev's.

    An interrupted run goes on.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    rows = pq.read_table(data / "dev.parquet", columns=["text", "mention", "entity_id"]).to_pylist()
    texts = sorted({row["text"] for row in rows})
    ids = {text: str(number) for number, text in enumerate(random.Random(0).sample(texts, num_documents))}
    if not (WORK / "documents.parquet").exists():  # else the run to go on with would refuse another one
        pq.write_table(pa.table({"document_id": [*ids.values()], "text": [*ids]}), WORK / "documents.parquet")
    gold = [row | {"group": ids[row["text"]]} for row in rows if row["text"] in ids]
    pq.write_table(pa.Table.from_pylist(gold), WORK / "gold.parquet")
    config = load_config(LinkConfig, link)
    output = WORK / "linked"
    files = ("--input", str(WORK / "documents.parquet"), "--output", str(output))
    gemel("link", str(link), *files, "--find-mentions")
    gemel("evaluate", str(output), "--found", "--gold", str(WORK / "gold.parquet"))
    judged = json.loads((output / "_evaluation/found.json").read_text())
    report = json.loads((output / "_report.json").read_text())
    value = {"place": judged["mentions"], "place and entity": judged["linked"], "report": report}
    what = (
        f"WikiDiverse dev, {num_documents} captions with {len(gold)} mentions, {Path(config.language_model.name).name}"
    )
    results.note({"linked": value}, what)


def gemel(*command: str) -> None:
    """Run a command of the engine; its output is appended to a log."""
    with (WORK / "log.txt").open("a") as log:
        subprocess.run([sys.executable, "-m", "gemel_engine.cli.main", *command], check=True, stdout=log, stderr=log)


def measure_finding(data: Path, results: ResultFile) -> None:
    """Note what settings find on the halves of train, and the defaults on dev."""
    names = [row["name"] for row in read_rows(data / "entities.parquet")]
    train, dev = (read_texts(data / f"{split}.parquet") for split in ("train", "dev"))
    halves = [dict(list(train.items())[first::2]) for first in (0, 1)]
    on_train = {
        f"ignore_case={ignores_case} min_prior={min_prior}": figures(
            *(
                agreement(finder(names, halves[1 - held_out], min_prior, ignores_case), halves[held_out])
                for held_out in (0, 1)
            )
        )
        for ignores_case, min_prior in product((True, False), (0.2, 0.3, 0.4, 0.5, 0.6, 0.7))
    }
    defaults = DEFAULTS.min_prior, DEFAULTS.ignore_case
    found = finder(names, train, *defaults)
    started = time.process_time()
    on_dev = agreement(found, dev)
    characters_per_processor_second = round(sum(map(len, dev)) / (time.process_time() - started))
    variants = {
        "defaults": on_dev,
        "no filter": agreement(finder(names, train, 0.0, DEFAULTS.ignore_case), dev),
        "names alone": agreement(finder(names, {}, *defaults), dev),
        "training forms alone": agreement(finder([], train, *defaults), dev),
    }
    variants["defaults, place and entity"] = with_entities(found, data)
    corpus = f"{len(names)} names, {len(train)} texts of train"
    results.note({"train_halves": on_train}, f"WikiDiverse train, each half with the other's, {corpus}")
    of_dev = {name: figures(item) for name, item in variants.items()}
    results.note({"dev": of_dev}, f"WikiDiverse dev, {len(dev)} texts, {corpus}")
    speed = {"dev_characters_per_processor_second": characters_per_processor_second}
    results.note(speed, "WikiDiverse dev, scoring counted")


def read_texts(path: Path) -> Texts:
    """Return the surface forms of the mentions of each text, in their order."""
    texts = defaultdict(list)
    for row in read_rows(path):
        texts[row["text"]].append(row["mention"])
    return texts


def finder(names: Sequence[str], train: Texts, min_prior: float, ignores_case: bool) -> DictionaryFinder:
    """Return the dictionary of names and of the mentions of training texts."""
    with tempfile.TemporaryDirectory() as directory:
        return DictionaryFinder.build(
            Path(directory),
            chain(names, map(without_qualifier, names)),
            lower_case_words(chain(names, train)),
            [TrainingText(text, frozenset(mentions)) for text, mentions in train.items()],
            min_prior=min_prior,
            ignores_case=ignores_case,
        )


def agreement(finder: DictionaryFinder, texts: Texts) -> Agreement:
    """Return what a finder finds in texts, compared with their mentions."""
    found = {Place(text, *span) for text, spans in zip(texts, finder.find(list(texts)), strict=True) for span in spans}
    return Agreement.of(found, {place for text, mentions in texts.items() for place in places(text, mentions)})


def places(text: str, mentions: Sequence[str]) -> set[Place]:
    """Return the places of the mentions of a text, a further one for each row of a form while it has further ones."""
    return {
        Place(text, start, start + len(mention))
        for mention, count in Counter(mentions).items()
        for start in occurrences(text, mention)[:count]
    }


def with_entities(finder: DictionaryFinder, data: Path) -> Agreement:
    """Return what a finder finds in dev and a lookup links, compared with dev's mentions and entities."""
    train, dev, entities = (read_rows(data / f"{name}.parquet") for name in ("train", "dev", "entities"))
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        counts[row["mention"]][row["entity_id"]] += 1
    answer_of = {row["name"]: row["entity_id"] for row in reversed(entities)}
    answer_of |= {form: of_form.most_common(1)[0][0] for form, of_form in counts.items()}
    gold: set[tuple[Place, str]] = set()
    num_seen: Counter[tuple[str, str]] = Counter()
    for row in dev:
        starts = occurrences(row["text"], row["mention"])
        start = starts[min(num_seen[row["text"], row["mention"]], len(starts) - 1)]
        num_seen[row["text"], row["mention"]] += 1
        gold.add((Place(row["text"], start, start + len(row["mention"])), row["entity_id"]))
    texts = list(dict.fromkeys(row["text"] for row in dev))
    found = {
        (Place(text, *span), answer)
        for text, spans in zip(texts, finder.find(texts), strict=True)
        for span in spans
        if (answer := answer_of.get(text[span.start : span.stop])) is not None
    }
    return Agreement.of(found, gold)


def figures(*items: Agreement) -> dict[str, float]:
    """Return precision, recall and F1 over all of some comparisons together."""
    num_right, num_found, num_gold = (
        sum(getattr(item, name) for item in items) for name in ("num_right", "num_found", "num_gold")
    )
    return {
        "precision": round(num_right / num_found, 4),
        "recall": round(num_right / num_gold, 4),
        "f1": round(2 * num_right / (num_found + num_gold), 4),
        "num_gold": num_gold,
    }

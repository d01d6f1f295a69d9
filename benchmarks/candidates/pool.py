"""The evidence index: recall of the candidate pool on WikiDiverse dev, and names at Wikipedia's scale.

    python -m benchmarks.candidates pool DATA TITLES [--rivals-per-form 128]

An hour or two on two cores with six million titles. The dictionary and the lexical index are built of the union of the
corpus' entities and TITLES. To embed all of TITLES would take a CPU a day: of them only those are embedded that a
surface form of dev finds by words, its most likely rivals. Embeddings and indices are kept in `build/evidence`, so that
an interrupted run goes on: remove it when the index has changed. Figures go to `benchmarks/results/evidence.json`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray

from benchmarks.corpora import MENTION_ENCODER, mentions_of, read_rows
from benchmarks.record import ResultFile, mean
from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import MANIFEST, EvidenceIndex, complete_evidence
from gemel_engine.evidence.normal_form import normal_form
from gemel_engine.evidence.pool import CandidatePool
from gemel_engine.retrieval.encoder import MentionEncoder

WORK = Path("build/evidence")

FloatArray = NDArray[np.float32]


class EmbeddingCache:
    """Embeddings of texts, kept in a directory."""

    def __init__(self, encoder: MentionEncoder, directory: Path) -> None:
        self._encoder, self._directory = encoder, directory
        self._known: dict[str, FloatArray] = {}
        if (directory / "vectors.npy").exists():
            texts = pq.read_table(directory / "texts.parquet")["text"].to_pylist()
            self._known = dict(zip(texts, np.load(directory / "vectors.npy"), strict=True))

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts, those anew that are not kept yet: shape (texts, E)."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        if missing:
            self._known.update(zip(missing, self._encoder.encode(missing), strict=True))
            self._directory.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": list(self._known)}), self._directory / "texts.parquet")
            np.save(self._directory / "vectors.npy", np.stack(list(self._known.values())))
        return np.stack([self._known[text] for text in texts])


def main(
    data: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    rivals_per_form: int = 128,
) -> None:
    """Recall and cost of the candidate pool, beside the names of a corpus and beside all titles.

    Args:
        data: Directory of the corpus.
        titles: Names, in a column `name`.
        rivals_per_form: Titles that are embedded for a surface form of dev.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    results = ResultFile("evidence", {"DATA": data, "TITLES": titles})
    cache = EmbeddingCache(MentionEncoder(MENTION_ENCODER), WORK / "embeddings")
    names = [row["name"] for row in read_rows(data / "entities.parquet")]
    small, _ = built(names, WORK / "dataset")
    rows = list(range(len(names)))
    recall, size = measured(with_embeddings(small, names, rows, cache, WORK / "names"), data, cache)
    results.note({"pool_recall": recall, "pool_size": size}, f"WikiDiverse dev, text only, {len(names)} names")

    union = names + new_titles(titles, names)
    large, costs = built(union, WORK / "union")
    if costs:
        results.note(costs, f"{len(union)} names, one thread, checksums counted, other work on the machine")
    results.note(
        query_times(large, data), f"{len(union)} names, 32 candidates for a surface form of dev, files in the cache"
    )
    rivals = sorted(likely_rivals(large, data, rivals_per_form) | set(rows))
    what = (
        f"WikiDiverse dev, text only, {len(union)} names, {len(rivals)} of them embedded: the dataset's, and up to "
        f"{2 * rivals_per_form} likely rivals of a surface form; the others could only take places"
    )
    recall, size = measured(with_embeddings(large, union, rivals, cache, WORK / "names_union"), data, cache)
    results.note({"pool_recall_union": recall, "pool_size_union": size}, what)
    without, _ = measured(large, data, cache)
    results.note({"pool_recall_union_without_entity_embeddings": without}, f"WikiDiverse dev, {len(union)} names")


def new_titles(titles: Path, names: Sequence[str]) -> list[str]:
    """Return titles whose normal form is no entity's of the corpus."""
    known = {normal_form(name) for name in names}
    return [title for title in pq.read_table(titles)["name"].to_pylist() if normal_form(title) not in known]


def built(names: Sequence[str], directory: Path) -> tuple[EvidenceIndex, dict[str, object]]:
    """Return the index of names alone, and what it cost if it was built now."""
    if (directory / MANIFEST).exists():
        return EvidenceIndex.open(directory), {}
    started, processor = time.perf_counter(), time.process_time()
    evidence = complete_evidence(pa.table({"name": names}), directory, knowledge_base="benchmark")
    costs: dict[str, object] = {
        "build_seconds": round(time.perf_counter() - started, 1),
        "build_processor_seconds": round(time.process_time() - processor, 1),
        "bytes_per_entity": round(sum(path.stat().st_size for path in directory.rglob("*.*")) / len(names), 1),
    }
    return evidence, costs


def with_embeddings(
    evidence: EvidenceIndex, names: Sequence[str], rows: Sequence[int], cache: EmbeddingCache, directory: Path
) -> EvidenceIndex:
    """Return an index that also finds some of its names by embedding; those are indexed in a directory."""
    vectors = cache.encode([names[row] for row in rows])
    return replace(evidence, names=DenseIndex.build(directory, vectors, np.array(rows, np.uint32), len(names)))


def measured(evidence: EvidenceIndex, data: Path, cache: EmbeddingCache) -> tuple[float, float]:
    """Return the share of dev's mentions whose entity is in the pool, and the pool's mean size."""
    entities, train, dev = (read_rows(data / f"{name}.parquet") for name in ("entities", "train", "dev"))
    row_of = {entity["entity_id"]: row for row, entity in enumerate(entities)}
    forms = FormStatistics(
        [row["mention"] for row in train],
        [row_of[row["entity_id"]] for row in train],
        [row["mention_id"] for row in train],
        cache.encode([row["mention"] for row in train]),
    )
    of_forms, of_texts = (cache.encode([row[column] for row in dev]) for column in ("mention", "text"))
    pools = CandidatePool(evidence, forms).pool(mentions_of(dev), of_forms, of_texts)
    is_found = [
        row_of[mention["entity_id"]] in {candidate.row for candidate in pool.candidates}
        for mention, pool in zip(dev, pools, strict=True)
    ]
    return mean(is_found), mean([len(pool.candidates) for pool in pools], 1)


def query_times(evidence: EvidenceIndex, data: Path) -> dict[str, object]:
    """Return milliseconds for the candidates of a surface form by dictionary and words, passed and worked."""
    clock, processor = [], []
    for form in forms_of_dev(data):
        started, worked = time.perf_counter(), time.thread_time()
        evidence.dictionary.find(form, 32)
        evidence.lexical.similar(form, 32)
        clock.append(1000 * (time.perf_counter() - started))
        processor.append(1000 * (time.thread_time() - worked))
    return {
        f"query_{kind}_{name}": round(float(np.percentile(values, share)), 2)
        for kind, values in (("ms", clock), ("processor_ms", processor))
        for name, share in (("median", 50), ("p99", 99))
    }


def likely_rivals(evidence: EvidenceIndex, data: Path, limit: int) -> set[int]:
    """Return entities that forms of dev find by their words."""
    found: Iterable[tuple[int, float]] = (
        hit
        for form in forms_of_dev(data)
        for hits in (evidence.lexical.similar(form, limit), evidence.lexical.beginning_alike(form, limit))
        for hit in hits
    )
    return {row for row, _ in found}


def forms_of_dev(data: Path) -> list[str]:
    """Return normal forms of dev's surface forms, each once."""
    return list(dict.fromkeys(normal_form(row["mention"]) for row in read_rows(data / "dev.parquet")))

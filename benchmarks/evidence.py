"""The evidence index: recall of the candidate pool on WikiDiverse dev, and names at Wikipedia's scale.

python benchmarks/evidence.py DATA TITLES --mention-encoder MODEL

DATA holds `train.parquet`, `dev.parquet` and `entities.parquet`; TITLES is a Parquet file of names. The dictionary and
the lexical index are built of the union of both. To embed all of TITLES would take a CPU a day: of them only those
are embedded that a surface form of dev finds by words, its most likely rivals. Embeddings and indices are kept in
`build/evidence`, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from numpy.typing import NDArray
from record import record

from gemel_engine.evidence.dense import DenseIndex
from gemel_engine.evidence.forms import FormStatistics
from gemel_engine.evidence.index import MANIFEST, EvidenceIndex, complete_evidence
from gemel_engine.evidence.normal_form import normal_form
from gemel_engine.evidence.pool import CandidatePool
from gemel_engine.retrieval.encoder import MentionEncoder
from gemel_engine.types import Mention

RESULTS = Path("benchmarks/results/evidence.json")
WORK = Path("build/evidence")

FloatArray = NDArray[np.float32]

logger = logging.getLogger("evidence")


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
    mention_encoder: str,
    rivals_per_form: int = 128,
) -> None:
    """Measure, and note the results.

    Args:
        data: Directory of the corpus.
        titles: Names, in a column `name`.
        mention_encoder: Local directory, or name on the model hub.
        rivals_per_form: Titles that are embedded for a surface form of dev.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    command = (
        f"python benchmarks/evidence.py DATA TITLES --mention-encoder {mention_encoder} "
        f"--rivals-per-form {rivals_per_form}"
    )
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def note(values: dict[str, object], what: str) -> None:
        results.update({name: record(value, command, what) for name, value in values.items()})
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        logger.info("%s", values)

    cache = EmbeddingCache(MentionEncoder(mention_encoder), WORK / "embeddings")
    names = pq.read_table(data / "entities.parquet")["name"].to_pylist()
    small, _ = built(names, WORK / "dataset")
    rows = list(range(len(names)))
    recall, size = measured(with_embeddings(small, names, rows, cache), data, cache)
    note({"pool_recall": recall, "pool_size": size}, f"WikiDiverse dev, text only, {len(names)} names")

    union = names + new_titles(titles, names)
    large, costs = built(union, WORK / "union")
    if costs:
        note(costs, f"{len(union)} names, one thread, checksums counted, other work on the machine")
    note(query_times(large, data), f"{len(union)} names, 32 candidates for a surface form of dev, files in the cache")
    rivals = sorted(likely_rivals(large, data, rivals_per_form) | set(rows))
    what = (
        f"WikiDiverse dev, text only, {len(union)} names, {len(rivals)} of them embedded: the dataset's, and up to "
        f"{2 * rivals_per_form} likely rivals of a surface form; the others could only take places"
    )
    recall, size = measured(with_embeddings(large, union, rivals, cache), data, cache)
    note({"pool_recall_union": recall, "pool_size_union": size}, what)
    without, _ = measured(large, data, cache)
    note({"pool_recall_union_without_entity_embeddings": without}, f"WikiDiverse dev, {len(union)} names")


def new_titles(titles: Path, names: Sequence[str]) -> list[str]:
    """Titles whose normal form is no entity's of the corpus."""
    known = {normal_form(name) for name in names}
    return [title for title in pq.read_table(titles)["name"].to_pylist() if normal_form(title) not in known]


def built(names: Sequence[str], directory: Path) -> tuple[EvidenceIndex, dict[str, object]]:
    """The index of names alone, and what it cost if it was built now."""
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
    evidence: EvidenceIndex, names: Sequence[str], rows: Sequence[int], cache: EmbeddingCache
) -> EvidenceIndex:
    """An index that also finds some of its names by embedding."""
    vectors = cache.encode([names[row] for row in rows])
    directory = WORK / f"texts_{len(names)}"
    return replace(evidence, texts=DenseIndex.build(directory, vectors, np.array(rows, np.uint32), len(names)))


def measured(evidence: EvidenceIndex, data: Path, cache: EmbeddingCache) -> tuple[float, float]:
    """Share of dev's mentions whose entity is in the pool, and the pool's mean size."""
    ids = pq.read_table(data / "entities.parquet")["entity_id"].to_pylist()
    row_of = {entity_id: row for row, entity_id in enumerate(ids)}
    train = pq.read_table(data / "train.parquet").to_pylist()
    dev = pq.read_table(data / "dev.parquet").to_pylist()
    forms = FormStatistics(
        [row["mention"] for row in train],
        [row_of[row["entity_id"]] for row in train],
        [row["mention_id"] for row in train],
        cache.encode([row["mention"] for row in train]),
    )
    mentions = [Mention(row["mention_id"], row["text"], row["mention"]) for row in dev]
    of_forms, of_texts = (cache.encode([row[column] for row in dev]) for column in ("mention", "text"))
    pools = CandidatePool(evidence, forms).pool(mentions, of_forms, of_texts)
    is_found = [
        row_of[mention["entity_id"]] in {candidate.row for candidate in pool.candidates}
        for mention, pool in zip(dev, pools, strict=True)
    ]
    return round(float(np.mean(is_found)), 4), round(float(np.mean([len(pool.candidates) for pool in pools])), 1)


def query_times(evidence: EvidenceIndex, data: Path) -> dict[str, object]:
    """Milliseconds for the candidates of a surface form by dictionary and words, by the clock and of the processor."""
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
    """Entities that forms of dev find by their words."""
    found: Iterable[tuple[int, float]] = (
        hit
        for form in forms_of_dev(data)
        for hits in (evidence.lexical.similar(form, limit), evidence.lexical.beginning_alike(form, limit))
        for hit in hits
    )
    return {row for row, _ in found}


def forms_of_dev(data: Path) -> list[str]:
    """Normal forms of dev's surface forms, each once."""
    return list(dict.fromkeys(map(normal_form, pq.read_table(data / "dev.parquet")["mention"].to_pylist())))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

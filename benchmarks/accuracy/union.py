"""The score among the names of all of Wikipedia: WikiDiverse's entities and millions of titles in one knowledge base.

    python -m benchmarks.accuracy union DATA TITLES [--num-dev 300] [--risk 0.03]

Half an hour on two cores, most of which builds the knowledge base in `build/union`. Of the titles only likely rivals of
dev's surface forms are embedded, as in `benchmarks.candidates`. The weights are those of the package, and the entities
of the corpus are the only right answers. Figures go to `benchmarks/results/score.json`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import tyro

from benchmarks.accuracy.score import judged
from benchmarks.candidates.pool import EmbeddingCache, likely_rivals, with_embeddings
from benchmarks.corpora import (
    MENTION_ENCODER,
    buckets_of,
    build_knowledge_base,
    in_order,
    read_rows,
    retriever,
    union_with,
    wikidiverse,
)
from benchmarks.record import ResultFile
from gemel_engine.config.components import ScoreSettings
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.linker import Linker
from gemel_engine.pipeline.entity_vectors import EntityEncoders
from gemel_engine.retrieval.encoder import MentionEncoder

WORK = Path("build/union")
RIVALS_PER_FORM = 128


def main(
    data: tyro.conf.Positional[Path], titles: tyro.conf.Positional[Path], *, num_dev: int = 300, risk: float = 0.03
) -> None:
    """Language model and evidence among all titles of Wikipedia.

    Args:
        data: Directory of WikiDiverse.
        titles: Names, in a column `name`.
        num_dev: Size of a fixed sample of dev.
        risk: Risk at which evidence decides alone.
    """
    linker = opened(data, titles)
    rows = in_order(read_rows(data / "dev.parquet", num_dev))
    found = judged(linker, ScoreWeights.open(), rows, buckets_of(rows, data), risk)
    num_names = linker.generator.artifacts.knowledge_base.num_entities
    what = f"WikiDiverse dev, text only, {len(rows)} mentions, {num_names} names, SmolLM2-135M in float32"
    values = {name.replace("wikidiverse.", "union.").replace("confidence.", "union."): found[name] for name in found}
    ResultFile("score", {"DATA": data, "TITLES": titles}).note(values, f"{what}, the weights of the package")


def opened(data: Path, titles: Path) -> Linker:
    """Return a linker over the union of the corpus' entities and titles, by the language model alone."""
    directory = WORK / "knowledge_base"
    config = wikidiverse(data)
    if not directory.is_dir():
        WORK.mkdir(parents=True, exist_ok=True)
        pq.write_table(union_with(data, titles), WORK / "entities.parquet")
        build_knowledge_base(WORK / "entities.parquet", directory, config.language_model.name, EntityEncoders())
    linker = Linker(replace(config, knowledge_base=str(directory), score=ScoreSettings(kind="language_model")))
    artifacts = linker.generator.artifacts
    evidence, names = artifacts.evidence, artifacts.knowledge_base.table()["name"].to_pylist()
    assert evidence is not None
    of_corpus = set(pq.read_table(data / "entities.parquet")["name"].to_pylist())
    embedded = likely_rivals(evidence, data, RIVALS_PER_FORM) | {n for n, name in enumerate(names) if name in of_corpus}
    cache = EmbeddingCache(MentionEncoder(MENTION_ENCODER), WORK / "embeddings")
    artifacts = replace(artifacts, evidence=with_embeddings(evidence, names, sorted(embedded), cache, WORK / "names"))
    linker.generator.artifacts = artifacts
    linker.retriever = retriever(config.retrieval, artifacts)
    return linker

"""Embeddings of names at Wikipedia's scale: what they cost, and what the compressed index finds of them.

    python -m benchmarks.candidates vectors DATA TITLES [--num-names 500000] [--num-vectors 5900000]

Half an hour on two cores, and 9 GB on the disk. The first part embeds real names, indexes them as a large knowledge
base does, and asks for the surface forms of dev; what all of TITLES would take is computed from that. The second
indexes as many vectors as TITLES has names: embeddings of the first part, each several times with noise that is as long
as the distance between a name and its nearest neighbour, which is easier to search than real names are. The truth is an
exact search of the same vectors. Embeddings of names are kept in `build/evidence`. Figures go to
`benchmarks/results/evidence.json`.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import tyro
from faiss.contrib.exhaustive_search import knn_ground_truth
from numpy.typing import NDArray

from benchmarks.candidates.pool import forms_of_dev
from benchmarks.corpora import MENTION_ENCODER, SEED
from benchmarks.record import ResultFile, mean
from gemel_engine.evidence.arrays import chunks
from gemel_engine.evidence.dense import DenseIndex, DenseSettings
from gemel_engine.retrieval.encoder import MentionEncoder

WORK = Path("build/evidence/vectors")
CHUNK = 1 << 16
LIMIT = 32  # neighbours that are asked for
NUM_TRUE = 10  # nearest neighbours that should be among them
NUM_QUERIES = 500

FloatArray = NDArray[np.float32]


def main(
    data: tyro.conf.Positional[Path],
    titles: tyro.conf.Positional[Path],
    *,
    num_names: int = 500_000,
    num_vectors: int = 5_900_000,
) -> None:
    """Embeddings of names: cost, and recall of the compressed index.

    Args:
        data: Directory of the corpus.
        titles: Names, in a column `name`.
        num_names: Number of names that are embedded.
        num_vectors: Number of vectors of the synthetic index.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    results = ResultFile("evidence", {"DATA": data, "TITLES": titles})
    encoder = MentionEncoder(MENTION_ENCODER)
    random = np.random.default_rng(SEED)
    all_titles = pq.read_table(titles)["name"]
    chosen = np.sort(random.choice(len(all_titles), num_names, replace=False))
    path = WORK / f"names_{num_names}.npy"
    if not path.exists():
        started = time.perf_counter()
        np.save(path, encoder.encode(all_titles.take(chosen).to_pylist()))
        rate = num_names / (time.perf_counter() - started)
        value = {"names_per_s": round(rate), "hours_of_all": round(len(all_titles) / rate / 3600, 1)}
        results.note({"dense.embedding": value}, f"{num_names} random titles in float32, of {len(all_titles)}")
    names: FloatArray = np.load(path, mmap_mode="r")
    forms = forms_of_dev(data)
    queries = encoder.encode([forms[row] for row in random.choice(len(forms), NUM_QUERIES, replace=False)])
    what = f"{NUM_QUERIES} surface forms of WikiDiverse dev, {LIMIT} asked for, settings of the package"
    results.note({"dense.names": measured(names, queries)}, f"{num_names} random titles; {what}")

    try:
        large = synthetic(names, num_vectors, random)
        places = np.sort(random.choice(num_vectors, NUM_QUERIES, replace=False))
        near = with_noise(large[places], typical_distance(names), random)
        results.note(
            {"dense.synthetic": measured(large, near)},
            f"{num_vectors} vectors: embeddings of {num_names} titles with noise; {NUM_QUERIES} of them, again with "
            f"noise, as queries, {LIMIT} asked for, settings of the package",
        )
    finally:
        (WORK / "synthetic.bin").unlink(missing_ok=True)


def synthetic(names: FloatArray, num_vectors: int, random: np.random.Generator) -> FloatArray:
    """Return many vectors (M, E), mapped from a file: given ones in turn, with noise."""
    shape = (num_vectors, names.shape[1])
    vectors: FloatArray = np.memmap(WORK / "synthetic.bin", np.float32, "w+", shape=shape)
    length = typical_distance(names)
    for part in chunks(num_vectors, CHUNK):
        vectors[part] = with_noise(names[np.arange(part.start, part.stop) % len(names)], length, random)
    return vectors


def with_noise(vectors: FloatArray, length: float, random: np.random.Generator) -> FloatArray:
    """Return vectors (N, E) of length one, moved by a random one of the given length."""
    noise = random.standard_normal(vectors.shape, np.float32)
    moved = vectors + length * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    result: FloatArray = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    return result


def typical_distance(names: FloatArray) -> float:
    """Return the median distance of some names to the nearest other one."""
    some = np.random.default_rng(SEED).choice(len(names), min(200, len(names)), replace=False)
    cosines, _ = faiss.knn(
        np.ascontiguousarray(names[some]), np.ascontiguousarray(names), 2, metric=faiss.METRIC_INNER_PRODUCT
    )
    return float(np.median(np.sqrt(np.maximum(0, 2 - 2 * cosines[:, 1]))))


def measured(vectors: FloatArray, queries: FloatArray) -> dict[str, float]:
    """Return size, seconds to build, milliseconds of a query and recall of an index as the package makes it."""
    directory = WORK / "index"
    shutil.rmtree(directory, ignore_errors=True)
    started = time.perf_counter()
    # Compressed however few the vectors are.
    index = DenseIndex.build(
        directory, vectors, np.arange(len(vectors), dtype=np.uint32), len(vectors), DenseSettings(exact_up_to=0)
    )
    seconds = time.perf_counter() - started
    found, clock = [], []
    for query in queries:
        begun = time.perf_counter()
        found.append({row for row, _ in index.nearest(query[None], LIMIT)[0]})
        clock.append(1000 * (time.perf_counter() - begun))
    parts = (np.ascontiguousarray(vectors[part]) for part in chunks(len(vectors), CHUNK))
    _, nearest = knn_ground_truth(queries, parts, NUM_TRUE, faiss.METRIC_INNER_PRODUCT, ngpu=0)  # type: ignore[no-untyped-call]
    truth = list(zip(nearest.tolist(), found, strict=True))
    return {
        "build_seconds": round(seconds, 1),
        "bytes_per_vector": round(sum(path.stat().st_size for path in directory.iterdir()) / len(vectors), 1),
        "query_ms_median": round(float(np.median(clock)), 2),
        "query_ms_p99": round(float(np.percentile(clock, 99)), 2),
        "recall_of_nearest": mean([rows[0] in near for rows, near in truth], 3),
        f"recall_of_nearest_{NUM_TRUE}": mean([len(near & set(rows)) / NUM_TRUE for rows, near in truth], 3),
    }

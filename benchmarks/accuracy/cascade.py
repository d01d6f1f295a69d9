"""What the cascade saves, in which evidence decides alone, beside the score of all mentions and the model alone.

    python -m benchmarks.accuracy cascade DATA [--num-mentions 150] [--zipf] [--risk 0.03]

Some twenty minutes on two cores. The mentions are a sample of dev or, with `--zipf`, drawn so that a few surface forms
are very common, as in a corpus of news; each of the three begins with an empty prefix cache. The weights are those of
the package. Figures go to `benchmarks/results/score.json`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from benchmarks.accuracy.ranking import computed_tokens, with_weights
from benchmarks.corpora import Row, in_order, mentions_of, read_rows, wikidiverse, zipf_rows
from benchmarks.record import ResultFile, mean
from gemel_engine.config.components import ScoreSettings
from gemel_engine.evidence.weights import ScoreWeights
from gemel_engine.linker import Linker


def main(data: tyro.conf.Positional[Path], *, num_mentions: int = 150, zipf: bool = False, risk: float = 0.03) -> None:
    """Language model and evidence: what the cascade saves.

    Args:
        data: Directory of WikiDiverse.
        num_mentions: Number of mentions.
        zipf: Whether a few surface forms are very common among them.
        risk: Risk at which evidence decides alone.
    """
    dev = data / "dev.parquet"
    rows = in_order(zipf_rows(read_rows(dev), num_mentions) if zipf else read_rows(dev, num_mentions))
    linker = Linker(replace(wikidiverse(data), score=ScoreSettings(kind="language_model")))
    kind = "surface forms drawn with probability 1/rank" if zipf else "a sample of dev"
    what = f"WikiDiverse, text only, {len(rows)} mentions, {kind}, 7,642 names, SmolLM2-135M in float32, risk {risk}"
    found = compared(linker, rows, risk)
    prefix = "zipf." if zipf else ""
    ResultFile("score", {"DATA": data}).note({f"{prefix}{name}": value for name, value in found.items()}, what)


def compared(linker: Linker, rows: Sequence[Row], risk: float) -> dict[str, object]:
    """Return what the score costs with the cascade and without it, and the language model alone.

    Each begins with an empty prefix cache; seconds have no retrieval in them.
    """
    weights = ScoreWeights.open()
    engine: Any = linker.generator.engine
    mentions, features = mentions_of(rows), [None] * len(rows)
    _, retrieved = linker.prepare(mentions, features)
    generators = {
        "cascade": with_weights(linker, weights, risk),
        "without_cascade": with_weights(linker, weights),
        "model_alone": with_weights(linker, None),
    }
    found: dict[str, Any] = {"compared.mentions": len(rows)}
    for name, generator in generators.items():
        engine.llm_engine.reset_prefix_cache()
        before, started = computed_tokens(engine), time.perf_counter()
        predictions = generator.generate(mentions, features, retrieved)
        found[f"compared.{name}.seconds"] = round(time.perf_counter() - started, 1)
        found[f"compared.{name}.computed_prompt_tokens"] = computed_tokens(engine) - before
        right = [found.entity_id == row["entity_id"] for found, row in zip(predictions, rows, strict=True)]
        found[f"compared.{name}.accuracy"] = mean(right)
        found[f"compared.{name}.certified_of_asked"] = mean(
            [bool(prediction.certified) for prediction in predictions if prediction.decided_by != "evidence"]
        )
    for ratio, quantity in (("tokens_ratio", "computed_prompt_tokens"), ("time_ratio", "seconds")):
        without = found[f"compared.without_cascade.{quantity}"]
        found[f"cascade.{ratio}"] = round(found[f"compared.cascade.{quantity}"] / without, 3)
    return found

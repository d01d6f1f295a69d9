"""Accuracy on WikiDiverse and on the emoji corpus, by evidence, by the language model, and by both.

python -m benchmarks.accuracy alone DATA [--num-train 3000]
python -m benchmarks.accuracy score DATA [--num-dev N] [--risk 0.03] [--shipped-weights]
python -m benchmarks.accuracy union DATA TITLES [--num-dev 300]
python -m benchmarks.accuracy cards DATA [--num-mentions 400] [--settings ...]
python -m benchmarks.accuracy emoji SPLIT [--num-mentions 100] [--name emoji.test] [--combined] [--settings ...]
python -m benchmarks.accuracy calibration DATA
python -m benchmarks.accuracy models DATA MODEL... [--num-mentions 200] [--num-emoji 100]
python -m benchmarks.accuracy finding DATA [--link LINK.toml]

DATA is a directory of WikiDiverse (see `benchmarks/corpora.py`). Needs the models and indexes of `make demo`. The
module of each command says what it measures.
"""

from __future__ import annotations

from benchmarks.accuracy import alone, calibration, cards, finding, models, score, union
from benchmarks.record import run

if __name__ == "__main__":
    run(
        {
            "alone": alone.main,
            "score": score.main,
            "union": union.main,
            "cards": cards.main,
            "emoji": cards.emoji_main,
            "calibration": calibration.main,
            "models": models.main,
            "finding": finding.main,
        }
    )

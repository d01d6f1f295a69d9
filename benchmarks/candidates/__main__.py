"""What proposes candidates: recall and speed of the evidence index, and speed of the mention encoder.

python -m benchmarks.candidates pool DATA TITLES
python -m benchmarks.candidates vectors DATA TITLES
python -m benchmarks.candidates encoder DATA

DATA is a directory of WikiDiverse (see `benchmarks/corpora.py`), TITLES a Parquet file of names, in a column `name`.
Needs the models of `make demo`. The module of each command says what it measures.
"""

from __future__ import annotations

from benchmarks.candidates import encoder, pool, vectors
from benchmarks.record import run

if __name__ == "__main__":
    run({"pool": pool.main, "vectors": vectors.main, "encoder": encoder.main})

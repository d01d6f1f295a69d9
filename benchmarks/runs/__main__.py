"""What a run costs beside its models: from the shell to the first row, and for output that is written exactly once.

python -m benchmarks.runs startup DATA --before WORKTREE [--num-runs 3]
python -m benchmarks.runs steady DATA [--num-mentions 150]
python -m benchmarks.runs overhead [--num-mentions 192]

DATA is a directory of WikiDiverse (see `benchmarks/corpora.py`). Needs the models and indexes of `make demo`. The
module of each command says what it measures.
"""

from __future__ import annotations

from benchmarks.record import run
from benchmarks.runs import overhead, startup, steady

if __name__ == "__main__":
    run({"startup": startup.main, "steady": steady.main, "overhead": overhead.main})

"""Predict time, memory and cost of a linking run by linking a sample of its corpus: `gemel plan`.

python jobs/plan.py CONFIG.toml [--sample-rows 1000] [--actors 8 64] [--price-per-actor-hour 2.5] [--write-to plan.json]
    [--language-model.max-num-seqs 128 ...]
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("plan")

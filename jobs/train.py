"""Train the feature mapper: `gemel train`.

python jobs/train.py CONFIG.toml [--optimisation.epochs 3 ...]
ray job submit --working-dir . -- python jobs/train.py CONFIG.toml

A rerun goes on from the last checkpoint. Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, 5 too many
mentions unusable, nothing was trained; 1 anything else.
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("train")

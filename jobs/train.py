"""Train the feature mapper.

python jobs/train.py CONFIG.toml [--optimisation.epochs 3 ...]
ray job submit --working-dir . -- python jobs/train.py CONFIG.toml

A rerun goes on from the last checkpoint. Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, 5 too many
mentions unusable, nothing was trained; 1 anything else.
"""

from gemel_engine.command_line import run_configured
from gemel_engine.config import TrainConfig
from gemel_engine.training import train_mapper

if __name__ == "__main__":
    run_configured(TrainConfig, train_mapper)

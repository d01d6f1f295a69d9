"""Train the feature mapper.

python jobs/train.py CONFIG.toml [--optimisation.epochs 3 ...]
ray job submit --working-dir . -- python jobs/train.py CONFIG.toml

A rerun goes on from the last checkpoint. Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, 5 too many
mentions unusable, nothing was trained; 1 anything else.
"""

import logging
import sys
from pathlib import Path

from gemel_engine.config import TrainConfig, load_config
from gemel_engine.errors import ConfigurationError, GemelError
from gemel_engine.training import train_mapper


def main(arguments: list[str]) -> int:
    """Run the job; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise ConfigurationError("name a configuration: train.py CONFIG.toml [--key value ...]")
        train_mapper(load_config(TrainConfig, Path(arguments[0]), arguments[1:]))
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

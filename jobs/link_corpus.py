"""Link a corpus.

python jobs/link_corpus.py CONFIG.toml [--search.objective mean ...]
ray job submit --working-dir . -- python jobs/link_corpus.py CONFIG.toml

Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, nothing was started; 5 done, but more rows failed
than `max_failed_fraction` allows; 1 anything else.
"""

import logging
import sys
from pathlib import Path

from gemel_engine.config import LinkConfig, load_config
from gemel_engine.errors import ConfigurationError, GemelError
from gemel_engine.linking import link_corpus


def main(arguments: list[str]) -> int:
    """Run the job; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise ConfigurationError("name a configuration: link_corpus.py CONFIG.toml [--key value ...]")
        link_corpus(load_config(LinkConfig, Path(arguments[0]), arguments[1:]))
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Link a corpus.

python jobs/link_corpus.py CONFIG.toml [--search.objective mean ...]
ray job submit --working-dir . -- python jobs/link_corpus.py CONFIG.toml

Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, nothing was started; 5 done, but more rows failed
than `max_failed_fraction` allows; 1 anything else.
"""

import logging

from gemel_engine.command_line import run_configured
from gemel_engine.config import LinkConfig
from gemel_engine.linking import describe_run, link_corpus

logger = logging.getLogger("link_corpus")


def main(config: LinkConfig) -> None:
    """Link a corpus, or say what would be done."""
    if config.dry_run:
        logger.info("%s", describe_run(config))
    else:
        link_corpus(config)


if __name__ == "__main__":
    run_configured(LinkConfig, main)

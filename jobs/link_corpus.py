"""Link a corpus: `gemel link`.

python jobs/link_corpus.py CONFIG.toml [--search.objective mean ...]
ray job submit --working-dir . -- python jobs/link_corpus.py CONFIG.toml

Exit codes: 0 done; 2 configuration, 3 input, 4 artifact unusable, nothing was started; 5 done, but more rows failed
than `max_failed_fraction` allows; 1 anything else.
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("link")

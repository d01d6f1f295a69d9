"""Link one mention and show why, with what its picture changes: `gemel explain`.

python jobs/explain.py CONFIG.toml --text "A bear plays the drums." --mention bear [--picture bear.png]
    [--candidates Q1 Q2 ...] [--language-model.engine transformers ...]
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("explain")

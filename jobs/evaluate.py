"""Judge a finished linking run by gold labels: `gemel evaluate`.

python jobs/evaluate.py linked/ --train train.parquet
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("evaluate")

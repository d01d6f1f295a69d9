"""Build a demonstration index from a training split: `gemel build-demonstrations`.

python jobs/build_demonstration_index.py train.parquet entities.parquet demonstrations/ --mention-encoder models/encoder
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("build-demonstrations")

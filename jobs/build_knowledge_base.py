"""Build a knowledge base from a table of entities: `gemel build-kb`.

python jobs/build_knowledge_base.py entities.parquet knowledge_base/ --tokenizer models/language_model
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("build-kb")

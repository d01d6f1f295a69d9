"""Add, rename and retire entities of a knowledge base: `gemel update-kb`.

python jobs/update_knowledge_base.py knowledge_base/ changes.parquet updated/ --tokenizer models/language_model
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("update-kb")

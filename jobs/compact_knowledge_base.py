"""Merge an update of a knowledge base with its base: `gemel compact-kb`.

python jobs/compact_knowledge_base.py updated/ knowledge_base_2/
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("compact-kb")

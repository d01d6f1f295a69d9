"""Bring files released by GEMEL's authors into this project's formats: `gemel import-gemel`.

python jobs/import_gemel.py mapper opt-6.7b_wikidiverse.pkl mapper/ --language-model facebook/opt-6.7b
python jobs/import_gemel.py mentions data/wikidiverse wikidiverse/ --features data/wikidiverse/clip.hdf5
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("import-gemel")

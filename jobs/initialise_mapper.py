"""Make an untrained feature mapper, with which linking can be tried out: `gemel init-mapper`.

python jobs/initialise_mapper.py mapper/ --language-model models/lm --image-encoder models/encoder
"""

from gemel_engine.cli.main import main

if __name__ == "__main__":
    main("init-mapper")

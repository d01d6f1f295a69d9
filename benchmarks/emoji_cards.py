"""Accuracy of the language model with entity cards on the emoji corpus, by settings of retrieval.

python benchmarks/emoji_cards.py SPLIT [--num-mentions 100] [--name emoji.test] [--combined] [--settings ...]

Needs the models and indexes of `make demo`. Ranks all names by the language model alone, with the pictures and the
demo's feature mapper, which was trained without cards; with `--combined` by the score, all of whose weights are those
of the package. Results go to `benchmarks/results/cards.json`, see `cards.py`, or `score.json`.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import tyro
from cards import RESULTS, SEED, measured
from record import record

from gemel_engine.config.components import ScoreSettings
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.linker import Linker

CONFIG = Path("examples/emoji/link.toml")
SCORE = RESULTS.with_name("score.json")
CARDS = "num_cards=3 num_own_cards=1"

logger = logging.getLogger("emoji_cards")


def main(
    split: tyro.conf.Positional[Literal["dev", "sample", "test", "test_unseen"]],
    *,
    num_mentions: int = 100,
    name: str | None = None,
    combined: bool = False,
    settings: tuple[str, ...] = (CARDS,),
) -> None:
    """Link a fixed sample of a split with each of the settings.

    Args:
        split: Table of the example; `sample` is the demo's, of test.
        num_mentions: Size of the sample.
        name: Name of the figure of the last settings among the results; None: none.
        combined: Whether the score ranks.
        settings: Settings of retrieval, each as `name=value` pairs with spaces; see `cards.py`.
    """
    rows = pq.read_table(CONFIG.parent / f"{split}.parquet").to_pylist()
    rows = random.Random(SEED).sample(rows, min(num_mentions, len(rows)))
    rows.sort(key=lambda row: (row["mention"], row["mention_id"]))
    score = ScoreSettings(kind="combined" if combined else "language_model")
    linker = Linker(replace(load_config(LinkConfig, CONFIG), score=score))
    file = SCORE if combined else RESULTS
    for text in settings:
        command = f"python benchmarks/emoji_cards.py {split} --num-mentions {num_mentions}"
        command += f'{" --combined" if combined else ""} --settings "{text}"'
        for values in measured(linker, rows, [split] * len(rows), text, with_pictures=True):
            what = f"{values['mentions']} mentions of {split}, all names, SmolLM2-135M in float32, the demo's mapper"
            note = partial(record, command=command, what=what)
            results: dict[str, Any] = json.loads(file.read_text())
            results[f"emoji {split}: {text} ({len(rows)})"] = note(values)
            if name is not None and text == settings[-1]:
                results[name] = note(values["all"])
            file.write_text(json.dumps(results, indent=2) + "\n")
            logger.info("%s %s", text, {key: value for key, value in values.items() if key != "right"})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    tyro.cli(main)

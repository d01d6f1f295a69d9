"""Link the fixed sample of the emoji corpus and say how well it went; `make demo` prepares what it needs.

Run from the root of the repository. Arguments are overrides of `examples/emoji/link.toml`.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq

from gemel_engine.config import LinkConfig, load_config
from gemel_engine.errors import GemelError
from gemel_engine.linking import link_corpus


def main() -> None:
    """Run the demo; the last line of the output is its summary."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = load_config(LinkConfig, Path("examples/emoji/link.toml"), sys.argv[1:])
    shutil.rmtree(config.output, ignore_errors=True)
    report = link_corpus(config)
    predicted = pq.read_table(f"{config.output}/data", columns=["mention_id", "entity_id"]).to_pylist()
    entity_of = {row["mention_id"]: row["entity_id"] for row in predicted}
    gold = pq.read_table(config.input, columns=["mention_id", "entity_id"]).to_pylist()
    num_right = sum(entity_of[row["mention_id"]] == row["entity_id"] for row in gold)
    print(
        f"demo: feature mapper {report.feature_mapper}; {100 * (report.certified_share or 0):.0f}% of the answers are "
        f"proved to be the best of all names, with {report.rollouts_per_mention or 0:.1f} rollouts a mention"
    )
    print(
        f"demo: rows={report.rows} errors={sum(report.errors.values())} accuracy={num_right / len(gold):.3f} "
        f"mentions_per_s={report.mentions_per_second:.2f} output={config.output}"
    )


if __name__ == "__main__":
    try:
        main()
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

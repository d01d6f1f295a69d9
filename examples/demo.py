"""Link the fixed sample of the emoji corpus and say how well it went; `make demo` prepares what it needs.

Run from the root of the repository. Arguments are overrides of `examples/emoji/link.toml`.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.errors import GemelError
from gemel_engine.evaluation.run import LinkedRun, judge_run
from gemel_engine.linking.job import link_corpus
from gemel_engine.report.page import report_of

WITH, WITHOUT, SHUFFLED = "with", "without", "shuffled"


def main() -> None:
    """Run the demo; the last line of the output is its summary."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    config = load_config(LinkConfig, Path("examples/emoji/link.toml"), sys.argv[1:])
    mentions = three_times(pq.read_table(config.input))
    shutil.rmtree(config.output, ignore_errors=True)
    Path(config.output).mkdir(parents=True)
    pq.write_table(mentions, f"{config.output}/mentions.parquet")
    config = replace(config, input=f"{config.output}/mentions.parquet", output=f"{config.output}/linked")
    report = link_corpus(config)
    linked = pq.read_table(f"{config.output}/data", columns=["mention_id", "entity_id"]).to_pylist()
    entity_of = {row["mention_id"]: row["entity_id"] for row in linked}
    right: dict[str, list[bool]] = {WITH: [], WITHOUT: [], SHUFFLED: []}
    for row in mentions.select(["mention_id", "entity_id"]).to_pylist():
        right[row["mention_id"].partition("/")[0]].append(entity_of[row["mention_id"]] == row["entity_id"])
    accuracy = {kind: sum(found) / len(found) for kind, found in right.items()}
    linked_run = LinkedRun.open(config.output)
    page = report_of(linked_run, judge_run(linked_run), training="examples/emoji/train.parquet", gallery_size=60)
    Path(config.output, "report.html").write_text(page, "utf-8")
    print(
        f"demo: feature mapper {report.feature_mapper}; {100 * (report.certified_share or 0):.0f}% of the answers are "
        f"proved to be the best of all names, with {report.rollouts_per_mention or 0:.1f} rollouts a mention"
    )
    print(
        f"demo: accuracy with the pictures {accuracy[WITH]:.3f}, without {accuracy[WITHOUT]:.3f}, with the pictures "
        f"shuffled among the mentions {accuracy[SHUFFLED]:.3f}"
    )
    print(f"demo: what was linked, to look at: {config.output}/report.html")
    print(
        f"demo: rows={report.rows} errors={sum(report.errors.values())} accuracy={accuracy[WITH]:.3f} "
        f"mentions_per_s={report.mentions_per_second:.2f} output={config.output}"
    )


def three_times(mentions: pa.Table) -> pa.Table:
    """Every mention with its picture, without one, and with another mention's; those of a surface form together."""
    pictures = mentions["image_bytes"].combine_chunks()
    order = list(range(len(mentions)))
    random.Random(0).shuffle(order)
    taken_from = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: every picture moves
    variants = {
        WITH: pictures,
        WITHOUT: pa.nulls(len(mentions), pictures.type),
        SHUFFLED: pictures.take(pa.array([taken_from[row] for row in range(len(mentions))])),
    }
    names = mentions.column_names
    tables = [
        mentions.set_column(
            names.index("mention_id"), "mention_id", pc.binary_join_element_wise(kind, mentions["mention_id"], "/")
        ).set_column(names.index("image_bytes"), "image_bytes", column)
        for kind, column in variants.items()
    ]
    return pa.concat_tables(tables).sort_by("mention")


if __name__ == "__main__":
    try:
        main()
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

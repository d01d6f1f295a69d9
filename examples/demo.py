"""Link the fixed sample of the emoji corpus and say how well it went; `make demo` prepares what it needs.

Run from the root of the repository. Arguments are overrides of `examples/emoji/link.toml`.
"""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gemel_engine.cli import options
from gemel_engine.config.loading import load_config
from gemel_engine.config.settings import LinkConfig
from gemel_engine.evaluation.run import JudgedRun, LinkedRun, judge_run
from gemel_engine.linking.job import link_corpus
from gemel_engine.report.page import report_of

TRAIN = "examples/emoji/train.parquet"
UNSEEN_MENTIONS = "examples/emoji/test_unseen.parquet"
NUM_UNSEEN = 60
WITH, WITHOUT, SHUFFLED, UNSEEN = "with", "without", "shuffled", "unseen"


def main() -> None:
    """Run the demo: one linking run over four kinds of mentions, and a report on the first kind."""
    config = load_config(LinkConfig, Path("examples/emoji/link.toml"), sys.argv[1:])
    directory = Path(config.output)
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "mentions").mkdir(parents=True)
    kinds = kinds_of(pq.read_table(config.input), pq.read_table(UNSEEN_MENTIONS))
    for kind, mentions in kinds.items():
        pq.write_table(mentions, directory / f"mentions/{kind}.parquet")
    kept = [with_kind(table, kind) for kind, table in kinds.items()]
    mentions = pa.concat_tables(kept, promote_options="permissive")  # one kind has no pictures
    pq.write_table(mentions.sort_by("mention"), directory / "all.parquet")
    linked_at = f"{directory}/linked"
    report = link_corpus(replace(config, input=f"{directory}/all.parquet", output=linked_at))
    linked = LinkedRun.open(linked_at)
    runs = {kind: of_kind(linked, kind, f"{directory}/mentions/{kind}.parquet") for kind in kinds}
    judged = {kind: judge_run(run, train=TRAIN) for kind, run in runs.items()}
    others = {"Beside the same without pictures": WITHOUT, "Beside the same with shuffled pictures": SHUFFLED}
    comparisons = {heading: judge_run(runs[WITH], against=runs[other]).comparison for heading, other in others.items()}
    page = report_of(
        replace(runs[WITH], output="Emoji: 100 mentions with their pictures"),
        judged[WITH],
        training=TRAIN,
        gallery_size=60,
        comparisons={heading: found for heading, found in comparisons.items() if found is not None},
    )
    (directory / "report.html").write_text(page, "utf-8")
    accuracy = {kind: found.evaluation.accuracy.value for kind, found in judged.items()}
    certified = 100 * judged[WITH].evaluation.certified_share.value
    print(f"demo: {100 * accuracy[WITH]:.0f} of 100 mentions of emoji are linked right, by picture and text")
    print(f"demo: look at them in a browser: {directory}/report.html")
    print(
        f"demo: accuracy with the pictures {accuracy[WITH]:.3f}, without {accuracy[WITHOUT]:.3f}, with the pictures "
        f"shuffled among the mentions {accuracy[SHUFFLED]:.3f}"
    )
    print(
        f"demo: accuracy on {NUM_UNSEEN} mentions of entities that no training mention has, by aliases and pictures of "
        f"the knowledge base: {accuracy[UNSEEN]:.3f}; without a model {baseline(judged[UNSEEN])}"
    )
    print(
        f"demo: for {certified:.0f}% of the answers the search was complete: no other entity scores higher, right or "
        f"wrong; {report.rollouts_per_mention or 0:.1f} questions to the language model for each mention"
    )
    print(
        f"demo: rows={report.rows} errors={sum(report.errors.values())} accuracy={accuracy[WITH]:.3f} "
        f"mentions_per_s={report.mentions_per_second:.2f} feature_mapper={report.feature_mapper} output={linked_at}"
    )


def kinds_of(mentions: pa.Table, unseen: pa.Table) -> dict[str, pa.Table]:
    """Every mention with its picture, without one, and with another mention's; and some of unseen entities."""
    place, pictures = mentions.column_names.index("image_bytes"), mentions["image_bytes"].combine_chunks()
    order = list(range(len(mentions)))
    random.Random(0).shuffle(order)
    taken_from = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: every picture moves
    shuffled = pictures.take(pa.array([taken_from[row] for row in range(len(mentions))]))
    rows = sorted(random.Random(0).sample(range(len(unseen)), NUM_UNSEEN))
    return {
        WITH: mentions,
        WITHOUT: mentions.set_column(place, "image_bytes", pa.nulls(len(mentions), pictures.type)),
        SHUFFLED: mentions.set_column(place, "image_bytes", shuffled),
        UNSEEN: unseen.take(rows).cast(mentions.schema),
    }


def with_kind(mentions: pa.Table, kind: str) -> pa.Table:
    """The mentions with their kind before their ids."""
    ids = pc.binary_join_element_wise(kind, mentions["mention_id"], "/")
    return mentions.set_column(mentions.column_names.index("mention_id"), "mention_id", ids)


def of_kind(linked: LinkedRun, kind: str, mentions: str) -> LinkedRun:
    """The part of a run that links one kind of mentions, as if it had been a run over their table."""
    predictions = linked.predictions.filter(pc.starts_with(linked.predictions["mention_id"], f"{kind}/"))
    ids = pc.utf8_slice_codeunits(predictions["mention_id"], len(kind) + 1)
    predictions = predictions.set_column(0, predictions.schema.field(0), ids)
    return replace(linked, predictions=predictions, settings=linked.settings | {"input": mentions})


def baseline(judged: JudgedRun) -> str:
    """Accuracy of a lookup."""
    return "-" if judged.evaluation.baseline is None else f"{judged.evaluation.baseline.value:.3f}"


if __name__ == "__main__":
    options.run(main, "make demo")

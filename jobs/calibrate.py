"""Fit the probabilities that a linking run gives its answers to gold labels.

python jobs/calibrate.py linked_dev/ calibration/ --nil-precision 0.8
"""

from __future__ import annotations

import logging
from pathlib import Path

import tyro

from gemel_engine.calibration import Calibration, scoring_settings
from gemel_engine.command_line import run
from gemel_engine.evaluation import Judge
from gemel_engine.linked_run import LinkedRun, entities_to_judge, read_gold

logger = logging.getLogger("calibrate")


def main(
    output: tyro.conf.Positional[str],
    calibration: tyro.conf.Positional[Path],
    *,
    gold: str | None = None,
    nil_precision: float = 0.8,
) -> None:
    """Fit a calibration to a finished run over mentions with gold labels; linking applies it.

    Args:
        output: The run's output, local or s3://bucket/prefix; of a dev split, not of what is to be judged later.
        calibration: Local directory for it.
        gold: Mentions with `entity_id`; the run's input by default. Those whose entity the knowledge base lacks, or
            that have none, teach what NIL looks like.
        nil_precision: So large a share of the mentions called NIL shall be NIL.
    """
    linked = LinkedRun.open(output)
    labelled = read_gold(gold or linked.settings["input"])
    entities = entities_to_judge(linked.open_knowledge_base(), labelled, [linked.predictions])
    predictions, is_right, is_nil = Judge(labelled, entities=entities).outcomes(linked.predictions)
    fitted = Calibration.fit(
        predictions, is_right, is_nil, nil_precision=nil_precision, scoring=scoring_settings(linked.settings)
    )
    fitted.save(calibration)
    logger.info("%s: %s", calibration, ", ".join(f"{name} {value:.3g}" for name, value in fitted.fitted_on.items()))


if __name__ == "__main__":
    run(main)

"""Commands that read a configuration or the output of a run; registered in `main.py`."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from gemel_engine.cli import options
from gemel_engine.config.bounds import Amount, Count, CountOrZero, EvaluationProtocol, Fraction, NumBytes, Seed
from gemel_engine.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from gemel_engine.evaluation.run import JudgedRun, LinkedRun

Output = Annotated[Positional[str], arg(metavar="OUTPUT")]
OutputDir = Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")]

logger = logging.getLogger(__name__)


def link(arguments: Sequence[str]) -> None:
    """Link a corpus of mentions to the entities of a knowledge base.

    Arguments: CONFIG.toml [--key value ...].
    """
    from gemel_engine.config.settings import LinkConfig
    from gemel_engine.pipeline.corpus import check_columns

    config = options.configure(LinkConfig, "gemel link", arguments)
    if not config.find_mentions:  # else the input has documents
        check_columns(config.input, config.vision.required_columns, config.columns.given())

    from gemel_engine.linking.job import describe_run, link_corpus

    if config.dry_run:
        logger.info("%s", describe_run(config))
    else:
        link_corpus(config)
        output = shlex.quote(config.output)
        logger.info("to look at it, and to judge it by gold labels: gemel evaluate %s", output)
        logger.info("to have it with the columns of the input: gemel export %s linked.csv", output)


def find_mentions(arguments: Sequence[str]) -> None:
    """Find the mentions of a corpus of documents, which `gemel link` then links.

    Arguments: CONFIG.toml [--key value ...].
    """
    from gemel_engine.config.finding import FindConfig

    config = options.configure(FindConfig, "gemel find-mentions", arguments)

    from gemel_engine.finding.job import find_mentions

    find_mentions(config)
    if config.gold is not None:
        from rich.console import Console

        from gemel_engine.cli.tables import spans_table
        from gemel_engine.evaluation.spans import judge_spans, read_found, read_gold_spans

        judged = judge_spans(read_found(config.output), read_gold_spans(config.gold))
        Console().print(spans_table(judged))


def train(arguments: Sequence[str]) -> None:
    """Train the feature mapper, or resume from its last checkpoint.

    Arguments: CONFIG.toml [--key value ...].
    """
    from gemel_engine.config.settings import TrainConfig
    from gemel_engine.pipeline.corpus import check_columns

    config = options.configure(TrainConfig, "gemel train", arguments)
    for corpus in filter(None, (config.train, config.dev)):
        check_columns(corpus, ("entity_id",), config.columns.given())

    from gemel_engine.training.job import train_mapper

    train_mapper(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Predict time, memory and cost of a run by linking a sample of its mentions.

    Any setting of CONFIG.toml can be given as a further option; `gemel link --help-all` lists them.

    Attributes:
        sample_rows: Maximum number of mentions to link. They are drawn as windows of consecutive
            mentions, in the order in which the run links them.
        actors: Numbers of generation actors; one cluster is predicted for each. Default:
            `resources.generation.max_actors`.
        price_per_actor_hour: Price per generation-actor hour, including its helper actors, in any
            currency.
        seed: Seed of the sample.
        write_to: File for the plan as JSON, local or s3://bucket/key.
    """

    sample_rows: Count = 1000
    actors: tuple[Count, ...] = ()
    price_per_actor_hour: Amount | None = None
    seed: Seed = 0
    write_to: str | None = None


def plan(arguments: Sequence[str]) -> None:
    """Predict time, memory and cost of a run by linking a sample.

    Arguments: CONFIG.toml [--actors N ...] [--key value ...].
    """
    from gemel_engine.config.settings import LinkConfig
    from gemel_engine.pipeline.corpus import check_columns

    sampling, config = options.asked(Sampling, LinkConfig, "gemel plan", arguments)
    if not config.find_mentions:  # else the input has documents
        check_columns(config.input, config.vision.required_columns, config.columns.given())

    from rich.console import Console

    from gemel_engine import storage
    from gemel_engine.cli.tables import as_tables
    from gemel_engine.linking.plan import plan_run

    planned = plan_run(
        config,
        sample_rows=sampling.sample_rows,
        actors=sampling.actors,
        price_per_actor_hour=sampling.price_per_actor_hour,
        seed=sampling.seed,
    )
    for table in as_tables(planned):
        Console().print(table)
    if sampling.write_to is not None:
        storage.write_bytes(sampling.write_to, planned.to_json())
        logger.info("%s", sampling.write_to)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Link one mention and show why the answer was chosen.

    Any setting of CONFIG.toml can be given as a further option; `gemel link --help-all` lists them.

    Attributes:
        text: Sentence or caption that contains the mention.
        mention: Surface form of the mention.
        picture: Local image file.
        candidates: Identifiers of the only entities to consider. Default: the whole knowledge base.
    """

    text: str
    mention: str
    picture: Path | None = None
    candidates: tuple[str, ...] | None = None


def explain(arguments: Sequence[str]) -> None:
    """Link one mention and show why the answer was chosen.

    Arguments: CONFIG.toml --text TEXT --mention FORM [--picture FILE] [--key value ...].
    """
    # Only the explanation is written to the standard output.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from gemel_engine.config.settings import LinkConfig

    question, config = options.asked(Question, LinkConfig, "gemel explain", arguments)

    from rich.console import Console

    from gemel_engine import linker as explaining
    from gemel_engine.cli.tables import print_explanation
    from gemel_engine.linker import Linker
    from gemel_engine.types import Mention

    try:
        picture = None if question.picture is None else question.picture.read_bytes()
    except OSError as error:
        raise InputError(f"the picture {question.picture} can't be read: {error}") from error
    mention = Mention("0", question.text, question.mention, candidate_ids=question.candidates)
    print_explanation(explaining.explain(Linker(config), mention, picture), Console())


def evaluate(
    output: Output,
    *,
    gold: str | None = None,
    train: str | None = None,
    against: str | None = None,
    protocol: EvaluationProtocol = "entity",
    found: bool = False,
    write_to: str | None = None,
    entities: str | None = None,
    gallery_size: CountOrZero = 60,
    allowed_image_prefixes: tuple[str, ...] = (),
    max_image_bytes: NumBytes = 20_000_000,
) -> None:
    """Evaluate a finished linking run against gold labels.

    Prints a table and writes `metrics.json` and `report.html`; without gold labels only the report.

    Args:
        output: Output of the run, local or s3://bucket/prefix.
        gold: Table file or directory with the columns `mention_id` and `entity_id`. Default: the
            input of the run, if it has an `entity_id`.
        train: Training split. It adds accuracies by what the training split contains, a baseline
            without a model, and the pictures of demonstrations.
        against: Output of another run over the same mentions to compare with. Without gold labels,
            other answers are only counted.
        protocol: When an answer is correct: `entity`: the same entity identifier; `name`: the same
            entity name (GEMEL's protocol); `candidates`: the same identifier, among the mention's
            own candidates only.
        found: Whether the mentions were found by `gemel find-mentions`, and are compared with gold
            mentions by their places: `group` (the document), `mention`, and `mention_start`, else
            `text`. Writes `found.json` instead. Labels without `mention_id` are always read so.
        write_to: Directory for the files. Default: `_evaluation` in the output of the run.
        entities: Table file or directory with the pictures of entities: the columns `entity_id`,
            and `image_bytes` or `image_uri`, as for `gemel build-kb`. Default: the addresses in the
            knowledge base of the run.
        gallery_size: Number of mentions shown in the report.
        allowed_image_prefixes: Prefixes of an `image_uri` that the report may show, instead of the
            run's: absolute local directories, s3://bucket/prefix, https://host/path.
        max_image_bytes: Maximum size of an image file in bytes; a larger picture is not shown.
    """
    from gemel_engine import storage
    from gemel_engine.config.components import ImagePolicy
    from gemel_engine.evaluation.run import LinkedRun
    from gemel_engine.evaluation.spans import has_places_alone
    from gemel_engine.report.page import report_of

    image_source = ImagePolicy(allowed_image_prefixes, max_image_bytes)
    linked = LinkedRun.open(output)
    directory = write_to or f"{linked.output}/_evaluation"
    if found or (gold is not None and has_places_alone(gold, linked.stored_names)):
        _refuse("judging mentions by their places", protocol=protocol, train=train, against=against)
        _evaluate_found(linked, gold, directory)
        return
    judged = _judged(linked, gold, train, against, protocol, directory)
    page = report_of(
        linked, judged, training=train, gallery_size=gallery_size, entities=entities, image_source=image_source
    )
    storage.write_bytes(f"{directory}/report.html", page.encode())
    logger.info("%s/report.html", directory)


def _judged(
    linked: LinkedRun,
    gold: str | None,
    train: str | None,
    against: str | None,
    protocol: EvaluationProtocol,
    directory: str,
) -> JudgedRun | None:
    """Judge a run by gold labels, and print and write the result; without labels, only compare its answers."""
    from gemel_engine.evaluation.run import LinkedRun, changed_answers, judge_run

    other = None if against is None else LinkedRun.open(against)
    if gold is not None or linked.has_gold():
        judged = judge_run(linked, gold=gold, train=train, against=other, protocol=protocol)
        _write_metrics(judged, directory)
        return judged
    _refuse("a run without gold labels", protocol=protocol)
    if other is not None:
        num_mentions, num_changed = changed_answers(other.predictions, linked.predictions)
        logger.info("of %d mentions of both runs, %d have another entity", num_mentions, num_changed)
    return None


def _write_metrics(judged: JudgedRun, directory: str) -> None:
    """Print the table of an evaluation and write `metrics.json`."""
    from rich.console import Console

    from gemel_engine import storage
    from gemel_engine.cli.tables import as_table

    Console().print(as_table(judged))
    if (num_unknown := judged.evaluation.num_unknown) > judged.evaluation.num_mentions:
        logger.warning(
            "%d labels are no ids of the knowledge base, which has those of %d: see whether they are spelt as there",
            num_unknown,
            judged.evaluation.num_mentions,
        )
    if judged.is_below_baseline:
        logger.warning(
            "the accuracy is below that of a lookup without a model, which takes the entity that training mentions "
            "of the surface form have most often, else the one of that name: see docs/report.md"
        )
    storage.write_bytes(f"{directory}/metrics.json", judged.to_json())
    logger.info("%s/metrics.json", directory)


def _refuse(task: str, *, protocol: EvaluationProtocol, train: str | None = None, against: str | None = None) -> None:
    """Raise if an option is given that a task has no use for."""
    options = {"--protocol": protocol != "entity", "--train": train, "--against": against}
    if given := [name for name, value in options.items() if value]:
        raise ConfigurationError(f"{task} has no use for {' and '.join(given)}: leave that out")


def _evaluate_found(linked: LinkedRun, gold: str | None, directory: str) -> None:
    """Compare a run over found mentions with gold mentions, and print and write the result."""
    from rich.console import Console

    from gemel_engine import storage
    from gemel_engine.cli.tables import spans_table
    from gemel_engine.evaluation.spans import judge_spans_of_run

    if gold is None:
        raise ConfigurationError("--found is given without --gold: name a table of gold mentions")
    judged = judge_spans_of_run(linked, gold)
    Console().print(spans_table(judged))
    storage.write_bytes(f"{directory}/found.json", judged.to_json())
    logger.info("%s/found.json", directory)


def calibrate(
    output: Output, calibration: OutputDir, *, gold: str | None = None, nil_precision: Fraction = 0.8
) -> None:
    """Fit the score and its probabilities to a finished run with gold labels.

    Linking with `calibration` ranks entities by the fitted weights, and adds `confidence` and
    `is_nil` to each prediction.

    Args:
        output: Output of the run, local or s3://bucket/prefix. Use a run over the dev split, or over
            training mentions with `retrieval.exclude_group`, not over mentions to be evaluated
            later.
        calibration: Local directory for the calibration.
        gold: Table file or directory with the columns `mention_id` and `entity_id`. Default: the
            input of the run. Mentions without an entity, or with one that the knowledge base lacks,
            serve as examples of NIL; if there are fewer than 20, the entities of a fifth of the
            surface forms are held out instead.
        nil_precision: Share of the mentions predicted as NIL that should be NIL.
    """
    from gemel_engine.evaluation.calibrate import calibrate_run
    from gemel_engine.evaluation.run import LinkedRun

    fitted = calibrate_run(LinkedRun.open(output), gold=gold, nil_precision=nil_precision)
    fitted.save(calibration)
    if fitted.weights is not None:
        logger.info("%s: %s; language model %.3g", calibration, fitted.weights.features, fitted.weights.language_model)
    logger.info("%s: %s", calibration, ", ".join(f"{name} {value:.3g}" for name, value in fitted.fitted_on.items()))

"""Commands for a beginning, which read no model: look at a corpus, check a machine."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from gemel_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from gemel_engine.survey.machine import Check

Input = Annotated[Positional[str], arg(metavar="INPUT")]
ConfigFile = Annotated[Positional[Path | None], arg(metavar="CONFIG.toml")]

logger = logging.getLogger(__name__)


def init(input: Input, *, write_to: Path = Path("link.toml")) -> None:  # the name of the setting
    """Look at a corpus and write a commented configuration that links it.

    What the corpus has is filled in, what is missing is marked.

    Args:
        input: Table of mentions or documents, or directory of tables, local or s3://bucket/prefix.
        write_to: New file for the configuration; an existing one is not overwritten.
    """
    from gemel_engine.config.machine import fast_dtype
    from gemel_engine.survey.corpus import MISSING, configuration, survey_corpus, usual_columns

    if write_to.exists():
        raise ConfigurationError(f"{write_to} exists: remove it, or name another file with --write-to")
    written = configuration(survey_corpus(input, usual_columns(input)), fast_dtype())
    try:
        with write_to.open("x", encoding="utf-8") as stream:
            stream.write(written)
    except OSError as error:
        raise ConfigurationError(f"{write_to} can't be written: {error}") from error
    num_missing = written.count(MISSING) - 1  # one is in the first line
    logger.info("%s: fill in %d lines marked %s, then `gemel doctor %s`", write_to, num_missing, MISSING, write_to)


def doctor(config: ConfigFile = None) -> None:
    """Check whether this machine can run a job, and what a configuration names.

    Prints a line for each check: ok, warning or problem, and what to do. Ends with exit code 1 if
    there is a problem. A file is written in the output, and removed.

    Args:
        config: Configuration of `gemel link`, `gemel train` or `gemel find-mentions`. Default: only
            the machine is checked.
    """
    from gemel_engine.survey.job import check_job
    from gemel_engine.survey.machine import Status, check_machine

    counts = dict.fromkeys(Status, 0)
    for check in (*check_machine(), *(() if config is None else check_job(config))):
        counts[check.status] += 1
        sys.stdout.write(_line(check))
    sys.stdout.write(f"{counts[Status.PROBLEM]} problems, {counts[Status.WARNING]} warnings\n")
    if counts[Status.PROBLEM]:
        sys.exit(1)


def _line(check: Check) -> str:
    from gemel_engine.display import visible

    remedy = f"\n{'':26}→ {visible(check.remedy)}" if check.remedy else ""
    return f"{check.status:8} {check.name:16} {visible(check.found)}{remedy}\n"

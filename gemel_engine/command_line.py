"""What the scripts in `jobs/` have in common: arguments from a function's signature, errors as exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping

import tyro

from gemel_engine.errors import GemelError


def run(main: Callable[..., object]) -> None:
    """Call a script's function with the arguments of the command line; an expected error ends it with its exit code."""
    _call(lambda: tyro.cli(main))


def run_commands(commands: Mapping[str, Callable[..., object]]) -> None:
    """The same for a script of several commands, by their names."""
    _call(lambda: tyro.extras.subcommand_cli_from_dict(dict(commands)))


def _call(command: Callable[[], object]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        command()
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

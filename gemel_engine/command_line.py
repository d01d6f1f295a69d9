"""What the scripts in `jobs/` have in common: arguments from a function's signature, errors as exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import tyro

from gemel_engine.config import Config, load_config
from gemel_engine.errors import ConfigurationError, GemelError


def run(main: Callable[..., object]) -> None:
    """Call a script's function with the arguments of the command line; an expected error ends it with its exit code."""
    _call(lambda: tyro.cli(main))


def run_commands(commands: Mapping[str, Callable[..., object]]) -> None:
    """The same for a script of several commands, by their names."""
    _call(lambda: tyro.extras.subcommand_cli_from_dict(dict(commands)))


def run_configured(config_type: type[Config], job: Callable[[Config], object]) -> None:
    """The same for a job that a TOML file describes: the file, then overrides such as `--search.objective mean`."""

    def command() -> None:
        arguments = sys.argv[1:]
        if not arguments or arguments[0].startswith("-"):
            raise ConfigurationError(f"name a configuration: {Path(sys.argv[0]).name} CONFIG.toml [--key value ...]")
        job(load_config(config_type, Path(arguments[0]), arguments[1:]))

    _call(command)


def _call(command: Callable[[], object]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        command()
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

"""What all commands do with a command line: read the configuration that it names, and end with an error's exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from gemel_engine.display import make_visible, visible, visible_traceback
from gemel_engine.errors import ConfigurationError, GemelError

Config = TypeVar("Config")

_SETTINGS = "Every setting: a key of CONFIG.toml, and an option that overrides it."


def run(command: Callable[[], object]) -> None:
    """Call a command; an error ends the process: one that the project raises on purpose, with its exit code."""
    handler = logging.StreamHandler()
    handler.addFilter(make_visible)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler])
    logging.getLogger("gemel_engine").setLevel(logging.INFO)  # open_clip and faiss write how they load to the root's
    try:
        command()
    except GemelError as error:
        cause = getattr(error, "cause", error)  # Ray puts its own text around what a task raises
        sys.stderr.write(f"error: {visible(str(cause))}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        sys.stderr.write(f"{visible_traceback(error)}\n")
        sys.exit(1)


def configure(config_type: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Read the configuration of a job from `CONFIG.toml [--key value ...]`: the file, then overrides of its settings.

    Without a file, `--help` lists all settings and ends the process; behind one it shows their values, too.

    Args:
        config_type: The configuration.
        command: What stands before the arguments, for the texts that name it.
        arguments: What follows.

    Raises:
        ConfigurationError: No file is named, or `load_config` refuses it.
    """
    from gemel_engine.config import load_config

    if arguments and arguments[0] in ("-h", "--help"):
        tyro.cli(config_type, prog=f"{command} CONFIG.toml", description=_SETTINGS, args=["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError(f"name a configuration: {command} CONFIG.toml [--key value ...]")
    path, *overrides = arguments
    return load_config(config_type, Path(path), overrides, program=f"{command} {path}")

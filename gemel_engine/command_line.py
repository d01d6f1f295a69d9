"""What the scripts in `jobs/` have in common: arguments from a function's signature, errors as exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import tyro

from gemel_engine.errors import GemelError


def run(main: Callable[..., object]) -> None:
    """Call a script's function with the arguments of the command line; an expected error ends it with its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        tyro.cli(main)
    except GemelError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

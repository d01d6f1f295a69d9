"""The commands of `gemel`.

A command is a function in `jobs.py` or `artifacts.py`, and its line in one of the two tables here. What it works with
is imported inside it, so that `gemel --help` does not wait for torch, and a configuration is checked before Ray is
imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

import tyro

from gemel_engine.cli import artifacts, jobs, options

# Commands that are called with their arguments as they stand on the command line.
UNPARSED: dict[str, Callable[[Sequence[str]], None]] = {
    "link": jobs.link,
    "plan": jobs.plan,
    "train": jobs.train,
    "explain": jobs.explain,
    "import-gemel": artifacts.import_gemel,
}

# Commands whose options are their parameters.
PARSED: dict[str, Callable[..., None]] = {
    "evaluate": jobs.evaluate,
    "calibrate": jobs.calibrate,
    "build-kb": artifacts.build_kb,
    "update-kb": artifacts.update_kb,
    "compact-kb": artifacts.compact_kb,
    "build-demonstrations": artifacts.build_demonstrations,
    "init-mapper": artifacts.init_mapper,
}

DESCRIPTION = """Multimodal entity linking by generating entity names.

`gemel COMMAND --help` explains a command, `gemel --version` prints the version. Exit codes: 0 done; 2 configuration or
arguments, 3 input, 4 artifact unusable; 5 too many rows failed; 1 anything else."""


def main(*command: str) -> None:
    """Run a command; what `command` does not say follows in the arguments of the process."""
    options.use_utf8()
    arguments = [*command, *sys.argv[1:]]
    if arguments == ["--version"]:
        sys.stdout.write(f"gemel {version('gemel-engine')}\n")
    elif arguments and arguments[0] in UNPARSED:
        options.run(partial(UNPARSED[arguments[0]], arguments[1:]))
    else:
        cli = tyro.extras.subcommand_cli_from_dict
        known = UNPARSED | {name: options.checked(function) for name, function in PARSED.items()}
        options.run(partial(cli, known, prog="gemel", description=DESCRIPTION, args=arguments))


if __name__ == "__main__":
    main()

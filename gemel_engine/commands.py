"""The commands of `gemel`; the scripts in `jobs/` are other names for them.

A command is a function in `job_commands.py` or `artifact_commands.py`, and its line in one of the two tables here. What
it works with is imported inside it, so that `gemel --help` does not wait for torch, and a configuration is checked
before Ray is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

import tyro

from gemel_engine import artifact_commands, command_line, job_commands

# Commands that are called with their arguments as they stand on the command line.
UNPARSED: dict[str, Callable[[Sequence[str]], None]] = {
    "link": job_commands.link,
    "plan": job_commands.plan,
    "train": job_commands.train,
    "explain": job_commands.explain,
    "import-gemel": artifact_commands.import_gemel,
}

# Commands whose options are their parameters.
PARSED: dict[str, Callable[..., None]] = {
    "evaluate": job_commands.evaluate,
    "calibrate": job_commands.calibrate,
    "build-kb": artifact_commands.build_kb,
    "update-kb": artifact_commands.update_kb,
    "compact-kb": artifact_commands.compact_kb,
    "build-demonstrations": artifact_commands.build_demonstrations,
    "init-mapper": artifact_commands.init_mapper,
}

DESCRIPTION = """Multimodal entity linking by generating entity names.

`gemel COMMAND --help` explains a command, `gemel --version` prints the version. Exit codes: 0 done; 2 configuration or
arguments, 3 input, 4 artifact unusable; 5 too many rows failed; 1 anything else."""


def main(*command: str) -> None:
    """Run a command; what `command` does not say follows in the arguments of the process."""
    command_line.use_utf8()
    arguments = [*command, *sys.argv[1:]]
    if arguments == ["--version"]:
        sys.stdout.write(f"gemel {version('gemel-engine')}\n")
    elif arguments and arguments[0] in UNPARSED:
        command_line.run(partial(UNPARSED[arguments[0]], arguments[1:]))
    else:
        cli = tyro.extras.subcommand_cli_from_dict
        known = UNPARSED | {name: command_line.checked(function) for name, function in PARSED.items()}
        command_line.run(partial(cli, known, prog="gemel", description=DESCRIPTION, args=arguments))

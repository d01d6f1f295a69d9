"""The commands of `gemel`.

A command is a function in another module of this package and its line in `COMMANDS`. The function
imports what it needs when it is called: `gemel --help` does not wait for torch, and a configuration
is validated before Ray is imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import tyro

from gemel_engine import verbosity
from gemel_engine.cli import (
    artifacts,
    exports,
    importers,
    jobs,
    knowledge_bases,
    options,
    serving,
    surveys,
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command of `gemel`.

    Attributes:
        function: The function that runs the command. Its docstring appears in `gemel --help`.
        parses_arguments: Whether the function receives the list of arguments and parses it itself;
            otherwise its parameters are the options.
    """

    function: Callable[..., None]
    parses_arguments: bool = False


COMMANDS = {
    "init": Command(surveys.init),
    "doctor": Command(surveys.doctor),
    "link": Command(jobs.link, parses_arguments=True),
    "find-mentions": Command(jobs.find_mentions, parses_arguments=True),
    "plan": Command(jobs.plan, parses_arguments=True),
    "train": Command(jobs.train, parses_arguments=True),
    "explain": Command(jobs.explain, parses_arguments=True),
    "serve": Command(serving.serve, parses_arguments=True),
    "import": Command(importers.import_entities, parses_arguments=True),
    "import-gemel": Command(artifacts.import_gemel, parses_arguments=True),
    "evaluate": Command(jobs.evaluate),
    "export": Command(exports.export),
    "calibrate": Command(jobs.calibrate),
    "build-kb": Command(knowledge_bases.build_kb),
    "update-kb": Command(knowledge_bases.update_kb),
    "compact-kb": Command(knowledge_bases.compact_kb),
    "build-demonstrations": Command(artifacts.build_demonstrations),
    "init-mapper": Command(artifacts.init_mapper),
}

VERBOSE = "--verbose"

DESCRIPTION = """Multimodal entity linking by generating entity names.

`gemel COMMAND --help` explains a command, `gemel --version` prints the version. Every command takes
`--verbose`, which also prints the lines of Ray, vLLM and other libraries.

Exit codes:
0: success
1: an error not listed here
2: invalid configuration or arguments
3: invalid input
4: missing, damaged or incompatible artifact
5: more rows failed than `max_failed_fraction` allows
130, 143: stopped by Ctrl-C or SIGTERM"""


def main(*command: str) -> None:
    """Run the command given by `command` followed by the arguments of the process."""
    options.use_utf8()
    arguments = [*command, *sys.argv[1:]]
    if VERBOSE in arguments:
        os.environ[verbosity.VARIABLE] = "1"
        arguments.remove(VERBOSE)
    named = COMMANDS.get(arguments[0]) if arguments else None
    if arguments == ["--version"]:
        sys.stdout.write(f"gemel {version('gemel-engine')}\n")
    elif named is not None and named.parses_arguments:
        options.run(partial(named.function, arguments[1:]), shlex.join(["gemel", *arguments]))
    else:
        cli = tyro.extras.subcommand_cli_from_dict
        functions = {
            name: item.function if item.parses_arguments else options.checked(item.function)
            for name, item in COMMANDS.items()
        }
        command_line = shlex.join(["gemel", *arguments])
        options.run(partial(cli, functions, prog="gemel", description=DESCRIPTION, args=arguments), command_line)


if __name__ == "__main__":
    main()

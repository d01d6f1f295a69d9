"""Functions shared by all commands: read the configuration, end with an error's exit code."""

from __future__ import annotations

import codecs
import inspect
import io
import locale
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from gemel_engine.display import make_visible, visible, visible_traceback
from gemel_engine.errors import ConfigurationError, GemelError, redacted

Config = TypeVar("Config")
Options = TypeVar("Options")

_SETTINGS = """Every option below is a setting of CONFIG.toml: `--search.width` overrides the key `width` in
the table `[search]`.

The file must contain the required settings. Name a file before `--help` to see its values."""


def use_utf8() -> None:
    """Make this process and its children read text as UTF-8, and escape characters on output.

    If the locale has another encoding, restart the process in Python's UTF-8 mode, because
    libraries open text files without naming an encoding. Output stays in the encoding of the
    terminal; characters that the encoding lacks are written as escapes.
    """
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        encoding = getattr(sys.stdout, "encoding", None) or locale.getencoding()
        os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run(command: Callable[[], object]) -> None:
    """Call a command; an error ends the process, a `GemelError` with its own exit code."""
    handler = logging.StreamHandler()
    handler.addFilter(make_visible)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler])
    # Not the root logger: open_clip and faiss log how they load to it.
    logging.getLogger("gemel_engine").setLevel(logging.INFO)
    try:
        command()
    except GemelError as error:
        cause = getattr(error, "cause", error)  # Ray puts its own text around what a task raises
        sys.stderr.write(f"error: {visible(redacted(str(cause)))}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        sys.stderr.write(f"{redacted(visible_traceback(error))}\n")
        sys.exit(1)


def checked(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command that validates its options against the bounds of their types before it runs.

    Raises:
        ConfigurationError: Raised by the returned function if an option is out of bounds.
    """
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)

    @wraps(function)
    def call(*arguments: object, **options: object) -> None:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            try:
                TypeAdapter(hints[name]).validate_python(
                    asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                )
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                option = str(fault["loc"][0] if fault["loc"] else name).replace("_", "-")
                raise ConfigurationError(f"--{option} is {fault['input']!r}: {fault['msg']}") from None
        function(*arguments, **options)

    return call


def configure(config_type: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Return the configuration of a job from the arguments `CONFIG.toml [--key value ...]`.

    `--help` lists all settings and ends the process; after a file, it also shows their values.

    Args:
        config_type: Type of the configuration.
        command: Command line before the arguments, for help and error messages.
        arguments: Path of the file, followed by overrides of its settings.

    Raises:
        ConfigurationError: No file is named, or `load_config` rejects it.
    """
    from gemel_engine.config.loading import load_config

    if arguments and arguments[0] in ("-h", "--help"):
        tyro.cli(config_type, prog=f"{command} CONFIG.toml", description=_SETTINGS, args=["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError(f"name a configuration: {command} CONFIG.toml [--key value ...]")
    path, *overrides = arguments
    return load_config(config_type, Path(path), overrides, program=f"{command} {path}")


def asked(
    options_type: type[Options], config_type: type[Config], command: str, arguments: Sequence[str]
) -> tuple[Options, Config]:
    """Return a command's own options, and the configuration with all other options as overrides."""
    from gemel_engine.config.loading import validated

    if {"-h", "--help"} & set(arguments):
        tyro.cli(options_type, prog=f"{command} CONFIG.toml", args=["--help"])
    found, settings = tyro.cli(
        options_type, prog=f"{command} CONFIG.toml", args=arguments[1:], return_unknown_args=True
    )
    return validated(found), configure(config_type, command, [*arguments[:1], *settings])

"""What all commands do with a command line: read the configuration that it names, and end with an error's exit code."""

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

_SETTINGS = "Every setting: a key of CONFIG.toml, and an option that overrides it."


def use_utf8() -> None:
    """Make this process and those that it starts read text as UTF-8, and write what the terminal lacks as escapes.

    Where the locale has another encoding the process begins anew, in Python's UTF-8 mode: libraries open text files
    without naming an encoding. What it writes stays in the encoding of the terminal.
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
    """Call a command; an error ends the process: one that the project raises on purpose, with its exit code."""
    handler = logging.StreamHandler()
    handler.addFilter(make_visible)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", handlers=[handler])
    logging.getLogger("gemel_engine").setLevel(logging.INFO)  # open_clip and faiss write how they load to the root's
    try:
        command()
    except GemelError as error:
        sys.stderr.write(f"error: {visible(redacted(str(error)))}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        sys.stderr.write(f"{redacted(visible_traceback(error))}\n")
        sys.exit(1)


def checked(function: Callable[..., None]) -> Callable[..., None]:
    """Have a command refuse options that are out of the bounds of their types.

    Raises:
        ConfigurationError: From the returned function; an option is out of its bounds.
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
    """Read the configuration of a job from `CONFIG.toml [--key value ...]`: the file, then overrides of its settings.

    Without a file, `--help` lists all settings and ends the process; behind one it shows their values, too.

    Args:
        config_type: The configuration.
        command: What stands before the arguments, for the texts that name it.
        arguments: What follows.

    Raises:
        ConfigurationError: No file is named, or `load_config` refuses it.
    """
    from gemel_engine.config.loading import load_config

    if arguments and arguments[0] in ("-h", "--help"):
        tyro.cli(config_type, prog=f"{command} CONFIG.toml", description=_SETTINGS, args=["--help"])
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError(f"name a configuration: {command} CONFIG.toml [--key value ...]")
    path, *overrides = arguments
    return load_config(config_type, Path(path), overrides, program=f"{command} {path}")

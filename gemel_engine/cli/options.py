"""Functions shared by all commands: read the configuration, end with an error's exit code."""

from __future__ import annotations

import atexit
import codecs
import gc
import inspect
import io
import locale
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from gemel_engine.display import make_visible, visible, visible_traceback
from gemel_engine.errors import ConfigurationError, GemelError, redacted
from gemel_engine.verbosity import is_verbose, quiet_libraries

Config = TypeVar("Config")
Options = TypeVar("Options")

HELP, HELP_ALL = ("-h", "--help"), "--help-all"

_SETTINGS = """Every option below is a setting of CONFIG.toml: `--search.width` overrides the key `width` in
the table `[search]`.

The file must contain the required settings. Name a file before `--help` to see its values."""

_BASIC = "These are the basic settings; `--help-all` lists all of them.\n\n"


_ADDRESS = re.compile("[a-z0-9]+:/")
_LONG_LAYOUT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


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


def run(command: Callable[[], object], name: str | None = None) -> None:
    """Call a command; an error ends the process, a `GemelError` with its own exit code.

    Ctrl-C and SIGTERM, which `ray job stop` sends, end it with one line, and with 130 and 143.

    Args:
        command: The command.
        name: Command line that goes on with an interrupted command.
    """
    handler = logging.StreamHandler()
    handler.addFilter(make_visible)
    is_short = sys.stderr.isatty() and not is_verbose()
    layout = "%(asctime)s %(levelname)s %(message)s" if is_short else _LONG_LAYOUT
    logging.basicConfig(format=layout, datefmt="%H:%M:%S" if is_short else None, handlers=[handler])
    quiet_libraries()
    # Not the root logger: open_clip and faiss log how they load to it.
    logging.getLogger("gemel_engine").setLevel(logging.INFO)
    atexit.register(gc.freeze)  # else the last collection visits all objects of torch and vLLM: three seconds
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
    try:
        command()
    except KeyboardInterrupt as stopped:
        number = stopped.args[0] if stopped.args else signal.SIGINT
        sys.stderr.write(f"stopped; to go on: {visible(redacted(name))}\n" if name else "stopped\n")
        sys.exit(128 + number)
    except GemelError as error:
        cause = getattr(error, "cause", error)  # Ray puts its own text around what a task raises
        sys.stderr.write(f"error: {visible(redacted(str(cause)))}\n")
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _is_output_read():
            _end_unread()
        sys.stderr.write(f"{visible_traceback(error)}\n")
        sys.exit(1)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _end_unread()


def _is_output_read() -> bool:
    """Return whether somebody reads standard output, unlike behind a `head` that has ended."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)  # errors alone
    return not poller.poll(0)


def _end_unread() -> NoReturn:
    """End as a process does whose output nobody reads any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def _interrupt(number: int, _: object) -> NoReturn:
    """Interrupt the command; a second signal ends the process at once."""
    for handled in (signal.SIGINT, signal.SIGTERM):
        signal.signal(handled, lambda again, _: os._exit(128 + again))
    raise KeyboardInterrupt(number)


def checked(function: Callable[..., None]) -> Callable[..., None]:
    """Return a command that validates its options against the bounds of their types before it runs.

    Raises:
        ConfigurationError: Raised by the returned function if an option is out of bounds, or an
            address where a local path is needed.
    """
    signature, hints = inspect.signature(function), get_type_hints(function, include_extras=True)

    @wraps(function)
    def call(*arguments: object, **options: object) -> None:
        for name, value in signature.bind(*arguments, **options).arguments.items():
            if isinstance(value, Path):
                check_local(f"--{name.replace('_', '-')}", str(value))
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


def check_local(what: str, path: str) -> None:
    """Raise unless a path is local.

    Args:
        what: What the path is of, for the message.
        path: A path, or an address, which may have lost one of its two slashes.

    Raises:
        ConfigurationError: It is an address.
    """
    if _ADDRESS.match(path):
        raise ConfigurationError(f"{what} is {path!r}: give a local path")


def configure(config_type: type[Config], command: str, arguments: Sequence[str]) -> Config:
    """Return the configuration of a job from the arguments `CONFIG.toml [--key value ...]`.

    `--help` lists the basic settings, `--help-all` all of them, and ends the process; after a file,
    it also shows their values.

    Args:
        config_type: Type of the configuration.
        command: Command line before the arguments, for help and error messages.
        arguments: Path of the file, followed by overrides of its settings.

    Raises:
        ConfigurationError: No file is named, or `load_config` rejects it.
    """
    from gemel_engine.config.loading import load_config

    if {*HELP, HELP_ALL} & set(arguments):
        _explain(config_type, command, arguments)
    if not arguments or arguments[0].startswith("-"):
        raise ConfigurationError(f"name a configuration: {command} CONFIG.toml [--key value ...]")
    path, *overrides = arguments
    return load_config(config_type, Path(path), overrides, program=f"{command} {path}")


def _explain(config_type: type[Any], command: str, arguments: Sequence[str]) -> NoReturn:
    """Print the settings, with the values of a file if one is named, and end the process."""
    from gemel_engine.cli.basic_settings import basic_type
    from gemel_engine.config.loading import load_config
    from gemel_engine.config.settings import LinkConfig

    file = None if arguments[0].startswith("-") else arguments[0]
    values = None if file is None else load_config(config_type, Path(file))
    shown_type, description, defaults = config_type, _SETTINGS, {} if values is None else {"default": values}
    if config_type is LinkConfig and HELP_ALL not in arguments:
        shown_type, description, defaults = basic_type(config_type, values), _BASIC + _SETTINGS, {}
    tyro.cli(
        shown_type, prog=f"{command} {file or 'CONFIG.toml'}", description=description, args=["--help"], **defaults
    )
    raise AssertionError("--help ends the process")


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

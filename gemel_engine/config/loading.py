"""Read a configuration: a TOML file, then command-line overrides. Errors name keys in full."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from gemel_engine.config.addresses import RAY_WORKING_DIRECTORIES, local_path
from gemel_engine.config.components import Address
from gemel_engine.config.machine import resolve_dtype
from gemel_engine.errors import ConfigurationError, shown

Config = TypeVar("Config")


def load_config(
    config_type: type[Config], path: Path, overrides: Sequence[str] = (), *, program: str | None = None
) -> Config:
    """Read a TOML file and apply overrides such as `--search.objective mean`.

    An unknown or malformed override prints the reason and ends the process with code 2; `--help`
    ends it with code 0.

    Args:
        config_type: Type of the configuration.
        path: Path of the TOML file.
        overrides: Command-line arguments that override settings.
        program: Command line before the overrides, for help and error messages; None: the name of
            the process.

    Raises:
        ConfigurationError: The file can't be read, a key is unknown, or a value is malformed or out
            of bounds.
    """
    try:
        # Some editors write a byte order mark.
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"the configuration {path} can't be read: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"the configuration {path} is not TOML: {error}") from error
    except RecursionError:
        raise ConfigurationError(f"the configuration {path} is nested too deeply: settings have three levels") from None
    try:
        config = TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        raise ConfigurationError(f"the configuration {path} is wrong: {_describe(error, config_type)}") from None
    if not overrides:
        return _resolved(config)
    return validated(tyro.cli(config_type, prog=program, default=config, args=list(overrides)))


def validated(config: Config) -> Config:
    """Validate a configuration that was created or changed in Python, where values are not checked.

    Defaults that depend on the machine are resolved.

    Raises:
        ConfigurationError: A value is malformed or out of bounds.
    """
    adapter = TypeAdapter(type(config))
    try:
        return _resolved(adapter.validate_python(adapter.dump_python(config, warnings=False)))
    except ValidationError as error:
        raise ConfigurationError(f"the configuration is wrong: {_describe(error, type(config))}") from None


def _resolved(config: Config) -> Config:
    resolved: Config = resolve_dtype(config)
    return resolved


def with_absolute_paths(config: Config) -> Config:
    """Return a configuration whose local addresses mean the same in any working directory.

    Processes of a cluster work in the directory where Ray was started. Those of a submitted job
    work in their node's copy of the directory that it brought, so that there nothing is changed.
    Names of models stay as they are.
    """
    if RAY_WORKING_DIRECTORIES in Path.cwd().parts:
        return config
    changes: dict[str, Any] = {}
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            changes[name] = with_absolute_paths(value)
        elif value is not None and Address in (hint, *get_args(hint)):
            changes[name] = str(local_path(value) or value)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def config_json(config: object) -> str:
    """Return the resolved settings as canonical JSON, as stored with an output."""
    return json.dumps(TypeAdapter(type(config)).dump_python(config, mode="json"), indent=2, sort_keys=True)


def _describe(error: ValidationError, config_type: type[Any]) -> str:
    """Describe all faults, each with the full name of its key."""
    faults = []
    for fault in error.errors(include_url=False):
        key = ".".join(map(str, fault["loc"]))
        if fault["type"] == "unexpected_keyword_argument":
            known = _field_names(config_type, fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
            faults.append(f"unknown key {key!r}; {hint}")
        elif fault["type"] == "missing":  # its input is the whole group
            faults.append(f"{key}: {fault['msg']}")
        else:
            faults.append(f"{key}: {fault['msg']} (got {_found(fault['input'])})" if key else fault["msg"])
    return "; ".join(faults)


def _found(value: object) -> str:
    """Describe a wrong value briefly, without parts that may be secret."""
    if isinstance(value, str):
        return shown(value)
    is_short = isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 64)
    return repr(value) if is_short else f"a value of type {type(value).__name__}"


def _field_names(config_type: type[Any], location: Sequence[int | str]) -> list[str]:
    """Return the names of the settings in the group at `location`."""
    for name in location:
        config_type = get_type_hints(config_type)[str(name)]
    return [item.name for item in dataclasses.fields(config_type)]

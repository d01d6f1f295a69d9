"""Packages that only some commands need: one that is missing is named with the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from gemel_engine.errors import ConfigurationError


@contextmanager
def extra(*names: str) -> Iterator[None]:
    """Import packages of an extra in the body of a `with` statement.

    Args:
        names: The extras of `pyproject.toml` that install what the body imports; any one of them does.

    Raises:
        ConfigurationError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extras = " or ".join(f"gemel-engine[{name}]" for name in names)
        raise ConfigurationError(f"the package {error.name} is not installed: install {extras}") from error


def require(module: str, *names: str) -> None:
    """Raise what `extra` raises if a module is not installed; nothing is imported.

    Args:
        module: Name of a top-level module.
        names: The extras that install it.
    """
    with extra(*names):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)

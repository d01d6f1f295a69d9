"""Optional packages: an error names a missing one and the extra that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from gemel_engine.errors import ConfigurationError


@contextmanager
def extra(*names: str) -> Iterator[None]:
    """Guard imports in the body of a `with` statement that need an extra.

    Args:
        names: Extras of `pyproject.toml`, each of which installs the packages that the body
            imports.

    Raises:
        ConfigurationError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extras = " or ".join(f"gemel-engine[{name}]" for name in names)
        raise ConfigurationError(f"the package {error.name} is not installed: install {extras}") from error


def require(module: str, *names: str) -> None:
    """Raise if a module is not installed, without importing it.

    Args:
        module: Name of a top-level module.
        names: Extras of `pyproject.toml`, each of which installs the module.

    Raises:
        ConfigurationError: The module is not installed.
    """
    with extra(*names):
        if find_spec(module) is None:
            raise ModuleNotFoundError(name=module)

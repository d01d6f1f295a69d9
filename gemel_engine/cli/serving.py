"""The command `gemel serve`; registered in `main.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from gemel_engine.cli.options import asked
from gemel_engine.errors import ConfigurationError, EngineDiedError

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Serve a page to try a configuration, and a JSON API: POST /api/link, POST /api/explain.

    Any setting of CONFIG.toml can be given as a further option; `gemel link --help-all` lists them.

    Attributes:
        host: Address to listen on. Others than the default can be reached from other machines;
            there is no password.
        port: Port to listen on.
        names: Host names by which browsers reach the page, besides `host` and those of this
            machine.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    names: tuple[str, ...] = ()


def serve(arguments: Sequence[str]) -> None:
    """Serve a page and a JSON API to try a configuration.

    Arguments: CONFIG.toml [--host ADDRESS] [--port PORT] [--key value ...].
    """
    from gemel_engine.config.settings import LinkConfig
    from gemel_engine.extras import extra

    serving, config = asked(Serving, LinkConfig, "gemel serve", arguments)

    with extra("serve"):
        import uvicorn

    from gemel_engine.linker import Linker
    from gemel_engine.serving.app import create_app

    linker = Linker(config)
    is_dead = False

    def stop() -> None:
        nonlocal is_dead
        is_dead = server.should_exit = True

    host = f"[{serving.host}]" if ":" in serving.host else serving.host  # as addresses have IPv6
    app = create_app(linker, [*_LOOPBACK, host, *serving.names], stop)
    server = uvicorn.Server(
        uvicorn.Config(app, serving.host, serving.port, log_level="warning", timeout_graceful_shutdown=5)
    )
    logger.info("open http://%s:%d/ in a browser; Ctrl-C ends", host, serving.port)
    try:
        server.run()
    except SystemExit as error:  # uvicorn has logged why
        raise ConfigurationError(f"can't listen on {host}:{serving.port}: name another --host or --port") from error
    if is_dead:
        raise EngineDiedError("the language model's engine has ended: start the command again")

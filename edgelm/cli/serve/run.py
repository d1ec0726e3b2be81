"""Run a server until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from edgelm.errors import EdgeLMError
from edgelm.serving.app import create_app

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from edgelm.serving.settings import Settings

_CONNECTIONS = 1024
_BACKLOG = 512
_AFTER_FINISH = 5
"""Seconds in which the last events of a request that was ended are sent."""


class Server(uvicorn.Server):
    """Prints when it is ready; when it is stopped, requests end before their connections."""

    def __init__(self, config: uvicorn.Config, app: Starlette, ready: str) -> None:
        super().__init__(config)
        self._service, self._ready = app.state.service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, then listen."""
        await super().startup(sockets)
        if self.started:
            click.echo(self._ready)
            sys.stdout.flush()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let requests finish for a while."""
        stopping = asyncio.ensure_future(self._service.stop())
        await super().shutdown(sockets)
        stopping.cancel()


def run_server(settings: Settings, host: str, port: int, *, verbose: bool) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises:
        EdgeLMError: the address cannot be used, or a model cannot be loaded.
        KeyboardInterrupt: the server was stopped.
    """
    _log_to_stderr(verbose=verbose)
    app = create_app(settings)
    listening = _listen(host, port)
    with listening:
        address = f"[{host}]" if ":" in host else host
        ready = f"http://{address}:{listening.getsockname()[1]}  ({', '.join(settings.models)}; page at /, API at /v1)"
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(settings.finish_seconds) + _AFTER_FINISH,
        )
        server = Server(config, app, ready)
        with contextlib.suppress(SystemExit):  # the application could not start
            server.run([listening])
        if not server.started:
            problems = [model.problem for model in app.state.service.models.all.values() if model.problem is not None]
            raise problems[0] if problems else EdgeLMError("the server could not start")


def _listen(host: str, port: int) -> socket.socket:
    """Return a bound socket.

    Raises:
        EdgeLMError: the address is unknown or in use.
    """
    name: Any = host.strip("[]")
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        try:
            if sys.platform != "win32":  # there it would let another program take the port over
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise EdgeLMError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another --host or --port"
        ) from error
    return listening


def _log_to_stderr(*, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("edgelm.serving")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if verbose else logging.WARNING)
    # Its messages about signals and a failed start would repeat ours.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)

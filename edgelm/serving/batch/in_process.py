"""Calls of an ASGI application in this process: no socket and no HTTP client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from edgelm.errors import EdgeLMError

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
_VERSIONS = {"version": "3.0", "spec_version": "2.3"}


class InProcess:
    """An application and its client.

    Args:
        app: the application.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._to_app: asyncio.Queue[Message] = asyncio.Queue()
        self._from_app: asyncio.Queue[Message] = asyncio.Queue()
        self._lifespan: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the application.

        Raises:
            EdgeLMError: it could not start.
        """
        scope: Message = {"type": "lifespan", "asgi": _VERSIONS, "state": {}}

        async def live() -> None:
            await self._app(scope, self._to_app.get, self._from_app.put)

        self._lifespan = asyncio.ensure_future(live())
        await self._exchange("startup")

    async def stop(self) -> None:
        """Stop the application."""
        await self._exchange("shutdown")
        if self._lifespan is not None:
            await self._lifespan

    async def _exchange(self, what: str) -> None:
        assert self._lifespan is not None
        await self._to_app.put({"type": f"lifespan.{what}"})
        answer = asyncio.ensure_future(self._from_app.get())
        try:
            await asyncio.wait((answer, self._lifespan), return_when=asyncio.FIRST_COMPLETED)
            message = answer.result() if answer.done() else {"type": "nothing", "message": "it ended"}
        finally:
            answer.cancel()
        if message["type"] != f"lifespan.{what}.complete":
            await asyncio.wait((self._lifespan,))
            error = self._lifespan.exception()
            text = str(error or message.get("message", "")).strip()
            raise EdgeLMError(f"the models could not be loaded: {text.splitlines()[-1] if text else what}") from error

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a request of JSON; return the status and the body of the answer."""
        status, parts, sent = 500, [], False
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"),
                   (b"content-length", str(len(body)).encode())]  # fmt: skip
        scope: Message = {
            "type": "http", "asgi": _VERSIONS, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "client": ("batch", 0), "server": ("localhost", 80), "state": {},
        }  # fmt: skip

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # this client never leaves
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, send)
        return status, b"".join(parts)

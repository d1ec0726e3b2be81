"""From the engine's thread to the event loop, and from there to the client as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from edgelm.serving.api.errors import ApiError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")
LOG = logging.getLogger("edgelm.serving")

PING_SECONDS = 15.0
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class ClientLeft(Exception):  # noqa: N818 - not an error of the server
    """The client closed the connection before it had the answer."""


class Inbox(Generic[T]):
    """Items that any thread puts in and one task of the event loop takes out, many at a time."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._woken = False

    def put(self, item: T) -> None:
        """Add an item; from any thread."""
        self._items.append(item)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self, seconds: float) -> list[T]:
        """Return all items, of which there is one at least; an empty list after `seconds` without any."""
        if not self._items:
            try:
                with anyio.fail_after(seconds):
                    await self._arrived.wait()
            except TimeoutError:
                return []
        # In this order: an item that arrives after the flag fell wakes this task again.
        self._arrived.clear()
        self._woken = False
        found = []
        while self._items:
            found.append(self._items.popleft())
        return found


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, and cancel it when the client leaves.

    Raises:
        ClientLeft: the client left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _left(receive: Receive) -> None:
    """Return when the client has left. The body was received before."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return


class EventStream:
    """An answer of server-sent events (ASGI).

    Args:
        events: what to send.
        stack: what the answer holds; closed at the end, also when the client leaves before the first event.
        send_seconds: the connection is dropped if the client reads nothing for so long.
    """

    status_code = 200

    def __init__(self, events: AsyncGenerator[bytes, None], stack: AsyncExitStack, send_seconds: float) -> None:
        self._events, self._stack, self._seconds = events, stack, send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        del scope

        # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that comes as the awaited thing ends, and the
        # stream of a client that left then goes on to its last token.
        async def sending(message: Message) -> None:
            with anyio.fail_after(self._seconds):
                await send(message)

        # Not left to the generator: one that was never begun runs no code when it is closed.
        async with self._stack:
            with contextlib.suppress(ClientLeft, OSError):  # a TimeoutError is an OSError
                await unless_left(receive, self._stream(sending))

    async def _stream(self, send: Callable[[Message], Awaitable[None]]) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        async with contextlib.aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for part in events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: Any, name: str | None = None) -> bytes:
    """Return an event with JSON data."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """Return the event of an error inside a stream, and log what the client is not told."""
    if error.__cause__ is not None and error.status >= 500:
        LOG.error("in a stream: %s", error.__cause__)
    return event(error.body)

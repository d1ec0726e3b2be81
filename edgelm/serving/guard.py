"""Checks before any endpoint runs: the host, the web page, the key, and the size of the body.

Everything here answers in OpenAI's form of errors. It is plain ASGI, so that streams and disconnects pass unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response

from edgelm.serving.api.answers import as_json
from edgelm.serving.api.errors import ApiError
from edgelm.serving.settings import Limits, Settings, owner

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What the header `Host` may be where the server can only be reached from this machine."""


@dataclass(frozen=True)
class Client:
    """Who sent a request.

    Attributes:
        name: the name of the key; without keys the address.
    """

    name: str


def error_response(error: ApiError) -> Response:
    """Return the HTTP answer of an error."""
    return Response(as_json(error.body), error.status, error.headers, "application/json")


def host_name(header: str) -> str:
    """Return the name in a header `Host`, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Guard:
    """Passes on the requests that are allowed.

    Args:
        app: the application behind it.
        settings: settings of the server.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, open_paths: Sequence[str]) -> None:
        self._app, self._settings, self._open = app, settings, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            scope.setdefault("state", {})["client"] = self._client(scope, Headers(scope=scope))
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _client(self, scope: Scope, headers: Headers) -> Client:
        settings, host = self._settings, headers.get("host", "")
        if settings.hosts is not None and host_name(host) not in settings.hosts:
            raise ApiError(403, f"this server is not called {host_name(host)!r:.100}: it answers on this machine only")
        origin = headers.get("origin")
        if origin is not None and origin not in settings.origins and origin.partition("://")[2] != host:
            raise ApiError(403, f"the web page {origin!r:.100} may not use this server (--allow-origin)")
        address = scope["client"][0] if scope.get("client") else ""
        if not settings.keys or scope["path"] in self._open:
            return Client(str(address))
        return Client(self._key_owner(headers))

    def _key_owner(self, headers: Headers) -> str:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        given = secret.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        name = owner(self._settings.keys, given)
        if name is None:
            what = "this key is not known" if given else "a key is needed, as `Authorization: Bearer KEY`"
            raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return name


async def read_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """Receive a body.

    Raises:
        ApiError: it is too large, too slow, or not declared as JSON.
    """
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body's Content-Type is {kind!r:.100}: send application/json")
    declared = headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > limits.body_bytes:
        raise _too_large(limits)
    try:
        with anyio.fail_after(limits.body_seconds):
            return await _receive_body(receive, limits)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None


async def _receive_body(receive: Receive, limits: Limits) -> bytes:
    parts, size = [], 0
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limits.body_bytes:
            raise _too_large(limits)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes", code="request_too_large")

"""The application: routes, checks of every request, and its life from start to end. Any ASGI server can run it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from edgelm.errors import EdgeLMError
from edgelm.serving.api.answers import as_json
from edgelm.serving.api.errors import ApiError
from edgelm.serving.api.openapi import Operation, document
from edgelm.serving.api.reading import read_body
from edgelm.serving.endpoints.operations import OPERATIONS
from edgelm.serving.events import ClientLeft, unless_left
from edgelm.serving.guard import Guard, error_response
from edgelm.serving.guard import read_body as receive_body
from edgelm.serving.page import load_page
from edgelm.serving.service import Service
from edgelm.serving.settings import Settings

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LOG = logging.getLogger("edgelm.serving")


class Endpoint:
    """An operation as an ASGI application: reads the request, runs the operation's function, sends its answer.

    Args:
        operation: the operation.
        service: what its function gets.
    """

    def __init__(self, operation: Operation, service: Service) -> None:
        self._operation, self._service = operation, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        operation, metrics, began = self._operation, self._service.metrics, time.monotonic()
        try:
            body = None
            if operation.request is not None:
                data = await receive_body(scope, receive, self._service.settings.limits)
                body = read_body(operation.request, data)
            answer = await unless_left(receive, self._call(body, scope))
        except ClientLeft:
            metrics.request(operation.path, 499)
            return
        except ApiError as error:
            if error.__cause__ is not None and error.status >= 500:
                LOG.error("%s: %s", operation.path, error.__cause__)
            answer = error_response(error)
        except EdgeLMError as error:
            LOG.error("%s: %s", operation.path, error)
            answer = error_response(ApiError(500, "the server failed; its log has the reason"))
        except Exception:  # a fault of ours: the client gets an answer, the log the traceback
            LOG.exception("unexpected error in %s", operation.path)
            answer = error_response(ApiError(500, "the server failed; its log has the reason"))
        if is_dataclass(answer):
            answer = Response(as_json(answer), media_type="application/json")
        metrics.request(operation.path, answer.status_code)
        await answer(scope, receive, send)
        seconds, client = time.monotonic() - began, scope["state"]["client"].name
        LOG.info("%s %s %d, %s, %.3f s", operation.method, operation.path, answer.status_code, client, seconds)

    async def _call(self, body: Any, scope: Scope) -> Any:
        client = scope["state"]["client"]
        if self._operation.query:
            query = Request(scope).query_params
            known = {name for name, _ in self._operation.query}
            for name in query:
                if name not in known:
                    raise ApiError(400, f"{name!r:.60} is not a parameter of this address", param=name[:60])
            return await self._operation.endpoint(self._service, {name: query.get(name) for name in known}, client)
        if self._operation.request is None:
            return await self._operation.endpoint(self._service, client)
        return await self._operation.endpoint(self._service, body, client)


def create_app(settings: Settings, operations: Sequence[Operation] = OPERATIONS) -> Starlette:
    """Return the application of a server.

    It loads the models in its lifespan. It holds all of its state, so a process may have several, and Ray Serve can
    wrap it (`ray.serve.ingress`). `app.state.service` is its `Service`.

    Args:
        settings: settings of the server.
        operations: what it can do.

    Raises:
        EdgeLMError: a model's folder is not a bundle, or the folder of computed prompts cannot be used.
    """
    service = Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    described = as_json(document(operations, keys=bool(settings.keys)))

    async def openapi(_: Request) -> Response:
        return Response(described, media_type="application/json")

    async def page(_: Request) -> Response:
        html, headers = load_page()
        return Response(html, headers=headers)

    async def no_method(request: Request, _: Exception) -> Response:
        path = request.url.path
        methods = sorted({one.method for one in operations if one.path == path}) or ["GET"]
        message = f"{path!r:.100} has no {request.method!r:.20}, but {' and '.join(methods)}"
        return error_response(ApiError(405, message, headers={"Allow": ", ".join(methods)}))

    routes = [Route(one.path, Endpoint(one, service), methods=[one.method]) for one in operations]
    routes += [Route("/", page), Route("/openapi.json", openapi)]
    open_paths = ["/", "/openapi.json", *(one.path for one in operations if one.open)]
    middleware = [Middleware(Guard, settings=settings, open_paths=open_paths)]
    if settings.origins:
        # The first one, since preflights have no key.
        cors = Middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={404: _not_found, 405: no_method}
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def _not_found(request: Request, _: Exception) -> Response:
    return error_response(ApiError(404, f"there is nothing at {request.url.path!r:.100}; /openapi.json lists all"))

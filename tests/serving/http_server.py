"""A server in a thread, on a free port of this machine, for tests."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from edgelm.serving.app import create_app
from edgelm.serving.service import Service
from edgelm.serving.settings import Settings


class HttpServer:
    """Runs in its `with` block.

    Attributes:
        url: address of the server.
        service: its state.
    """

    def __init__(self, settings: Settings) -> None:
        self._app = create_app(settings)
        self.service: Service = self._app.state.service
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self._app, http="h11", ws="none", lifespan="on", log_config=None, timeout_graceful_shutdown=10
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _run(self) -> None:
        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            await self._server.serve([self._socket])

        asyncio.run(serve())

    def __enter__(self) -> HttpServer:
        self._thread.start()
        until = time.monotonic() + 120
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            assert time.monotonic() < until, "the server takes too long to start"
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive(), "the server does not end"
        self._socket.close()

    def post(self, path: str, data: Any, **headers: str) -> httpx.Response:
        """Send JSON."""
        return self.client.post(path, json=data, headers=headers)

    def answer(self, path: str, data: Any) -> Any:
        """Send JSON, and return the JSON of the answer, which has to be a success."""
        response = self.post(path, data)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path: str, data: Any, status: int = 400) -> Any:
        """Send JSON, and return the error of the answer."""
        response = self.post(path, data)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, path: str, data: Any) -> list[Any]:
        """Ask for a stream, and return the JSON of its events; the last one has to be [DONE]."""
        with self.client.stream("POST", path, json={**data, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = response.read().decode()
        parts = [part for part in text.split("\n\n") if part and not part.startswith(":")]
        assert parts.pop() == "data: [DONE]"
        assert all(part.startswith("data: ") and "\n" not in part for part in parts)
        return [json.loads(part.removeprefix("data: ")) for part in parts]

    def wait(self, condition: Any, seconds: float = 30) -> None:
        """Wait until `condition()` is true."""
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it did not happen in time"
            time.sleep(0.01)

"""What all endpoints share: models, limits, running requests, and the end of the server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from edgelm.serving.api.errors import ApiError
from edgelm.serving.guard import Client
from edgelm.serving.metrics import Metrics
from edgelm.serving.models import Models
from edgelm.serving.parity import ParityChecks
from edgelm.serving.settings import Settings
from edgelm.serving.tracing import Tracer


class Failing(Protocol):
    """A generation that has not ended."""

    def fail(self, error: ApiError) -> None:
        """End it with an error."""


class Service:
    """The state of one server.

    Attributes:
        settings: its settings.
        models: its models.
        metrics: its figures.
        closing: whether it is being stopped: new requests are refused.
        tracer: hidden states of the models.
        parity: their parity checks.
        runs: generations that have not ended.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self.metrics = Metrics()
        self.tracer = Tracer(settings.loading.get("threads"))
        self.parity = ParityChecks({name: settings.loading.get(name) for name in ("threads", "kv")})
        self.closing = False
        self.runs: set[Failing] = set()
        self._active: Counter[str] = Counter()

    async def start(self) -> None:
        """Load the models, if the settings say so.

        Raises:
            EdgeLMError: a model cannot be loaded.
        """
        held = 0
        for model in self.models.all.values() if self.settings.preload else ():
            held += model.needed_bytes
            if self.settings.memory is not None and held > self.settings.memory:
                break  # the others are loaded with their first request
            try:
                await self.models.load(model)
            except ApiError:
                if model.problem is not None:
                    raise model.problem from None
                raise

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self._active.total()

    def deadline(self) -> float:
        """Return the time, as `time.monotonic`, when a request of now has to be answered."""
        return time.monotonic() + self.settings.limits.seconds

    @contextlib.contextmanager
    def admitted(self, client: Client) -> Iterator[None]:
        """Count a request for the block.

        Raises:
            ApiError: the server is being stopped, or the client has too many requests.
        """
        if self.closing:
            raise ApiError(503, "this server is being stopped", code="closing", headers={"Retry-After": "10"})
        most = self.settings.limits.per_key
        if self._active[client.name] >= most:
            raise ApiError(
                429, f"{most} requests of this client are running, the most here: wait for one to end",
                code="rate_limit_exceeded", headers={"Retry-After": "1"},
            )  # fmt: skip
        self._active[client.name] += 1
        try:
            yield
        finally:
            self._active[client.name] -= 1
            if not self._active[client.name]:
                del self._active[client.name]

    async def stop(self) -> None:
        """Refuse new requests, and wait for the running ones; then end them with an error."""
        self.closing = True
        until = time.monotonic() + self.settings.finish_seconds
        while self.active and time.monotonic() < until:
            await asyncio.sleep(0.05)
        for run in list(self.runs):
            run.fail(ApiError(503, "this server was stopped before the answer was complete", code="closing"))

    async def close(self) -> None:
        """Unload the models."""
        self.closing = True
        self.parity.close()
        await asyncio.to_thread(self.tracer.close)
        await self.models.close()

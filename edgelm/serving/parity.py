"""Parity checks of the served models on demand, and their last reports."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edgelm.errors import EdgeLMError
from edgelm.progress import Advance, Silent
from edgelm.serving.api.answers import ParityState
from edgelm.serving.api.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgelm.serving.models import ServedModel


class _Stoppable(Silent):
    """Ends a check when the server is stopped."""

    def __init__(self, stopped: threading.Event) -> None:
        self._stopped = stopped

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        del label, total, unit

        def advance(amount: float) -> None:
            del amount
            if self._stopped.is_set():
                raise EdgeLMError("the server was stopped")

        yield advance


class ParityChecks:
    """The last report of each model, and the check that runs: one at a time.

    Args:
        options: options of `check_parity`: threads and kv.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._last: dict[str, ParityState] = {}
        self._running: tuple[str, asyncio.Future[None]] | None = None
        self._stopped = threading.Event()

    def state(self, model: ServedModel) -> ParityState:
        """Return the last report of a model."""
        last = self._last.get(model.name, ParityState(model.name, False, None))
        running = self._running is not None and self._running[0] == model.name
        return ParityState(model.name, running, last.report, last.sentence, None if running else last.error)

    async def run(self, model: ServedModel, runtime: str | None) -> ParityState:
        """Check a model, and return when that is done; if it is being checked already, return at once.

        A client that leaves does not end the check.

        Raises:
            ApiError: another model is being checked.
        """
        if self._running is not None:
            if self._running[0] == model.name:
                return self.state(model)
            raise ApiError(409, f"{self._running[0]} is being checked: try again later")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running = (model.name, done)
        loop = asyncio.get_running_loop()

        def work() -> None:
            state = self._checked(model, runtime)
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(self._finish, state, done)

        # Not of a pool: those are waited for when the process ends.
        threading.Thread(target=work, name="edgelm-parity", daemon=True).start()
        await asyncio.shield(done)
        return self.state(model)

    def _finish(self, state: ParityState, done: asyncio.Future[None]) -> None:
        self._last[state.model], self._running = state, None
        done.set_result(None)

    def _checked(self, model: ServedModel, runtime: str | None) -> ParityState:
        from edgelm.parity.check import check_parity

        try:
            report = check_parity(
                model.bundle.path, runtime=runtime, progress=_Stoppable(self._stopped), **self._options
            )
        except EdgeLMError as error:
            return ParityState(model.name, False, None, None, _without(model.hidden, str(error)))
        data = _without(model.hidden, {**report.to_dict(), "bundle": model.name})
        return ParityState(model.name, False, data, report.sentence)

    def close(self) -> None:
        """End the running check."""
        self._stopped.set()


def _without(hidden: Mapping[str, str], value: Any) -> Any:
    """Return JSON data with paths of the server's disk replaced."""
    if isinstance(value, str):
        for path, name in hidden.items():
            value = value.replace(path, name)
        return value
    if isinstance(value, dict):
        return {key: _without(hidden, item) for key, item in value.items()}
    return [_without(hidden, item) for item in value] if isinstance(value, list) else value

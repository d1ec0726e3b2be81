"""Queue of the calls that use a model: one runs at a time, in the order of arrival.

A call of `generate` has the model until it returns, a stream from its first text until it is exhausted, closed or
garbage collected. The others wait. A thread or asyncio task that has a stream open and makes another call would wait
for itself forever: that call raises an error instead.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from contextvars import ContextVar
from typing import Any

from edgelm.errors import EdgeLMError, GenerationError

# The turns begun in this context. A thread pool (Starlette's, `asyncio.to_thread`) runs each step of a stream in a
# separate context. Its thread may just have served another stream, so the thread's id alone does not show a deadlock.
_BEGUN: ContextVar[tuple[Turn, ...]] = ContextVar("edgelm_turns", default=())


class TurnLeft(Exception):  # noqa: N818 - internal
    """The call was ended while it waited or computed."""


class Turns:
    """The queue of one model."""

    def __init__(self) -> None:
        # Reentrant: while it is held, a garbage collection may end a stream.
        self._mutex = threading.RLock()
        self._queue: deque[Turn] = deque()
        self._closed = False

    def require_open(self) -> None:
        """Raise EdgeLMError if the model was closed."""
        if self._closed:
            raise EdgeLMError("this model was closed: load the bundle again")

    def close(self) -> None:
        """End all calls, and return when none computes any more.

        Raises:
            EdgeLMError: a call computes in this thread, which happens when a signal handler closes the model.
        """
        with self._mutex:
            first = self._queue[0] if self._queue else None
            if first is not None and first.computing and first._thread == threading.get_ident():
                raise EdgeLMError("this model is generating in this thread: close it afterwards")
            self._closed = True
            for turn in self._queue:
                turn._called.set()
        if first is not None:
            with first._using:
                pass  # wait for the end of its step

    def _join(self, turn: Turn) -> None:
        """Append a turn to the queue.

        Raises:
            EdgeLMError: the model was closed.
            GenerationError: deadlock: the first in the queue waits for the caller that makes this call.
        """
        if self._deadlock(turn) is not None:
            gc.collect()  # ends streams that are no longer referenced
            why = self._deadlock(turn)
            if why is not None:
                raise GenerationError(why)
        with self._mutex:
            self.require_open()
            self._queue.append(turn)
            if self._queue[0] is turn:
                turn._called.set()

    def _deadlock(self, turn: Turn) -> str | None:
        """Return why a turn would wait forever; None where it would not."""
        with self._mutex:
            first = self._queue[0] if self._queue else None
        if first is None:
            return None
        advice = "exhaust it, or close() it, before the next call"
        if turn.task is not None:
            return f"a stream of this model is open in this task: {advice}" if first.task is turn.task else None
        if first.task is not None:
            if _running_loop() is not first.task.get_loop():
                return None
            return (
                "an async stream of this model is open in the event loop of this thread, which this call would block: "
                "await generate_async or chat_async, or use `async for`"
            )
        # The main thread runs only one caller, whatever the context.
        main = threading.current_thread() is threading.main_thread()
        if first._thread == threading.get_ident() and (main or first in _BEGUN.get()):
            return f"a stream of this model is open in this thread: {advice}"
        return None

    def _leave(self, turn: Turn) -> None:
        with self._mutex:
            if turn in self._queue:
                self._queue.remove(turn)
                if self._queue:
                    self._queue[0]._called.set()


def _running_loop() -> Any:
    """Return the event loop that runs in this thread; None where there is none."""
    asyncio = sys.modules.get("asyncio")  # not imported here: programs without asyncio need not load it
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except RuntimeError:
        return None


class Turn:
    """A call's place in the queue. It joins the queue with its first step and has the model until `end`.

        turn.begin()                 # waits until it is this call's turn
        try: ...                     # use the model; call `check()` between parts
        finally: turn.pause()

    Attributes:
        task: the asyncio task for which a worker thread runs the steps; None where the caller runs them itself.
        computing: whether a step is running.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.task: Any = None
        # Held while the call computes or waits. Reentrant: a signal handler may end the call of its own thread.
        self._using = threading.RLock()
        self._called = threading.Event()
        self._joined = self.computing = self._left = False
        self._thread = 0

    def begin(self) -> None:
        """Begin a step; wait until it is this call's turn.

        Raises:
            TurnLeft: the call was ended, possibly while it waited.
            EdgeLMError: the model was closed.
            GenerationError: it would wait for its own caller.
        """
        self._using.acquire()
        try:
            if self.computing:
                raise GenerationError("this stream is being read already: a signal handler cannot read it too")
            self._wait()
            self.computing = True
        except BaseException:
            self._using.release()
            raise

    def _wait(self) -> None:
        if self._left:
            raise TurnLeft
        if not self._joined:
            self._turns._join(self)
            self._joined = True
        try:
            self._called.wait()
            self.check()
        except BaseException:
            self.end()
            raise
        self._thread = threading.get_ident()
        if self.task is None and self not in (begun := _BEGUN.get()):
            _BEGUN.set((*(turn for turn in begun if not turn._left), self))

    def pause(self) -> None:
        """End a step. The call keeps its turn until `end`."""
        self.computing = False
        if self._left:
            self._turns._leave(self)
        self._using.release()

    def check(self) -> None:
        """Check between parts of a step that the call may go on.

        Raises:
            TurnLeft: the call was ended.
            EdgeLMError: the model was closed.
        """
        self._turns.require_open()
        if self._left:
            raise TurnLeft

    def leave(self) -> None:
        """End the call as soon as possible, without waiting for its running step."""
        self._left = True
        self._called.set()

    def end(self) -> None:
        """Wait for a step that runs in another thread, then end the call. The next in the queue has its turn."""
        self.leave()
        with self._using:
            if not self.computing:
                self._turns._leave(self)

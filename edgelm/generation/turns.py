"""Who may use a model: one call at a time, in the order in which they came.

A call of `generate` has its turn until it returns, a stream from its first piece until it is exhausted, closed or
garbage collected. The others wait. A thread (or a task of asyncio) that has a stream open and makes another call would
wait for itself: it gets an error instead.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from contextvars import ContextVar
from typing import Any

from edgelm.errors import EdgeLMError, GenerationError

# The turns begun in this context. A pool of threads (Starlette's, `asyncio.to_thread`) runs each piece of a stream in a
# context of its own, perhaps in the thread that has just served another stream, and then nobody waits for itself.
_BEGUN: ContextVar[tuple[Turn, ...]] = ContextVar("edgelm_turns", default=())


class TurnLeft(Exception):  # noqa: N818 - never seen outside
    """The call was given up while it waited or computed."""


class Turns:
    """The queue of one model."""

    def __init__(self) -> None:
        # Reentrant: a garbage collection in the middle of what follows may end a stream.
        self._mutex = threading.RLock()
        self._queue: deque[Turn] = deque()
        self._closed = False

    def require_open(self) -> None:
        """Raise EdgeLMError if the model was closed."""
        if self._closed:
            raise EdgeLMError("this model was closed: load the bundle again")

    def close(self) -> None:
        """Let no call begin or go on; return when none computes.

        Raises:
            EdgeLMError: one computes in this very thread (a signal handler closes the model).
        """
        with self._mutex:
            first = self._queue[0] if self._queue else None
            if first is not None and first.computing and first._thread == threading.get_ident():
                raise EdgeLMError("this model computes in this thread: close it after the call")
            self._closed = True
            for turn in self._queue:
                turn._called.set()
        if first is not None:
            with first._using:
                pass  # its step is over

    def _join(self, turn: Turn) -> None:
        """Put a turn last in the queue.

        Raises:
            EdgeLMError: the model was closed.
            GenerationError: the first in the queue ends only when its caller goes on, who is this one.
        """
        if self._why_endless(turn) is not None:
            gc.collect()  # a stream that nobody can reach any more does not count
            why = self._why_endless(turn)
            if why is not None:
                raise GenerationError(why)
        with self._mutex:
            self.require_open()
            self._queue.append(turn)
            if self._queue[0] is turn:
                turn._called.set()

    def _why_endless(self, turn: Turn) -> str | None:
        """Why a turn would wait for ever, None where it would not."""
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
        # Nobody else goes on in the main thread, in whatever context.
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
    """The event loop that runs in this thread, None where there is none."""
    asyncio = sys.modules.get("asyncio")  # not imported for those who do not use it
    try:
        return None if asyncio is None else asyncio.get_running_loop()
    except RuntimeError:
        return None


class Turn:
    """One call's place in the queue: it joins with its first step and keeps its turn until `end`.

        turn.begin()                 # waits for the turn, if this call does not have it yet
        try: ...                     # uses the model; `check()` now and then
        finally: turn.pause()

    `task`: the task of asyncio for which a worker thread makes the steps, None where the caller makes them itself.
    `computing`: whether a step is under way.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.task: Any = None
        # Held while it computes or waits; reentrant, since a signal handler may end the call of its own thread.
        self._using = threading.RLock()
        self._called = threading.Event()
        self._joined = self.computing = self._left = False
        self._thread = 0

    def begin(self) -> None:
        """Begin a step.

        Raises:
            TurnLeft: the call was ended, perhaps while it waited here.
            EdgeLMError: the model was closed.
            GenerationError: it would wait for its own caller.
        """
        self._using.acquire()
        try:
            if self.computing:
                raise GenerationError("this stream is being read: a signal handler cannot read it, too")
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
        """End a step; the turn stays this call's until `end`."""
        self.computing = False
        if self._left:
            self._turns._leave(self)
        self._using.release()

    def check(self) -> None:
        """Between parts of a step: whether to go on.

        Raises:
            TurnLeft: the call was ended.
            EdgeLMError: the model was closed.
        """
        self._turns.require_open()
        if self._left:
            raise TurnLeft

    def leave(self) -> None:
        """End the call as soon as may be, without waiting for the step that runs."""
        self._left = True
        self._called.set()

    def end(self) -> None:
        """End the call: the next in the queue has its turn. A step that runs in another thread is waited for."""
        self.leave()
        with self._using:
            if not self.computing:
                self._turns._leave(self)

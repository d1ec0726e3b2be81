"""Ctrl-C from a command's first instruction to its last.

A KeyboardInterrupt during imports (a quarter of a second) or at exit shows a traceback, or looks like another error. So
Ctrl-C ends the process at once, except while a verb runs, which may have to clean up.

Until `leave_at_once` is called, Python handles Ctrl-C. To call it early, neither this module nor `edgelm` itself
imports `typing`, which alone takes as long as the rest of Python's start.
"""

from __future__ import annotations

import os

INTERRUPTED = 130


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


try:
    import signal
except KeyboardInterrupt:
    _leave()

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


def leave_at_once() -> None:
    """Let Ctrl-C end the process from now on, unless the parent process ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


class Raised:
    """Context in which Ctrl-C raises KeyboardInterrupt again, if `leave_at_once` was called before."""

    def __enter__(self) -> None:
        self._ours = signal.getsignal(signal.SIGINT) is _leave
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, _leave)

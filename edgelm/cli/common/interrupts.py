"""Ctrl-C from a command's first instruction to its last.

Importing takes a quarter of a second, and exiting a while: a KeyboardInterrupt there shows a traceback, or is taken for
another error. So Ctrl-C ends the process at once, but where a verb runs, which may have something to clean up.

Until `leave_at_once` is called Ctrl-C is Python's own. So that this is soon, neither this module nor `edgelm` itself
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
    """From now on Ctrl-C ends the process, unless whoever started it ignores Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


class Raised:
    """Inside, Ctrl-C is a KeyboardInterrupt, if `leave_at_once` was called before."""

    def __enter__(self) -> None:
        self._ours = signal.getsignal(signal.SIGINT) is _leave
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, _leave)

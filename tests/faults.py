"""Fault injection: kill or interrupt a child process at its n-th operation that changes or syncs files."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from edgelm import files

OPERATIONS = (
    *("open", "mkdir", "rename", "replace", "unlink", "remove", "rmdir", "symlink", "link", "fsync", "scandir"),
    *("write", "pwrite", "truncate", "ftruncate", "sendfile", "copy_file_range"),
)
KILL, BEFORE, AFTER = "kill", "interrupt before", "interrupt after"
"""Kinds of faults: a kill before an operation, and Ctrl-C before or after it. A kill after an operation has the same
effect on files as a kill before the next one."""
_PATIENCE = 120  # time limit of a child in seconds
MODES = (KILL, BEFORE, AFTER)


class Interrupter:
    """Counts file operations while it is active, and injects the fault `mode` at number `at`."""

    def __init__(self, at: int | None = None, mode: str = KILL) -> None:
        self.at = at
        self.mode = mode
        self.log: list[str] = []

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            here = len(self.log) == self.at
            self.log.append(f"{name} {arguments[0] if arguments else ''}")
            if here and self.mode == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if here and self.mode == BEFORE:
                raise KeyboardInterrupt
            result = real(*arguments, **options)
            if here:
                if name in ("open", "create"):  # the result is lost, as when a signal arrives before it is assigned
                    result.close() if hasattr(result, "close") else os.close(result)
                raise KeyboardInterrupt
            return result

        return operation

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        create = self._around("create", real)

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            # Reads are not counted: they change nothing, and other threads read at the same time.
            return (real if mode in ("r", "rb") else create)(file, mode, *arguments, **options)

        return opened

    @contextlib.contextmanager
    def active(self, *, exchange: bool = True) -> Iterator[None]:
        """Intercept file operations. Without `exchange`, exchanging two names fails as on an old file system."""
        with contextlib.ExitStack() as stack:
            for name in OPERATIONS:
                # fsync does not change what a kill leaves, so it is skipped.
                real = _no_fsync if name == "fsync" else getattr(os, name)
                stack.enter_context(mock.patch.object(os, name, self._around(name, real)))
            stack.enter_context(mock.patch.object(fcntl, "flock", self._around("flock", fcntl.flock)))
            stack.enter_context(mock.patch.object(io, "open", self._opening(io.open)))
            exchanged = self._around("exchange", files._exchange) if exchange else lambda one, other: False
            stack.enter_context(mock.patch.object(files, "_exchange", exchanged))
            yield


def _no_fsync(descriptor: int) -> None:
    del descriptor


def in_child(work: Callable[[], object]) -> int | str:
    """Run `work` in a forked child; return "killed", "interrupted", its exit status, or a traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = b""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_PATIENCE)
        try:
            work()
        except KeyboardInterrupt:
            said = b"interrupted"
        except BaseException:  # reported by the parent
            said = traceback.format_exc().encode()
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    return said or os.waitstatus_to_exitcode(status)


def operations(work: Callable[[], object], *, exchange: bool = True) -> list[str]:
    """Return the file operations of `work` without a fault."""
    counter = Interrupter()
    with counter.active(exchange=exchange):
        work()
    return counter.log


def interrupted_at(work: Callable[[], object], at: int, mode: str, *, exchange: bool = True) -> int | str:
    """Run `work` with a fault at operation number `at`; returns as `in_child`."""

    def faulty() -> None:
        with Interrupter(at, mode).active(exchange=exchange):
            work()

    return in_child(faulty)


def can_exchange(folder: Path) -> bool:
    """Return whether this system and file system can exchange two names."""
    one, other = folder / "one", folder / "other"
    one.mkdir()
    other.mkdir()
    found = hasattr(ctypes.CDLL(None), "renameat2") and files._exchange(one, other)
    one.rmdir()
    other.rmdir()
    return found

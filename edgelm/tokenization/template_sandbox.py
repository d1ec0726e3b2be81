"""Renders chat templates in a process of its own, which can neither hang, nor fill memory, nor touch the machine.

Templates are programs that come with checkpoints. jinja2's sandbox keeps them from Python's internals, but not from
comparing nested lists for ever inside C, where no signal is heeded, nor from making a text of a terabyte. Counting what
they do inside this process never caught all of it. So a process renders them (`template_worker`) that the operating
system limits: memory, CPU time, files, processes. It is started once, kept, and replaced when a template ran into a
limit. While it works the caller waits, and can be interrupted by Ctrl-C and SIGTERM; the process is then ended.

It ends with the process that started it: its input ends then, and a rendering ends with its CPU time.

On Windows, which has no such limits, CPU time and memory are bounded only by the time after which the process is ended;
on macOS memory is.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from edgelm.errors import GenerationError
from edgelm.tokenization.template_worker import Answer

CPU_SECONDS = 2.0
WALL_SECONDS = 30.0
"""Of one rendering: longer than its CPU time, because a busy machine takes longer."""
START_SECONDS = 60.0
MEMORY = 256 << 20
"""Bytes of address space; Python and jinja2 take some 30 MB of it."""
MAX_OUTPUT = 8 << 20
"""Characters."""
MAX_REQUEST = 64 << 20
"""Bytes of a conversation and its template."""

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
"""Where a folder keeps templates; see `template_files`."""

_WORKER = Path(__file__).with_name("template_worker.py")
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


class _Ended(Exception):  # noqa: N818 - never leaves this module
    """The process ended or was ended. `limit`: which limit that was, None where it is not known to be one."""

    def __init__(self, code: int | None, limit: str | None) -> None:
        super().__init__(
            f"it ended by signal {-code}" if code is not None and code < 0 else f"it ended with code {code}"
        )
        self.limit = limit


def _folders() -> list[str]:
    """Where jinja2 and markupsafe lie. They are not imported here, which takes a tenth of a second."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GenerationError(f"chat templates need {name}, which is not installed: pip install {name}")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


class _Process:
    """One process, and the protocol of `template_worker`.

    Attributes:
        owing: an answer is still to come, of a request that was interrupted: the process cannot be asked again.
    """

    def __init__(self, memory: int, cpu_seconds: float) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise GenerationError(
                "chat templates are rendered in a Python process of their own, and this program has no Python "
                "interpreter to start: set sys.executable to one, or render the prompt yourself and use generate"
            )
        limits = [str(memory), str(cpu_seconds), str(MAX_OUTPUT)]
        command = [sys.executable, "-I", "-S", "-B", str(_WORKER), *limits, *_folders()]
        self._ready = False
        self._late = False
        self.owing = False
        try:
            # A session of its own: a terminal's Ctrl-C is for this process alone.
            self._popen = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise GenerationError(f"{sys.executable} cannot be started to render chat templates: {error}") from error

    @property
    def pid(self) -> int:
        return self._popen.pid

    def ask(self, request: bytes, seconds: float) -> bytes:
        """The answer to a request, within some seconds. Raises `_Ended`."""
        if not self._ready:
            self._within(START_SECONDS, b"")
            self._ready = True
        return self._within(seconds, len(request).to_bytes(4, "big") + request)

    def _within(self, seconds: float, message: bytes) -> bytes:
        # A read that is waiting can be interrupted by signals, but not by another thread: so the process is ended.
        self._late, self.owing = False, True
        clock = threading.Timer(seconds, self._end_late)
        clock.daemon = True
        clock.start()
        try:
            self._write(message)
            length = int.from_bytes(self._read(4), "big")
            if length > 4 * MAX_OUTPUT + 1:
                self.end()
                raise _Ended(None, "a longer answer than it may give")
            answer = self._read(length)
            self.owing = False
            return answer
        except OSError:
            raise self._ended() from None
        finally:
            clock.cancel()

    def _end_late(self) -> None:
        self._late = True
        self._popen.kill()

    def _write(self, message: bytes) -> None:
        assert self._popen.stdin is not None
        view = memoryview(message)
        while view:
            view = view[self._popen.stdin.write(view) :]

    def _read(self, count: int) -> bytes:
        assert self._popen.stdout is not None
        parts = []
        while count:
            part = self._popen.stdout.read(min(count, 1 << 20))
            if not part:
                raise self._ended()
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _ended(self) -> _Ended:
        self.end()
        code = self._popen.returncode
        if code == -getattr(signal, "SIGPROF", 0):
            return _Ended(code, "more CPU time than it may have")
        return _Ended(code, "more time than it may have" if self._late else None)

    def kill(self) -> None:
        """End the process; whoever waits for its answer learns of it."""
        self._popen.kill()

    def end(self) -> None:
        """End the process and wait for it."""
        self.kill()
        self.close()
        self._popen.wait()

    def close(self) -> None:
        """Close the pipes."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()

    def forget(self) -> None:
        """In a fork of the process that started this one: it is not ours to use or wait for."""
        self._popen.returncode = 0
        self.close()


class Sandbox:
    """A process that is started when it is first needed, and again when it has ended. Threads take turns.

    Args:
        memory: bytes of address space.
        cpu_seconds: CPU time of one rendering.
        wall_seconds: after which it is ended however little CPU time it had.
    """

    def __init__(
        self, memory: int = MEMORY, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS
    ) -> None:
        self._memory, self._cpu_seconds, self._wall_seconds = memory, cpu_seconds, wall_seconds
        self._lock = threading.Lock()
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, if there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process without waiting for it, so that it is ready when the first template comes.

        Raises:
            GenerationError: there is no Python interpreter or jinja2 to start.
        """
        with self._lock:
            self._started()

    def ask(self, source: str, given: dict[str, Any] | None) -> tuple[bytes, str]:
        """Render a template with variables; with None only check it.

        Returns:
            A letter of `template_worker.Answer`, and the text that belongs to it.

        Raises:
            GenerationError: the process cannot be started, or the variables are no JSON or too large.
        """
        request = _request(source, given)
        with self._lock:
            try:
                answer = self._ask(request)
            except _Ended as ended:
                self._process = None
                return Answer.LIMIT, ended.limit or f"more than its process survives ({ended})"
            except BaseException:  # Ctrl-C among others: the answer is still to come, and nobody will read it
                self._end()
                raise
            if answer[:1] == Answer.LIMIT:
                # What is left of its memory is not known.
                self._end()
            return answer[:1], answer[1:].decode("utf-8", "surrogatepass")

    def _ask(self, request: bytes) -> bytes:
        try:
            return self._started().ask(request, self._wall_seconds)
        except _Ended as ended:
            if ended.limit is not None:
                raise
        # Something ended it, perhaps long ago: it is no fault of this template unless that happens again.
        self._process = None
        return self._started().ask(request, self._wall_seconds)

    def _started(self) -> _Process:
        if self._process is not None and self._process.owing:
            self._end()  # a second Ctrl-C came before the first one had ended it
        if self._process is None:
            self._process = _Process(self._memory, self._cpu_seconds)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def close(self) -> None:
        """End the process. Another one is started if need be."""
        process = self._process
        if process is not None:
            # Without the lock: whoever has it may wait for long, and finds the process ended now.
            process.kill()
        with self._lock:
            if self._process is process:
                self._end()

    def forget(self) -> None:
        """In a fork of this process: the one that renders belongs to the parent."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.forget()
            self._process = None


def _request(source: str, given: dict[str, Any] | None) -> bytes:
    try:
        text = json.dumps({"source": source, "given": given}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"messages and variables of a chat template must be JSON: {error}") from error
    request = text.encode("utf-8", "surrogatepass")
    if len(request) > MAX_REQUEST:
        raise GenerationError(f"a conversation of {len(request)} bytes: at most {MAX_REQUEST} are rendered")
    return request


SANDBOX = Sandbox()
"""The one that all templates of this process share."""


def start_for(folder: Path) -> None:
    """Start its process without waiting for it, if a checkpoint's or bundle's folder is likely to have a template.

    Importing this module is cheap, so that this can be the first thing that is done.
    """
    try:
        likely = (folder / FILE).is_file() or b'"chat_template"' in _beginning(folder / SETTINGS)
    except (OSError, ValueError):
        return
    if likely:
        # Should it not start, the first conversation says why.
        with contextlib.suppress(GenerationError):
            SANDBOX.start()


def _beginning(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as stream:
        return stream.read(16 << 20)


atexit.register(SANDBOX.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SANDBOX.forget)

"""Render chat templates in a separate process with limits on time, memory, files and processes.

Templates are programs that come with checkpoints. jinja2's sandbox protects Python's internals. But a template can
still compare nested lists forever inside C code, where no signal is handled, or build a string of a terabyte. So
another process renders them (`template_worker`), limited by the operating system. It is started once and kept, and
replaced after a template has exceeded a limit. The caller waits for it, and can be interrupted by Ctrl-C and SIGTERM,
which end the process.

The process also ends with the one that started it: its input is then closed, and a running template ends with its CPU
time.

Windows has no such limits: there, the wall time alone bounds CPU time and memory. On macOS it bounds memory.
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
"""Wall time of one rendering. It is longer than the CPU time, since a busy machine takes longer."""
START_SECONDS = 60.0
MEMORY = 256 << 20
"""Bytes of address space, of which Python and jinja2 take about 30 MB."""
MAX_OUTPUT = 8 << 20
"""Characters of a rendered text."""
MAX_REQUEST = 64 << 20
"""Bytes of a conversation and its template."""

FILE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
"""Files of a folder with templates; see `template_files`."""

_WORKER = Path(__file__).with_name("template_worker.py")
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


class _Ended(Exception):  # noqa: N818 - internal
    """The process ended. `limit`: the limit that it exceeded; None if the reason is unknown."""

    def __init__(self, code: int | None, limit: str | None) -> None:
        super().__init__(
            f"it ended by signal {-code}" if code is not None and code < 0 else f"it ended with code {code}"
        )
        self.limit = limit


def _folders() -> list[str]:
    """Return the folders of jinja2 and markupsafe, without importing them, which takes a tenth of a second."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise GenerationError(f"chat templates need {name}, which is not installed: pip install {name}")
        folders.append(str(Path(spec.origin).parents[1]))
    return list(dict.fromkeys(folders))


class _Process:
    """One worker process, and the protocol of `template_worker`.

    Attributes:
        owing: a request was interrupted before its answer, so the process cannot be used again.
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
            # In a new session, so that Ctrl-C in a terminal reaches this process only.
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
        """Send a request and return the answer. Raises `_Ended` after `seconds`, or if the process ended."""
        if not self._ready:
            self._within(START_SECONDS, b"")
            self._ready = True
        return self._within(seconds, len(request).to_bytes(4, "big") + request)

    def _within(self, seconds: float, message: bytes) -> bytes:
        # Another thread cannot interrupt a waiting read, but it can end the process, which ends the read.
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
        """Kill the process. A caller that waits for its answer gets `_Ended`."""
        self._popen.kill()

    def end(self) -> None:
        """Kill the process and wait for its end."""
        self.kill()
        self.close()
        self._popen.wait()

    def close(self) -> None:
        """Close the pipes."""
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()

    def forget(self) -> None:
        """Drop the worker in a forked process: it belongs to the parent."""
        self._popen.returncode = 0
        self.close()


class Sandbox:
    """A worker process that is started when it is first needed, and again after it ended. Threads take turns.

    Args:
        memory: bytes of address space.
        cpu_seconds: CPU time of one rendering.
        wall_seconds: wall time of one rendering, after which the process is ended.
    """

    def __init__(
        self, memory: int = MEMORY, cpu_seconds: float = CPU_SECONDS, wall_seconds: float = WALL_SECONDS
    ) -> None:
        self._memory, self._cpu_seconds, self._wall_seconds = memory, cpu_seconds, wall_seconds
        self._lock = threading.Lock()
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None where there is none."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process without waiting for it, so that it is ready for the first template.

        Raises:
            GenerationError: there is no Python interpreter, or jinja2 is not installed.
        """
        with self._lock:
            self._started()

    def ask(self, source: str, given: dict[str, Any] | None) -> tuple[bytes, str]:
        """Render a template with the variables `given`; None only checks the template.

        Returns:
            A letter of `template_worker.Answer`, and its text.

        Raises:
            GenerationError: the process cannot be started, or the variables are not JSON or too large.
        """
        request = _request(source, given)
        with self._lock:
            try:
                answer = self._ask(request)
            except _Ended as ended:
                self._process = None
                return Answer.LIMIT, ended.limit or f"more than its process survives ({ended})"
            except BaseException:  # for example Ctrl-C: the answer will not be read, so the process cannot be kept
                self._end()
                raise
            if answer[:1] == Answer.LIMIT:
                # Its remaining memory is unknown, so it is not used again.
                self._end()
            return answer[:1], answer[1:].decode("utf-8", "surrogatepass")

    def _ask(self, request: bytes) -> bytes:
        try:
            return self._started().ask(request, self._wall_seconds)
        except _Ended as ended:
            if ended.limit is not None:
                raise
        # The process may have been ended long ago from outside. Only a second failure is this template's fault.
        self._process = None
        return self._started().ask(request, self._wall_seconds)

    def _started(self) -> _Process:
        if self._process is not None and self._process.owing:
            self._end()  # a second Ctrl-C came before the first one ended it
        if self._process is None:
            self._process = _Process(self._memory, self._cpu_seconds)
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def close(self) -> None:
        """End the process. Another one is started when it is needed."""
        process = self._process
        if process is not None:
            # Without the lock: its holder may wait for the process, and continues when it is killed.
            process.kill()
        with self._lock:
            if self._process is process:
                self._end()

    def forget(self) -> None:
        """Drop the worker in a forked process: it belongs to the parent."""
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
        raise GenerationError(
            f"the conversation has {len(request)} bytes, more than the limit of {MAX_REQUEST}: shorten it"
        )
    return request


SANDBOX = Sandbox()
"""The worker process that all templates of this process share."""


def start_for(folder: Path) -> None:
    """Start the worker process without waiting for it, if a checkpoint or bundle folder is likely to have a template.

    This module imports quickly, so that `edgelm.load` can call this first.
    """
    try:
        likely = (folder / FILE).is_file() or b'"chat_template"' in _beginning(folder / SETTINGS)
    except (OSError, ValueError):
        return
    if likely:
        # If it cannot start, the first conversation raises the error.
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

"""Python process that has imported the third-party packages of the tests, and forks for each run of pytest.

These imports take several times as long as most tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_MODULES = (
    "numpy", "onnx", "onnxruntime", "safetensors.torch", "sentencepiece", "tokenizers", "torch", "transformers",
    "transformers.models.llama", "transformers.models.olmoe",
)  # fmt: skip
# Reads one request per line from standard input; answers with the child's process id, and then with its status.
_SERVER = """
import contextlib, importlib, json, os, signal, sys
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
import pytest
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 3
        try:
            code = int(pytest.main(request["arguments"]))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class WarmPython:
    """Runs pytest in forks of one process, which is started by the first run.

    Args:
        python: the interpreter.
        folder: the working folder.
        environment: environment of the process.
    """

    def __init__(self, python: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self._start = ([python, "-P", "-c", _SERVER, *_MODULES], folder, dict(environment))
        self._server: subprocess.Popen[bytes] | None = None
        self._child = 0

    def pytest(self, arguments: Sequence[str], output: Path, seconds: float) -> int | None:
        """Run pytest; return its exit status, a negative signal number, or None after a timeout."""
        if self._server is None:
            command, folder, environment = self._start
            self._server = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                start_new_session=True,
            )  # fmt: skip
        assert self._server.stdin is not None
        request = {"arguments": list(arguments), "output": str(output)}
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._child = self._answer(None)
        try:
            return self._answer(seconds)
        except TimeoutError:
            self.stop()
            self._answer(None)
            return None
        finally:
            self._child = 0

    def stop(self) -> None:
        """Stop the running tests, if any."""
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child, signal.SIGKILL)

    def _answer(self, seconds: float | None) -> int:
        assert self._server is not None
        assert self._server.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise TimeoutError
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs the tests has ended")
        return int(line)
